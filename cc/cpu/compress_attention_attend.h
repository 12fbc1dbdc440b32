// Attention of a unit of work: one walk over its pages.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_ATTEND_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_ATTEND_H_

#include <cstdint>

#include "cpu/compress_attention_kernel.h"
#include "cpu/compress_attention_tile.h"
#include "cpu/compress_attention_weights.h"
#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

static_assert(kGranule == compressed::kPositionGranule);

// The memory of one unit.
struct Scratch {
  uint32_t* queries;  // [heads][words][padded rows], see Queries
  uint32_t* keys;     // [kGranule][words], converted
  uint32_t* values;   // [kMostSteps][words], converted
  WeightsMemory weights;
  int64_t size;  // bytes

  Scratch(const Plan& plan, int64_t heads, int64_t padded_rows, void* memory) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t words) {
      char* const taken = next;
      next += RoundUp(4 * words, kAlignment);
      return reinterpret_cast<uint32_t*>(taken);
    };
    const int64_t row_words = PaddedWords(plan.problem.head_size);
    // Transposing few rows writes a vector past the end.
    queries = take(heads * row_words * padded_rows + kLanes);
    keys = take(kGranule * row_words);
    values = take(kMostSteps * PaddedWords(plan.problem.value_size));
    weights.history = reinterpret_cast<float*>(take(heads * plan.num_taps * padded_rows));
    // Sums over few rows read a vector past the end.
    weights.head_scores = (kGranule + plan.tile_size + kGranule) * padded_rows + kLanes;
    weights.scores = reinterpret_cast<float*>(take(heads * weights.head_scores));
    weights.head_pairs = RoundUp(plan.tile_size, 2 * kLanes) / 2 * padded_rows + kLanes;
    weights.pairs = take(heads * weights.head_pairs);
    size = next - static_cast<char*>(memory);
  }
};

// Attends with the panels of one unit.
template <class Type, class Multiplier>
class Attention {
 public:
  Attention(const Plan& plan, const Unit& unit, const Partial* partials, void* memory)
      : plan_(plan),
        unit_(unit),
        partials_(partials),
        scratch_(plan, unit.heads, unit.padded_rows, memory) {
    const compressed::Problem& problem = plan.problem;
    in_place_ = Multiplier::ReadsInPlace(padded_rows_, head_size_);
    key_words_ = in_place_ ? head_size_ / Key::kElements : Key::RowWords(head_size_);
    key_stride_ = problem.key_pitch().row * kElement;
    value_stride_ = problem.value_pitch().row * kElement;
  }

  void Run(const Upcoming& upcoming) {
    PackQueries();
    for (int64_t h = 0; h < unit_.heads; ++h) weights_.Begin(h, partials_[h]);
    for (Tile tile = Tile::At(plan_, unit_, 0), next; tile.count > 0; tile = next) {
      next = Tile::At(plan_, unit_, tile.index + 1);
      Ahead ahead = FetchAhead(tile, next, upcoming);
      const int64_t together = Multiplier::kHeadsTogether ? unit_.heads : 1;
      for (int64_t h = 0; h < unit_.heads; h += together) {
        Score(tile, h, together, ahead);
        for (int64_t i = h; i < h + together; ++i) weights_.Weigh(tile, i, partials_[i], ahead);
        AddValues(tile, h, together, ahead);
      }
    }
    for (int64_t h = 0; h < unit_.heads; ++h) weights_.End(partials_[h]);
  }

 private:
  using Key = typename Multiplier::Key;
  using Ahead = typename Multiplier::Ahead;
  static constexpr int64_t kElement = Key::kElementSize;

  // The query heads of the panels as words, their scale but for its size folded in.
  void PackQueries() {
    const int64_t repeat = Multiplier::Repeat(padded_rows_);
    for (int64_t h = 0; h < unit_.heads; ++h) {
      uint32_t* const queries = scratch_.queries + h * key_words_ * padded_rows_;
      if (repeat == 1) {
        for (int64_t r = 0; r < padded_rows_; r += kLanes) PackTransposed(h, r, queries + r);
        continue;
      }
      for (int64_t r = 0; r < padded_rows_; ++r) {
        uint32_t* const words = scratch_.keys;
        PackQuery(h, r, words);
        WithConstant(repeat, [&](auto count) {
          uint32_t* const target = queries + r * count();
          for (int64_t w = 0; w < key_words_; w += count()) {
            __builtin_memcpy(target + w * padded_rows_, words + w, 4 * count());
          }
        });
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

  // Scores of some heads and all positions of the tile, and of those up to a multiple of kGranule.
  void Score(const Tile& tile, int64_t first, int64_t heads, Ahead& ahead) {
    ahead.BeginKeys();
    const int64_t end = RoundUp(tile.count, kGranule);
    const int64_t at_once = in_place_ ? Multiplier::kAtOnce : kGranule;
    const auto queries = [&](int64_t h, int64_t count) {
      return Queries{scratch_.queries + h * key_words_ * padded_rows_,
                     padded_rows_,
                     key_words_,
                     count,
                     plan_.problem.key_pitch().head * kElement,
                     scratch_.weights.head_scores};
    };
    for (int64_t p = 0; p < end; p += at_once) {
      const auto keys = [&](int64_t h) {
        return HeadRows{KeyRow(unit_, tile, h) + p * key_stride_, key_stride_,
                        Least(at_once, end - p)};
      };
      const auto scores = [&](int64_t h) { return weights_.scores(h) + p * padded_rows_; };
      if (in_place_) {
        Multiplier::template Score<true>(keys(first), queries(first, heads), scores(first), ahead);
        continue;
      }
      for (int64_t h = first; h < first + heads; ++h) {
        Multiplier::template Score<false>(Packed(keys(h)), queries(h, 1), scores(h), ahead);
      }
    }
  }

  // Adds the weighted values of some heads of the tile.
  void AddValues(const Tile& tile, int64_t first, int64_t heads, Ahead& ahead) {
    ahead.BeginValues();
    const auto head = [&](int64_t h) {
      return HeadValues{{ValueRow(unit_, tile, first + h), value_stride_, tile.count},
                        weights_.words(first + h),
                        partials_[first + h].attention};
    };
    Multiplier::Weigh(head, heads, value_size_, padded_rows_, rows_, scratch_.values, ahead);
  }

  // A granule of keys, converted.
  HeadRows Packed(const HeadRows& keys) {
    for (int64_t i = 0; i < kGranule; ++i) {
      Key::PackRow(keys.first + i * keys.stride, head_size_, scratch_.keys + i * key_words_);
    }
    return {reinterpret_cast<const char*>(scratch_.keys), 4 * key_words_, kGranule};
  }

  // Fetches memory ahead, over the end of the tile into the next, of this unit or the upcoming one.
  Ahead FetchAhead(const Tile& tile, Tile next, const Upcoming& upcoming) const {
    const Unit* unit = &unit_;
    Rows queries = {};
    if (next.count == 0) {
      unit = upcoming.take(upcoming.taker);
      if (unit != nullptr) {
        next = Tile::At(plan_, *unit, 0);
        queries = {QueryRow(*unit, 0, 0), plan_.problem.heads * head_size_ * kElement,
                   unit->heads * plan_.group * head_size_ * kElement, unit->tokens};
      }
    }
    const int64_t positions = RoundUp(tile.count, kGranule);
    if (next.count == 0) {  // no rows, at addresses that may be fetched all the same
      unit = &unit_;
      next = tile;
      next.count = 0;
    }
    return Multiplier::FetchAhead(
        RowsOf(unit_, tile), RowsOf(*unit, next), queries,
        {unit_.heads, positions, positions / plan_.strides_per_select_block, key_words_,
         value_size_, rows_, padded_rows_});
  }

  // All heads of a unit, of the positions of a tile.
  TileRows RowsOf(const Unit& unit, const Tile& tile) const {
    const compressed::Problem& problem = plan_.problem;
    const int64_t key_bytes = unit.heads * problem.key_pitch().head * kElement;
    const int64_t value_bytes = unit.heads * problem.value_pitch().head * kElement;
    return {{KeyRow(unit, tile, 0), key_stride_, key_bytes, tile.count},
            {ValueRow(unit, tile, 0), value_stride_, value_bytes,
             problem.interleaved ? 0 : tile.count}};  // values that lie among keys come with them
  }

  // Of the unit's kv head h, row r of the panel.
  const char* QueryRow(const Unit& unit, int64_t h, int64_t r) const {
    const int64_t head = (unit.first_head + h) * plan_.group + r % plan_.group;
    const int64_t row = (unit.first_row + r / plan_.group) * plan_.problem.heads + head;
    return static_cast<const char*>(plan_.arrays.query) + row * head_size_ * kElement;
  }

  const char* KeyRow(const Unit& unit, const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.key) + tile.first_row * key_stride_ +
           (unit.first_head + h) * plan_.problem.key_pitch().head * kElement;
  }

  const char* ValueRow(const Unit& unit, const Tile& tile, int64_t h) const {
    return static_cast<const char*>(plan_.arrays.value) + tile.first_row * value_stride_ +
           (unit.first_head + h) * plan_.problem.value_pitch().head * kElement;
  }

  const Plan& plan_;
  const Unit& unit_;
  const Partial* const partials_;
  const Scratch scratch_;
  const Weights<Type, Multiplier> weights_ = {plan_, unit_, scratch_.weights};
  const int64_t padded_rows_ = unit_.padded_rows;
  const int64_t rows_ = unit_.tokens * plan_.group;
  const int64_t head_size_ = plan_.problem.head_size;
  const int64_t value_size_ = plan_.problem.value_size;
  bool in_place_;       // keys are read where they lie
  int64_t key_words_;   // of a key, as it is read
  int64_t key_stride_;  // bytes, from one row of the pool to the next
  int64_t value_stride_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_ATTEND_H_
