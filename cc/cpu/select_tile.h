// The rows that a unit reads, some at a time, and what is fetched ahead of them.

#ifndef JAX_NSA_CPU_SELECT_TILE_H_
#define JAX_NSA_CPU_SELECT_TILE_H_

#include <cstdint>

#include "cpu/select_kernel.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kGranule = 16;  // rows that are scored at once
constexpr int64_t kTile = 64;     // rows in a tile, at most

// Zeros, as a row of values of any type.
alignas(64) constexpr char kZeroRow[4 * kMaxValueSize] = {};

// Rows of keys and values, wherever they lie. Past `count`, up to a whole granule, keys repeat the
// last, for scores that nobody looks at, and values are zeros.
struct Tile {
  int64_t count;
  const char* keys[kTile];
  const char* values[kTile];
};

// Where rows of the pools lie, for one kv head.
struct Pools {
  const char *keys, *values;         // row 0
  int64_t key_stride, value_stride;  // bytes from one row to the next
};

// Walks over the runs of one section.
class Cursor {
 public:
  Cursor(const RowRun* runs, int64_t count) : run_(runs), end_(runs + count) {}

  // The next rows, up to a tile; none at the end.
  void Next(const Pools& pools, Tile* tile) {
    int64_t n = 0;
    while (n < kTile && run_ != end_) {
      const int64_t left = run_->count - done_, room = kTile - n, count = left < room ? left : room;
      const int64_t first = run_->first + done_;
      for (int64_t i = 0; i < count; ++i) {
        tile->keys[n + i] = pools.keys + (first + i) * pools.key_stride;
        tile->values[n + i] = pools.values + (first + i) * pools.value_stride;
      }
      n += count;
      done_ += count;
      if (done_ == run_->count) ++run_, done_ = 0;
    }
    tile->count = n;
    for (; n % kGranule != 0; ++n) {
      tile->keys[n] = tile->keys[n - 1];
      tile->values[n] = kZeroRow;
    }
  }

  bool AtEnd() const { return run_ == end_; }

 private:
  const RowRun *run_, *end_;
  int64_t done_ = 0;  // rows of *run_
};

// Fetches rows a fixed number of rows ahead of their use: of a tile the keys, then the values, then
// the next tile's keys. The inner loops call Step every few instructions; bursts would be lost, and
// so would fetches into any but the innermost cache whose translations are not at hand.
class Fetch {
 public:
  Fetch(int64_t key_bytes, int64_t value_bytes, int64_t rows_ahead)
      : keys_(key_bytes), values_(value_bytes), rows_ahead_(rows_ahead) {}

  // Begins a tile; `next` is what follows, perhaps nothing.
  void Begin(const Tile* tile, const Tile* next) {
    tile_ = tile, next_ = next;
    // What the tile before fetched of this one.
    row_ = row_ > values_end_ ? row_ - values_end_ : 0;
    keys_end_ = tile->count;
    values_end_ = 2 * tile->count;
    end_ = values_end_ + next->count;
  }

  // Rows up to `rows` of the tile, first the keys and then the values, are about to be used, in so
  // many steps.
  void Use(int64_t rows, int64_t steps) {
    const int64_t wanted = rows + rows_ahead_, target = wanted < end_ ? wanted : end_;
    const char** last = lines_;
    last = AddRows(tile_->keys, 0, keys_end_, target, keys_, last);
    last = AddRows(tile_->values, keys_end_, values_end_, target, values_, last);
    last = AddRows(next_->keys, values_end_, end_, target, keys_, last);
    const int64_t count = last - lines_;
    at_ = lines_;
    in_step_ = (count + steps - 1) / steps;
    last_ = last;
    // Whole steps: some lines again.
    for (int64_t i = 0; i < in_step_; ++i) last[i] = lines_[i];
  }

  inline void Step() {
    if (at_ >= last_) return;
    const char* const* const at = at_;
    for (int64_t i = 0; i < in_step_; ++i) __builtin_prefetch(at[i], 0, 3);
    at_ = at + in_step_;
  }

 private:
  static constexpr int64_t kLine = 64, kAtOnce = 8;
  // Added at once: of rows_ahead and a granule, no more than a tile.
  static constexpr int64_t kMostLines = kTile * (4 * kMaxHeadSize / kLine + 2);

  // Lines that a row lies in, wherever it begins.
  struct Lines {
    explicit Lines(int64_t bytes) : count((bytes + kLine - 1) / kLine + (bytes % kLine != 0)) {}
    int64_t count;
  };

  // Adds the lines of rows [row_, target) that are among the tile's [begin, end).
  inline const char** AddRows(const char* const* rows, int64_t begin, int64_t end, int64_t target,
                              const Lines& lines, const char** last) {
    for (; row_ < end && row_ < target; ++row_, last += lines.count) {
      using Pointers = uint64_t __attribute__((vector_size(8 * kAtOnce)));
      Pointers at =
          reinterpret_cast<uint64_t>(rows[row_ - begin]) +
          Pointers{0, kLine, 2 * kLine, 3 * kLine, 4 * kLine, 5 * kLine, 6 * kLine, 7 * kLine};
      for (int64_t i = 0; i < lines.count; i += kAtOnce, at += kAtOnce * kLine) {
        __builtin_memcpy(last + i, &at, sizeof at);
      }
    }
    return last;
  }

  const char* const* at_ = nullptr;
  const char* const* last_ = nullptr;
  int64_t in_step_ = 0;  // lines
  int64_t row_ = 0;      // the next to be fetched
  int64_t keys_end_ = 0, values_end_ = 0, end_ = 0;
  const Tile *tile_ = nullptr, *next_ = nullptr;
  const Lines keys_, values_;
  const int64_t rows_ahead_;
  const char* lines_[2 * kMostLines];  // twice, for what is added to make steps whole
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_TILE_H_
