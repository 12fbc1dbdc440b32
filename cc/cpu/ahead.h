// Fetching memory ahead of its use, by time.

#ifndef JAX_NSA_CPU_AHEAD_H_
#define JAX_NSA_CPU_AHEAD_H_

#include <cstdint>

#include "cpu/rows.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Fetches the keys, then the values, of the next tile, and the queries if it is the first of a
// unit, while the present one is worked on: a straight line through memory, whatever order the
// heads are read in. The inner loops call Step every few instructions, so that memory is always
// busy and never stalls them.
class AheadByTime {
 public:
  // To be fetched by `steps` steps.
  AheadByTime(const Rows& keys, const Rows& values, const Rows& queries, int64_t steps)
      : rows_(Join(keys)), later_{Join(values), Join(queries)} {
    const int64_t lines = Lines(rows_) + Lines(later_[0]) + Lines(later_[1]);
    rate_ = lines * kLine / (steps > 0 ? steps : 1) + 1;
  }

  // Time alone decides.
  void BeginKeys() {}
  void BeginValues() {}

  inline void Step(int64_t steps = 1) {
    for (due_ += steps * rate_; due_ >= 0; due_ -= kBurstLines * kLine) FetchBurst();
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int64_t kLine = 1 << 16;  // unit of rate_ and due_
  static constexpr int64_t kBurstLines = 4;  // fetched at once: less to decide for each

  // Rows that touch are one.
  static Rows Join(const Rows& rows) {
    if (rows.bytes != rows.stride || rows.count == 0) return rows;
    return {rows.first, 0, rows.bytes * rows.count, 1};
  }

  static int64_t Lines(const Rows& rows) {
    constexpr int64_t kBurstBytes = kBurstLines * kLineBytes;
    return rows.count * ((rows.bytes + kBurstBytes - 1) / kBurstBytes) * kBurstLines;
  }

  // May fetch a little past the end of a row, which does no harm: fetches never fault.
  inline void FetchBurst() {
    if (next_ >= end_ && !NextRow()) return;
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBurstLines; ++i) __builtin_prefetch(next_ + i * kLineBytes, 0, 2);
    next_ += kBurstLines * kLineBytes;
  }

  // False if there is none.
  bool NextRow() {
    for (int i = 0; i < 2 && rows_.count == 0; ++i) {
      rows_ = later_[0];
      later_[0] = later_[1];
      later_[1].count = 0;
    }
    if (rows_.count == 0) {
      rate_ = due_ = 0;
      return false;
    }
    --rows_.count;
    next_ = rows_.first;
    end_ = next_ + rows_.bytes;
    rows_.first += rows_.stride;
    return true;
  }

  Rows rows_, later_[2];        // what is left
  const char* next_ = nullptr;  // in the present row
  const char* end_ = nullptr;
  int64_t rate_, due_ = -1;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_AHEAD_H_
