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
      : key_bytes_(key_bytes), value_bytes_(value_bytes), rows_ahead_(rows_ahead) {}

  // Begins a tile; `next` is what follows, or null.
  void Begin(const Tile* tile, const Tile* next) {
    tile_ = tile, next_ = next;
    // What the tile before fetched of this one.
    const int64_t fetched = row_ - end_;
    row_ = fetched > 0 ? fetched : 0;
    keys_end_ = tile->count;
    values_end_ = 2 * tile->count;
    end_ = values_end_;
    all_ = end_ + (next ? next->count : 0);
  }

  // Rows up to `rows` of the tile, first the keys and then the values, are about to be used, in so
  // many steps.
  inline void Use(int64_t rows, int64_t steps) {
    target_ = rows + rows_ahead_;
    if (target_ > all_) target_ = all_;
    const int64_t row_lines = (key_bytes_ > value_bytes_ ? key_bytes_ : value_bytes_) / kLine + 2;
    lines_ = ((target_ - row_) * row_lines + steps - 1) / steps;
  }

  inline void Step() {
    for (int64_t i = 0; i < lines_; ++i) FetchLine();
  }

 private:
  static constexpr int64_t kLine = 64;

  inline void FetchLine() {
    if (at_ >= stop_ && !NextRow()) return;
    __builtin_prefetch(at_, 0, 3);
    at_ += kLine;
  }

  bool NextRow() {
    if (row_ >= target_) {
      lines_ = 0;
      return false;
    }
    const bool values = row_ >= keys_end_ && row_ < values_end_;
    const char* const first = row_ < keys_end_     ? tile_->keys[row_]
                              : row_ < values_end_ ? tile_->values[row_ - keys_end_]
                                                   : next_->keys[row_ - values_end_];
    ++row_;
    stop_ = first + (values ? value_bytes_ : key_bytes_);
    at_ = first - reinterpret_cast<uintptr_t>(first) % kLine;
    return true;
  }

  const char *at_ = nullptr, *stop_ = nullptr;
  int64_t lines_ = 0;  // in a step
  int64_t row_ = 0, target_ = 0, keys_end_ = 0, values_end_ = 0, end_ = 0, all_ = 0;
  const Tile *tile_ = nullptr, *next_ = nullptr;
  const int64_t key_bytes_, value_bytes_, rows_ahead_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_TILE_H_
