// Attention of a unit of the selected branch: one walk over the rows that it reads.
//
// Scores lie transposed, [position][row], so that the rows of a panel fill the lanes of vectors and
// softmax is vertical; where rows are fewer than lanes, a vector holds several positions. Their
// number divides 128, so that they always fill vectors, or vectors hold whole positions.

#ifndef JAX_NSA_CPU_SELECT_ATTEND_H_
#define JAX_NSA_CPU_SELECT_ATTEND_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/scores.h"
#include "cpu/select_kernel.h"
#include "cpu/select_softmax.h"
#include "cpu/select_tile.h"
#include "cpu/simd.h"
#include "cpu/values.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// The memory of one unit.
struct SelectScratch {
  uint32_t* queries;  // see Queries
  uint32_t* keys;     // [kGranule][words of a row], converted
  float* scores;      // [kTileRows][rows], then weights
  uint32_t* pairs;    // [kTileRows / 2][rows], weights as words
  int64_t size;       // bytes

  SelectScratch(const select::Plan& plan, void* memory) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](int64_t words) {
      char* const taken = next;
      next += RoundUp(4 * words, kAlignment);
      return taken;
    };
    const int64_t row_words = PaddedWords(plan.problem.head_size);
    queries = reinterpret_cast<uint32_t*>(take(row_words * plan.group));
    keys = reinterpret_cast<uint32_t*>(take(kGranule * row_words));
    scores = reinterpret_cast<float*>(take(kTileRows * plan.group));
    // Pairs of few rows fill a vector, whatever the positions.
    pairs = reinterpret_cast<uint32_t*>(take(kTileRows / 2 * plan.group + kLanes));
    size = next - static_cast<char*>(memory);
  }
};

// KeyProducts and ValueProducts say how keys meet queries, and values weights.
template <class Type, class KeyProducts, class ValueProducts>
class SelectAttention {
 public:
  SelectAttention(const select::Plan& plan, const select::Unit& unit,
                  const select::Partial* partials, void* memory)
      : plan_(plan),
        unit_(unit),
        partials_(partials),
        scratch_(plan, memory),
        softmax_(plan, scratch_.scores, scratch_.pairs) {
    in_place_ = ByKeys::ReadsInPlace(rows_, head_size_);
    queries_ = {scratch_.queries, rows_,
                in_place_ ? head_size_ / Key::kElements : Key::RowWords(head_size_)};
  }

  void Run(const select::Upcoming& upcoming) {
    PackQueries();
    Walk walk(unit_);
    const Pools pools = PoolsOf(unit_);
    Tile tiles[2];
    int present = 0;
    walk.Next(pools, &tiles[0]);
    for (int section = walk.section(), open = -1; tiles[present].count > 0;) {
      Tile& tile = tiles[present];
      Tile& next = tiles[1 - present];
      if (section != open) softmax_.Begin(partials_[open = section], columns_);
      walk.Next(pools, &next);
      const int next_section = walk.section();
      const bool last = next.count == 0;
      if (last) FirstTile(upcoming.take(upcoming.taker), &next);
      Attend(tile, next.count > 0 ? next : tile, partials_[section]);
      if (last || next_section != section) softmax_.End(partials_[section]);
      if (last) return;
      section = next_section;
      present = 1 - present;
    }
  }

 private:
  using ByKeys = Scores<Type, KeyProducts>;
  using Key = Operands<Type, KeyProducts::kElements>;
  using ByValues = Weigh<Type, ValueProducts, FetchRows>;
  static constexpr int64_t kValueRows = ByValues::Words::kRows;  // in a step
  static constexpr int64_t kElement = Key::kElementSize;

  // Tiles of one section after the other.
  class Walk {
   public:
    explicit Walk(const select::Unit& unit) : unit_(unit), cursor_(nullptr, 0) {}

    // None at the end. A tile lies within a section.
    void Next(const Pools& pools, Tile* tile) {
      while (cursor_.AtEnd() && section_ + 1 < select::kSections) {
        ++section_;
        cursor_ = Cursor(unit_.runs + first_, unit_.num_runs[section_]);
        first_ += unit_.num_runs[section_];
      }
      cursor_.Next(pools, tile);
    }

    int section() const { return section_; }

   private:
    const select::Unit& unit_;
    Cursor cursor_;
    int section_ = -1;
    int64_t first_ = 0;  // run of the next section
  };

  void FirstTile(const select::Unit* unit, Tile* tile) const {
    tile->count = 0;
    if (unit == nullptr) return;
    Walk(*unit).Next(PoolsOf(*unit), tile);
  }

  // Attends to the tile and fetches as much of the next.
  void Attend(const Tile& tile, const Tile& next, const select::Partial& partial) {
    for (int64_t p = 0; p < tile.count; p += kGranule) {
      Score(tile.keys + p, next.keys + p, scratch_.scores + p * rows_);
    }
    softmax_.Weigh(tile.count, partial, columns_);
    FetchRows ahead(next.values);
    const ByValues weigh(rows_, rows_, value_size_, ahead);
    ByValues::WithRows(rows_, [&](auto rows) {
      weigh.template Add<rows()>(tile.values, tile.granules_end(), softmax_.words(),
                                 partial.attention);
    });
  }

  // Of a granule.
  void Score(const char* const* keys, const char* const* next, float* scores) {
    FetchRows ahead(next);
    if (in_place_) {
      return ByKeys::template Multiply<true>(keys, queries_, scores, ahead);
    }
    const char* packed[kGranule];
    for (int64_t i = 0; i < kGranule; ++i) {
      uint32_t* const words = scratch_.keys + i * queries_.row_words;
      Key::PackRow(keys[i], head_size_, words);
      packed[i] = reinterpret_cast<const char*>(words);
    }
    ByKeys::template Multiply<false>(packed, queries_, scores, ahead);
  }

  // The query heads of the panel as words, their scale but for its size folded in.
  void PackQueries() {
    const int64_t repeat = ByKeys::Repeat(rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      uint32_t* const words = scratch_.keys;
      PackQuery(r, words);
      uint32_t* const target = scratch_.queries + r * repeat;
      const auto spread = [&](auto count) {
        for (int64_t w = 0; w < queries_.row_words; w += count()) {
          __builtin_memcpy(target + w * rows_, words + w, 4 * count());
        }
      };
      WithConstant(repeat, spread);
    }
  }

  void PackQuery(int64_t r, uint32_t* words) const {
    // A negative scale changes signs, so that the greatest product is the peak; a zero one clears.
    const float scale = plan_.problem.scale;
    const uint32_t sign = scale < 0 ? (Key::kPairs ? 0x80008000u : 0x80000000u) : 0;
    const uint32_t keep = scale == 0 ? 0 : ~0u;
    const int64_t row = unit_.row * plan_.problem.heads + unit_.head * rows_ + r;
    Key::PackRow(static_cast<const char*>(plan_.arrays.query) + row * head_size_ * kElement,
                 head_size_, words);
    for (int64_t w = 0; w < Key::RowWords(head_size_); ++w) words[w] = (words[w] ^ sign) & keep;
  }

  Pools PoolsOf(const select::Unit& unit) const {
    const Pitch key = plan_.problem.key_pitch(), value = plan_.problem.value_pitch();
    return {static_cast<const char*>(plan_.arrays.key) + unit.head * key.head * kElement,
            static_cast<const char*>(plan_.arrays.value) + unit.head * value.head * kElement,
            key.row * kElement, value.row * kElement};
  }

  const select::Plan& plan_;
  const select::Unit& unit_;
  const select::Partial* const partials_;
  const SelectScratch scratch_;
  const int64_t rows_ = plan_.group;
  const int64_t head_size_ = plan_.problem.head_size;
  const int64_t value_size_ = plan_.problem.value_size;
  const int64_t columns_ = PaddedWords(value_size_);  // of partials
  Softmax<Type, kValueRows == 2> softmax_;
  Queries queries_;
  bool in_place_;  // keys are read where they lie
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_ATTEND_H_
