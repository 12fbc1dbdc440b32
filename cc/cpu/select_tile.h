// The rows that a unit reads, some at a time.

#ifndef JAX_NSA_CPU_SELECT_TILE_H_
#define JAX_NSA_CPU_SELECT_TILE_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/select_kernel.h"
#include "cpu/values.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Rows that are attended to at once.
constexpr int64_t kTileRows = select::kTileRows;
static_assert(kTileRows % kGranule == 0);

// Rows of keys and values, wherever they lie. Past `count` keys repeat the last, for scores that
// nobody looks at, and values are zeros.
struct Tile {
  int64_t count;
  const char* keys[kTileRows];
  const char* values[kTileRows];

  // Those that are worked on.
  int64_t granules_end() const { return RoundUp(count, kGranule); }
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
    while (n < kTileRows && run_ != end_) {
      const int64_t first = run_->first + done_, count = Least(run_->count - done_, kTileRows - n);
      for (int64_t i = 0; i < count; ++i) {
        tile->keys[n + i] = pools.keys + (first + i) * pools.key_stride;
        tile->values[n + i] = pools.values + (first + i) * pools.value_stride;
      }
      n += count;
      done_ += count;
      if (done_ == run_->count) ++run_, done_ = 0;
    }
    tile->count = n;
    for (; n > 0 && n < kTileRows; ++n) {
      tile->keys[n] = tile->keys[n - 1];
      tile->values[n] = kZeroRow;
    }
  }

  bool AtEnd() const { return run_ == end_; }

 private:
  const RowRun *run_, *end_;
  int64_t done_ = 0;  // rows of *run_
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_TILE_H_
