// From the scores of a tile to weights, and their sums over select blocks.
//
// Scores lie transposed, [position][row], so that the rows of a panel fill the lanes of vectors and
// softmax and window sums are vertical. A panel of fewer rows than lanes is padded to a power of
// two, and a vector holds several positions.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_WEIGHTS_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_WEIGHTS_H_

#include <cstdint>

#include "cpu/compress_attention_kernel.h"
#include "cpu/compress_attention_tile.h"
#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

inline void Fill(float* target, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) target[i] = value;
}

// The memory that weights take.
struct WeightsMemory {
  float* history;  // [heads][taps][padded rows], weights of the positions before the tile
  // Of each head that is worked on together with others:
  float* scores;    // [kGranule + tile + kGranule][padded rows]: history; scores, then weights
  uint32_t* pairs;  // [steps of a tile][padded rows], weights as words
  int64_t head_scores, head_pairs;  // from a head's to the next one's
};

// The weights of the heads of a unit, tile by tile: powers of two, relative to each row's greatest
// product so far. That one's own weight is 2^-headroom, which rounding leaves alone: where one
// position has nearly all the weight, so is its share.
template <class Type, class Multiplier>
class Weights {
 public:
  using Ahead = typename Multiplier::Ahead;

  Weights(const Plan& plan, const Unit& unit, const WeightsMemory& memory)
      : plan_(plan), unit_(unit), memory_(memory) {}

  // Begins a unit.
  void Begin(int64_t h, const Partial& partial) const {
    Fill(partial.attention, padded_rows_ * columns_, 0);
    Fill(partial.peak, vectors_end_, compressed::kNoPeak);
    Fill(partial.total, vectors_end_, 0);
    Fill(History(h), history_size_, 0);
  }

  // Where the scores of a tile are to be written, up to whole granules.
  float* scores(int64_t h) const {
    return memory_.scores + Slot(h) * memory_.head_scores + kGranule * padded_rows_;
  }

  // Turns these into weights, and sums the weights into blocks.
  void Weigh(const Tile& tile, int64_t h, const Partial& partial, Ahead& ahead) const {
    Softmax(tile, h, partial, ahead);
    SumBlocks(tile, h, partial, ahead);
    if constexpr (Multiplier::kPairs) {
      WithConstant(Least(padded_rows_, kLanes),
                   [&](auto rows) { PairWeights<rows()>(tile, h, ahead); });
    }
  }

  // The weights as words, as the multiplier reads them: themselves, or rounded in pairs of
  // positions.
  const uint32_t* words(int64_t h) const {
    return Multiplier::kPairs ? pairs(h) : reinterpret_cast<const uint32_t*>(scores(h));
  }

  // Ends a unit. Several lanes hold the total of a row where a vector holds several positions.
  void End(const Partial& partial) const {
    float* const total = partial.total;
    for (int64_t r = 0; r < padded_rows_; ++r) {
      for (int64_t lane = r + padded_rows_; lane < kLanes; lane += padded_rows_) {
        total[r] += total[lane];
      }
    }
  }

 private:
  static constexpr int kChains = 4;  // of what is added or compared one after another
  static constexpr int kBlocks = kLanes > 4 ? 4 : 2;  // summed at once, as measured to serve

  void Softmax(const Tile& tile, int64_t h, const Partial& partial, Ahead& ahead) const {
    float* const weights = scores(h);
    Mask(tile, weights);
    const int64_t end = RoundUp(tile.count, kGranule) * padded_rows_;
    const int64_t stride = vectors_end_;
    for (int64_t v = 0; v < stride; v += kLanes) {
      Float peaks[kChains], totals[kChains] = {};
      for (Float& chain : peaks) chain = Set(-__builtin_inff());
      ForVectors(v, end, stride, [&](int64_t i, int chain) {
        peaks[chain] = Max(Load<Float>(weights + i), peaks[chain]);
      });
      const Float peak = Max(Max(peaks[0], peaks[1]), Max(peaks[2], peaks[3]));
      if (tile.index == 0 || AnyGreater(peak, Load<Float>(partial.peak + v))) {
        Raise(tile, h, v, peak, partial);
      }
      const Float greatest = Load<Float>(partial.peak + v);
      ForVectors(v, end, stride, [&](int64_t i, int chain) {
        // The difference first: however large products are, that of the greatest is 0.
        const Float weight = Exp2((Load<Float>(weights + i) - greatest) * scale_ - unit_.headroom);
        Store(weights + i, weight);
        totals[chain] += weight;
        if (chain == 0) ahead.Step(kChains);  // one for each, in fewer calls
      });
      const Float total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
      Store(partial.total + v, Load<Float>(partial.total + v) + total);
    }
    __builtin_memcpy(partial.tile_peaks + tile.index * padded_rows_, partial.peak,
                     4 * padded_rows_);
  }

  // Calls the function with every `stride`-th index in [begin, end) and the chain it belongs to.
  template <class Function>
  static inline void ForVectors(int64_t begin, int64_t end, int64_t stride, Function function) {
    int64_t i = begin;
    for (; i + (kChains - 1) * stride < end; i += kChains * stride) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) function(i + chain * stride, chain);
    }
    for (int chain = 0; i < end; i += stride, ++chain) function(i, chain);
  }

  // Scores of what a row does not see become -inf: positions past the end, and the last of the
  // sequence for the rows of early tokens.
  void Mask(const Tile& tile, float* weights) const {
    const float hidden = -__builtin_inff();
    Fill(weights + tile.count * padded_rows_,
         (RoundUp(tile.count, kGranule) - tile.count) * padded_rows_, hidden);
    if (tile.begin + tile.count == unit_.length) {
      Fill(weights + (tile.count - 1) * padded_rows_, unit_.early * plan_.group, hidden);
    }
  }

  // Takes in the peak of rows v and further, and rescales what was summed.
  [[gnu::noinline]] void Raise(const Tile& tile, int64_t h, int64_t v, Float peak,
                               const Partial& partial) const {
    peak = GreatestOfRows(peak, padded_rows_);
    const Float old = Load<Float>(partial.peak + v);
    peak = Max(peak, old);
    Store(partial.peak + v, peak);
    if (tile.index == 0) return;
    float factors[kLanes];
    Store(factors, Exp2((old - peak) * scale_));
    Store(partial.total + v, Load<Float>(partial.total + v) * Load<Float>(factors));
    float* const history = History(h);
    for (int64_t r = v; r < Least(v + kLanes, padded_rows_); ++r) {
      const float factor = factors[r - v];
      if (factor == 1.0f) continue;
      float* const row = partial.attention + r * columns_;
      for (int64_t c = 0; c < columns_; c += kLanes) Store(row + c, Load<Float>(row + c) * factor);
      for (int64_t i = r; i < history_size_; i += padded_rows_) history[i] *= factor;
    }
  }

  // Sums the weights into the blocks that close in the tile.
  void SumBlocks(const Tile& tile, int64_t h, const Partial& partial, Ahead& ahead) const {
    float* const history = History(h);
    float* const weights = scores(h);
    __builtin_memcpy(weights - history_size_, history, 4 * history_size_);
    if (tile.begin + tile.count == unit_.end) {
      Fill(weights + tile.count * padded_rows_, kGranule * padded_rows_, 0);
    }
    const int64_t last = BlocksEnd(plan_, unit_, partial, tile.begin + tile.count);
    int64_t j = BlocksBegin(plan_, unit_, partial, tile);
    for (; j + kBlocks <= last; j += kBlocks) {
      SumBlocksFrom<kBlocks>(tile, weights, j, partial, ahead);
    }
    for (; j < last; ++j) SumBlocksFrom<1>(tile, weights, j, partial, ahead);
    __builtin_memcpy(history, weights + tile.count * padded_rows_ - history_size_,
                     4 * history_size_);
  }

  // The sums of `count` blocks from block j.
  template <int count>
  void SumBlocksFrom(const Tile& tile, const float* weights, int64_t j, const Partial& partial,
                     Ahead& ahead) const {
    const int64_t stride = plan_.strides_per_select_block * padded_rows_;
    const float* const closing =
        weights + stride * (j + 1) - (tile.begin + plan_.closing) * padded_rows_;
    float* const scores = partial.scores + (j - partial.first_block) * padded_rows_;
    // Of few rows, the lanes past them are of later positions; the next block overwrites them.
    for (int64_t r = 0; r < padded_rows_; r += kLanes) {
      Float sums[count] = {};
      for (int64_t o = 0; o < plan_.num_taps; ++o) {
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) {
          sums[i] += plan_.weights[o] * Load<Float>(closing + i * stride - o * padded_rows_ + r);
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) Store(scores + i * padded_rows_ + r, sums[i]);
      ahead.Step(count * kBlockSteps);
    }
  }

  // Rounds the weights in pairs of positions, up to what the multiplier reads of them. With `rows`
  // rows to a position in a vector.
  template <int rows>
  void PairWeights(const Tile& tile, int64_t h, Ahead& ahead) const {
    float* const weights = scores(h);
    const int64_t scored = RoundUp(tile.count, kGranule);
    const int64_t positions = RoundUp(scored, 2 * Multiplier::kStepGranule);
    Fill(weights + scored * padded_rows_, (positions - scored) * padded_rows_, 0);
    uint32_t* const words = pairs(h);
    const int64_t apart = Most(padded_rows_, kLanes);  // from even vectors to odd ones
    const auto pairs = [&](int64_t i) {
      return Type::template RoundPairs<rows>(Load<Float>(weights + i),
                                             Load<Float>(weights + i + apart));
    };
    if constexpr (Multiplier::kStepGranule == 1) {
      for (int64_t i = 0; i < positions * padded_rows_; i += 2 * apart) {
        for (int64_t r = 0; r < apart; r += kLanes) {
          Store(words + i / 2 + r, pairs(i + r));
          ahead.Step();
        }
      }
    } else {
      static_assert(Multiplier::kStepGranule == kLanes);
      for (int64_t i = 0; i < positions * padded_rows_; i += 2 * kLanes * padded_rows_) {
        for (int64_t r = 0; r < padded_rows_; r += rows) {
          Float steps[rows];
#pragma GCC unroll 16
          for (int64_t e = 0; e < rows; ++e) steps[e] = (Float)pairs(i + r + e * 2 * apart);
          Transpose<rows>(steps);
          uint32_t* const target = words + i / 2 + r * kLanes;
#pragma GCC unroll 16
          for (int64_t e = 0; e < rows; ++e) Store(target + e * kLanes, steps[e]);
          ahead.Step(rows);
        }
      }
    }
  }

  // Heads that are not worked on together have the same memory, in turn.
  static int64_t Slot(int64_t h) { return Multiplier::kHeadsTogether ? h : 0; }

  uint32_t* pairs(int64_t h) const { return memory_.pairs + Slot(h) * memory_.head_pairs; }

  float* History(int64_t h) const { return memory_.history + h * history_size_; }

  const Plan& plan_;
  const Unit& unit_;
  const WeightsMemory& memory_;
  const int64_t padded_rows_ = unit_.padded_rows;
  const int64_t vectors_end_ = Most(padded_rows_, kLanes);
  const int64_t columns_ = PaddedWords(plan_.problem.value_size);  // of partials
  const int64_t history_size_ = plan_.num_taps * padded_rows_;     // floats of a head
  const float scale_ = plan_.exponent_scale;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_WEIGHTS_H_
