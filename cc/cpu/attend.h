// Attention of a unit of work: one walk over its pages.
//
// Scores lie transposed, [position][row], so that the rows of a panel fill the lanes of vectors and
// softmax and window sums are vertical. A panel of fewer rows than lanes is padded to a power of
// two, and a vector holds several positions.

#ifndef JAX_NSA_CPU_ATTEND_H_
#define JAX_NSA_CPU_ATTEND_H_

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/kernel.h"
#include "cpu/multiply.h"
#include "cpu/operands.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kGranule = kPositionGranule;

void Fill(float* target, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) target[i] = value;
}

// The memory of one unit.
struct Scratch {
  uint32_t* queries;  // [heads][words][padded rows], see Queries
  float* history;     // [heads][taps][padded rows], weights of the positions before the tile
  float* weights;     // [kGranule + tile + kGranule][padded rows]: history; scores, then weights
  uint32_t* pairs;    // [steps of a tile][padded rows], weights as words
  uint32_t* keys;     // [kGranule][words]
  uint32_t* values;   // [kMostSteps][words]
  float* factors;     // [padded rows]
  int64_t size;       // bytes

  Scratch(const Plan& plan, int64_t heads, int64_t padded_rows, void* memory) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t words) {
      char* const taken = next;
      next += RoundUp(4 * words, kAlignment);
      return taken;
    };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n)); };
    const auto words = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(n)); };
    const int64_t row_words = PaddedWords(plan.problem.head_size);
    // Transposing few rows writes a vector past the end.
    queries = words(heads * row_words * padded_rows + kLanes);
    history = floats(heads * plan.num_taps * padded_rows);
    // Sums over few rows read a vector past the end.
    weights = floats((kGranule + plan.tile_size + kGranule) * padded_rows + kLanes);
    pairs = words(RoundUp(plan.tile_size, kMostSteps) * padded_rows);
    keys = words(kGranule * row_words);
    values = words(kMostSteps * PaddedWords(plan.problem.value_size));
    factors = floats(Most(padded_rows, kLanes));
    size = next - static_cast<char*>(memory);
  }
};

// Attends with the panels of one unit. KeysBy and ValuesBy are the multipliers.
template <class Type, class KeysBy, class ValuesBy>
class Attention {
 public:
  Attention(const Plan& plan, const Unit& unit, const Partial* partials, void* memory)
      : plan_(plan),
        unit_(unit),
        partials_(partials),
        scratch_(plan, unit.heads, unit.padded_rows, memory),
        weights_(scratch_.weights + kGranule * unit.padded_rows) {
    const Problem& problem = plan.problem;
    const int64_t granule = 4 * KeysBy::WordGranule(padded_rows_);
    in_place_ = Key::kInPlace && head_size_ * kElement % granule == 0;
    key_words_ = in_place_ ? head_size_ * kElement / 4 : Key::RowWords(head_size_);
    key_stride_ = problem.key_value_heads * head_size_ * kElement;
    value_stride_ = problem.key_value_heads * value_size_ * kElement;
  }

  void Run(const Upcoming& upcoming) {
    PackQueries();
    for (int64_t h = 0; h < unit_.heads; ++h) Begin(h);
    for (Tile tile = Tile::At(plan_, unit_, 0), next; tile.count > 0; tile = next) {
      next = Tile::At(plan_, unit_, tile.index + 1);
      Ahead ahead = FetchAhead(tile, next, upcoming);
      for (int64_t h = 0; h < unit_.heads; ++h) {
        Score(tile, h, ahead);
        Softmax(tile, h, ahead);
        SumBlocks(tile, h, ahead);
        Weigh(tile, h, ahead);
      }
    }
    for (int64_t h = 0; h < unit_.heads; ++h) End(h);
  }

 private:
  using Key = Operands<Type, KeysBy::kElements>;
  using Value = Operands<Type, ValuesBy::kElements>;
  static constexpr int64_t kElement = Key::kElementSize;

  // The query heads of the panels as words, their scale but for its size folded in.
  void PackQueries() {
    const int64_t repeat = KeysBy::Repeat(padded_rows_);
    for (int64_t h = 0; h < unit_.heads; ++h) {
      uint32_t* const queries = scratch_.queries + h * key_words_ * padded_rows_;
      if (repeat == 1) {
        for (int64_t r = 0; r < padded_rows_; r += kLanes) PackTransposed(h, r, queries + r);
        continue;
      }
      for (int64_t r = 0; r < padded_rows_; ++r) {
        uint32_t* const words = scratch_.keys;
        PackQuery(h, r, words);
        for (int64_t w = 0; w < key_words_; w += repeat) {
          for (int64_t e = 0; e < repeat; ++e) {
            queries[w * padded_rows_ + r * repeat + e] = words[w + e];
          }
        }
      }
    }
  }

  // As many rows as a vector has lanes; where there are fewer, the next word overwrites the others.
  void PackTransposed(int64_t h, int64_t row, uint32_t* target) {
    static_assert(kLanes <= kGranule);
    const int64_t row_words = PaddedWords(head_size_);
    for (int64_t i = 0; i < kLanes; ++i) PackQuery(h, row + i, scratch_.keys + i * row_words);
    for (int64_t w = 0; w < key_words_; w += kLanes) {
      Float words[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        words[i] = Load<Float>(scratch_.keys + i * row_words + w);
      }
      Transpose<kLanes>(words);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        if (w + i < key_words_) Store(target + (w + i) * padded_rows_, words[i]);
      }
    }
  }

  // One row of the panel; zeros past the last.
  void PackQuery(int64_t h, int64_t r, uint32_t* words) {
    // A negative scale changes signs, so that the greatest product is the peak; a zero one clears.
    const float scale = plan_.problem.scale;
    const uint32_t sign = scale < 0 ? (Key::kPairs ? 0x80008000u : 0x80000000u) : 0;
    const uint32_t keep = scale == 0 || r >= rows_ ? 0 : ~0u;
    if (keep) Key::PackRow(QueryRow(unit_, h, r), head_size_, words);
    for (int64_t w = 0; w < Key::RowWords(head_size_); ++w) words[w] = (words[w] ^ sign) & keep;
  }

  void Begin(int64_t h) {
    const Partial& partial = partials_[h];
    Fill(partial.attention, padded_rows_ * columns_, 0);
    Fill(partial.peak, Most(padded_rows_, kLanes), kNoPeak);
    Fill(partial.total, Most(padded_rows_, kLanes), 0);
    Fill(History(h), history_size_, 0);
  }

  // Scores of all positions of the tile, and of those up to a multiple of kGranule.
  void Score(const Tile& tile, int64_t h, Ahead& ahead) {
    const Queries queries = {scratch_.queries + h * key_words_ * padded_rows_, padded_rows_};
    const char* const first = KeyRow(unit_, tile, h);
    const int64_t count = RoundUp(tile.count, kGranule);
    if (in_place_) {
      KeysBy::Score({first, key_stride_, count, key_words_}, queries, weights_, ahead);
      return;
    }
    for (int64_t i = 0; i < count; i += kGranule) {
      for (int64_t p = 0; p < kGranule; ++p) {
        Key::PackRow(first + (i + p) * key_stride_, head_size_, scratch_.keys + p * key_words_);
      }
      KeysBy::Score(
          {reinterpret_cast<const char*>(scratch_.keys), 4 * key_words_, kGranule, key_words_},
          queries, weights_ + i * padded_rows_, ahead);
    }
  }

  // Turns scores into weights relative to the greatest score so far; what was summed before is
  // rescaled if that grew.
  void Softmax(const Tile& tile, int64_t h, Ahead& ahead) {
    const Partial& partial = partials_[h];
    const float scale = plan_.exponent_scale;
    Mask(tile);
    const int64_t end = RoundUp(tile.count, kGranule) * padded_rows_;
    const int64_t stride = Most(padded_rows_, kLanes);
    bool grew = false;
    for (int64_t v = 0; v < stride; v += kLanes) {
      Float peaks[kChains], totals[kChains] = {};
      for (Float& chain : peaks) chain = Set(-__builtin_inff());
      ForVectors(v, end, stride, [&](int64_t i, int chain) {
        peaks[chain] = Max(Load<Float>(weights_ + i), peaks[chain]);
      });
      Float peak = Max(Max(peaks[0], peaks[1]), Max(peaks[2], peaks[3]));
      // Where a vector holds several positions: the greatest of each row, in all its lanes.
      for (int64_t turn = padded_rows_; turn < kLanes; turn *= 2) {
        float twice[2 * kLanes];
        Store(twice, peak);
        Store(twice + kLanes, peak);
        peak = Max(Load<Float>(twice + turn), peak);
      }
      const Float old_peak = Load<Float>(partial.peak + v);
      peak = Max(peak, old_peak);
      const Float factor = Exp2((old_peak - peak) * scale);
      for (int lane = 0; lane < kLanes; ++lane) grew |= factor[lane] != 1.0f;

      ForVectors(v, end, stride, [&](int64_t i, int chain) {
        // The difference first: however large products are, that of the greatest is 0.
        const Float weight = Exp2((Load<Float>(weights_ + i) - peak) * scale);
        Store(weights_ + i, weight);
        totals[chain] += weight;
        if (chain == 0) ahead.Step(kChains);  // one for each, in fewer calls
      });
      const Float total = (totals[0] + totals[1]) + (totals[2] + totals[3]);
      Store(partial.total + v, Load<Float>(partial.total + v) * factor + total);
      Store(partial.peak + v, peak);
      Store(scratch_.factors + v, factor);
    }
    __builtin_memcpy(partial.tile_peaks + tile.index * padded_rows_, partial.peak,
                     4 * padded_rows_);
    // Before the first tile nothing was summed.
    if (grew && tile.index > 0) Rescale(partial, History(h));
  }

  static constexpr int kChains = 4;  // of what is added or compared one after another
  static constexpr int kBlocks = kLanes > 4 ? 4 : 2;  // summed at once, as measured to serve
  static constexpr int64_t kBlockSteps = 2;  // of Ahead, in the time of a vector of block scores

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
  void Mask(const Tile& tile) {
    const float hidden = -__builtin_inff();
    Fill(weights_ + tile.count * padded_rows_,
         (RoundUp(tile.count, kGranule) - tile.count) * padded_rows_, hidden);
    if (tile.begin + tile.count == unit_.length) {
      Fill(weights_ + (tile.count - 1) * padded_rows_, unit_.early * plan_.group, hidden);
    }
  }

  void Rescale(const Partial& partial, float* history) {
    for (int64_t r = 0; r < rows_; ++r) {
      const float factor = scratch_.factors[r];
      if (factor == 1.0f) continue;
      float* const row = partial.attention + r * columns_;
      for (int64_t c = 0; c < columns_; c += kLanes) Store(row + c, Load<Float>(row + c) * factor);
    }
    for (int64_t i = 0; i < history_size_; i += padded_rows_) {
      for (int64_t r = 0; r < padded_rows_; ++r) history[i + r] *= scratch_.factors[r];
    }
  }

  // Sums the weights into the blocks that close in the tile.
  void SumBlocks(const Tile& tile, int64_t h, Ahead& ahead) {
    const Partial& partial = partials_[h];
    float* const history = History(h);
    __builtin_memcpy(weights_ - history_size_, history, 4 * history_size_);
    if (tile.begin + tile.count == unit_.end) {
      Fill(weights_ + tile.count * padded_rows_, kGranule * padded_rows_, 0);
    }
    const int64_t last = BlocksEnd(plan_, unit_, partial, tile.begin + tile.count);
    int64_t j = BlocksBegin(plan_, unit_, partial, tile);
    for (; j + kBlocks <= last; j += kBlocks) SumBlocksFrom<kBlocks>(tile, j, partial, ahead);
    for (; j < last; ++j) SumBlocksFrom<1>(tile, j, partial, ahead);
    __builtin_memcpy(history, weights_ + tile.count * padded_rows_ - history_size_,
                     4 * history_size_);
  }

  // The sums of `count` blocks from block j.
  template <int count>
  void SumBlocksFrom(const Tile& tile, int64_t j, const Partial& partial, Ahead& ahead) {
    const int64_t stride = plan_.strides_per_select_block * padded_rows_;
    const float* const closing =
        weights_ + stride * (j + 1) - (tile.begin + plan_.closing) * padded_rows_;
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

  float* History(int64_t h) { return scratch_.history + h * history_size_; }

  // Adds the weighted values of the tile.
  void Weigh(const Tile& tile, int64_t h, Ahead& ahead) {
    const int64_t steps = Steps(tile);
    const uint32_t* const weights = WeightWords(tile, ahead);
    const char* const first = ValueRow(unit_, tile, h);
    for (int64_t s = 0; s < steps; s += ValuesBy::kSteps) {
      const int64_t count = Least(ValuesBy::kSteps, steps - s);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = (s + i) * ValuesBy::kElements;
        const char* const row = first + position * value_stride_;
        Value::PackStep(row, position + 1 < tile.count ? row + value_stride_ : nullptr, value_size_,
                        scratch_.values + i * columns_);
        ahead.Step(Value::PackSteps(value_size_));
      }
      const int64_t whole = RoundUp(count, ValuesBy::kStepGranule);
      for (int64_t i = count * columns_; i < whole * columns_; ++i) scratch_.values[i] = 0;
      ValuesBy::Weigh({weights + s * padded_rows_, padded_rows_, scratch_.values, columns_, count},
                      rows_, partials_[h].attention, ahead);
    }
  }

  // Weights as words, as the multiplier reads them: themselves, or rounded in pairs of positions.
  const uint32_t* WeightWords(const Tile& tile, Ahead& ahead) {
    if constexpr (!Value::kPairs) {
      return reinterpret_cast<const uint32_t*>(weights_);
    } else {
      const int64_t scored = RoundUp(tile.count, kGranule);
      const int64_t whole = RoundUp(scored, 2 * ValuesBy::kStepGranule);
      Fill(weights_ + scored * padded_rows_, (whole - scored) * padded_rows_, 0);
      WithConstant(Least(padded_rows_, kLanes),
                   [&](auto rows) { PairWeights<rows()>(whole, ahead); });
      return scratch_.pairs;
    }
  }

  // With `rows` rows to a position in a vector.
  template <int rows>
  void PairWeights(int64_t positions, Ahead& ahead) {
    const int64_t apart = Most(padded_rows_, kLanes);  // from even vectors to odd ones
    const auto pairs = [&](int64_t i) {
      return Type::template RoundPairs<rows>(Load<Float>(weights_ + i),
                                             Load<Float>(weights_ + i + apart));
    };
    if constexpr (ValuesBy::kStepGranule == 1) {
      for (int64_t i = 0; i < positions * padded_rows_; i += 2 * apart) {
        for (int64_t r = 0; r < apart; r += kLanes) {
          Store(scratch_.pairs + i / 2 + r, pairs(i + r));
          ahead.Step();
        }
      }
    } else {
      static_assert(ValuesBy::kStepGranule == kLanes);
      for (int64_t i = 0; i < positions * padded_rows_; i += 2 * kLanes * padded_rows_) {
        for (int64_t r = 0; r < padded_rows_; r += rows) {
          Float steps[rows];
#pragma GCC unroll 16
          for (int64_t e = 0; e < rows; ++e) steps[e] = (Float)pairs(i + r + e * 2 * apart);
          Transpose<rows>(steps);
          uint32_t* const target = scratch_.pairs + i / 2 + r * kLanes;
#pragma GCC unroll 16
          for (int64_t e = 0; e < rows; ++e) Store(target + e * kLanes, steps[e]);
          ahead.Step(rows);
        }
      }
    }
  }

  // Several lanes hold the total of a row where a vector holds several positions.
  void End(int64_t h) {
    float* const total = partials_[h].total;
    for (int64_t r = 0; r < padded_rows_; ++r) {
      for (int64_t lane = r + padded_rows_; lane < kLanes; lane += padded_rows_) {
        total[r] += total[lane];
      }
    }
  }

  static int64_t Steps(const Tile& tile) {
    return RoundUp(tile.count, ValuesBy::kElements) / ValuesBy::kElements;
  }

  // Fetches the next tile, of this unit or the upcoming one, in the time of the work on a tile.
  Ahead FetchAhead(const Tile& tile, Tile next, const Upcoming& upcoming) const {
    const Unit* unit = &unit_;
    Rows keys = {}, values = {}, queries = {};
    if (next.count == 0) {
      unit = upcoming.take(upcoming.taker);
      if (unit != nullptr) {
        next = Tile::At(plan_, *unit, 0);
        queries = {QueryRow(*unit, 0, 0), plan_.problem.heads * head_size_ * kElement,
                   unit->heads * plan_.group * head_size_ * kElement, unit->tokens};
      }
    }
    if (next.count > 0) {
      keys = {KeyRow(*unit, next, 0), key_stride_, unit->heads * head_size_ * kElement, next.count};
      values = {ValueRow(*unit, next, 0), value_stride_, unit->heads * value_size_ * kElement,
                next.count};
    }
    return Ahead(keys, values, queries, StepsAhead(tile));
  }

  // How many steps ahead the work on a tile takes.
  int64_t StepsAhead(const Tile& tile) const {
    const int64_t steps = Steps(tile);
    const Keys keys = {nullptr, 0, RoundUp(tile.count, kGranule), key_words_};
    const int64_t vectors = keys.count * padded_rows_ / kLanes;
    const int64_t block_vectors =
        keys.count / plan_.strides_per_select_block * RoundUp(padded_rows_, kLanes) / kLanes;
    return unit_.heads *
           (KeysBy::ScoreSteps(keys, padded_rows_) + vectors + kBlockSteps * block_vectors +
            (Value::kPairs ? vectors / 2 : 0) + steps * Value::PackSteps(value_size_) +
            ValuesBy::WeighSteps(rows_, columns_, steps));
  }

  // Of the unit's kv head h, row r of the panel.
  const char* QueryRow(const Unit& unit, int64_t h, int64_t r) const {
    const int64_t head = (unit.first_head + h) * plan_.group + r % plan_.group;
    const int64_t row = (unit.first_row + r / plan_.group) * plan_.problem.heads + head;
    return static_cast<const char*>(plan_.arrays.query) + row * head_size_ * kElement;
  }

  const char* KeyRow(const Unit& unit, const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.key) + tile.first_row * key_stride_ +
           (unit.first_head + h) * head_size_ * kElement;
  }

  const char* ValueRow(const Unit& unit, const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.value) + tile.first_row * value_stride_ +
           (unit.first_head + h) * value_size_ * kElement;
  }

  const Plan& plan_;
  const Unit& unit_;
  const Partial* const partials_;
  const Scratch scratch_;
  float* const weights_;  // of the tile's first position
  const int64_t padded_rows_ = unit_.padded_rows;
  const int64_t rows_ = unit_.tokens * plan_.group;
  const int64_t head_size_ = plan_.problem.head_size;
  const int64_t value_size_ = plan_.problem.value_size;
  const int64_t columns_ = PaddedWords(value_size_);            // of partials
  const int64_t history_size_ = plan_.num_taps * padded_rows_;  // floats of a head
  bool in_place_;                                               // keys are read where they lie
  int64_t key_words_;                                           // of a key, as it is read
  int64_t key_stride_;                                          // bytes, in the pool
  int64_t value_stride_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_ATTEND_H_
