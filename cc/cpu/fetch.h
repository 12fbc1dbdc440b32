// Fetching memory ahead of its use.
//
// As the work goes on, what is read later is fetched, byte for byte: a line or two every few
// products, as bursts of fetches would be lost. Lines go to the second cache. On its way to the
// innermost one, each would hold one of few miss buffers for as long as memory takes, and the loads
// of the work itself need these. But only fetches to the innermost cache are carried out where the
// translation of the address is not at hand, so the first line of each page, or row, goes there.
// Measured on a Zen 4 alone: the kernel with tiles, for processors of Intel, keeps what was
// measured there, and fetches all to the innermost.

#ifndef JAX_NSA_CPU_FETCH_H_
#define JAX_NSA_CPU_FETCH_H_

#include <cstdint>

#include "cpu/rows.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kLine = 64;          // bytes
constexpr int64_t kSystemPage = 4096;  // bytes that share a translation, at least

// Rows that are worked on at once.
constexpr int64_t kGranule = 16;

// A compiler keeps assembly where it is written, and moves other fetches together into bursts. A
// function that does nothing but such fetches is pure to it, and calls of it are dropped: they are
// always inlined.
//
// `first`: whether the line brings the translation for others.
[[gnu::always_inline]] inline void FetchLine(const char* at, bool first) {
#if defined(__AMX_TILE__)
  first = true;
#endif
#if defined(__x86_64__)
  if (first) {
    asm volatile("prefetcht0 %0" : : "m"(*at));
  } else {
    asm volatile("prefetcht1 %0" : : "m"(*at));
  }
#else
  if (first) {
    __builtin_prefetch(at, 0, 3);
  } else {
    __builtin_prefetch(at, 0, 2);
  }
#endif
}

// What is fetched in the time of some work is *taken* at its beginning, and then fetched in steps.
// Each step works on `bytes` bytes of each of `count` rows.

// Rows that lie anywhere: each row that is worked on fetches one other.
class FetchRows {
 public:
  explicit FetchRows(const char* const* rows) : rows_(rows) {}

  // In the time of work on rows from row `first`, from so many bytes on.
  FetchRows Take(int64_t first, int64_t offset, int64_t) const {
    FetchRows taken(rows_ + first);
    taken.offset_ = offset;
    return taken;
  }

  // A step along the rows.
  template <int count, int bytes>
  [[gnu::always_inline]] inline void Step(int64_t step) const {
    constexpr int kSteps = bytes < kLine ? kLine / bytes : 1;  // in which a line of each is due
    constexpr int kAtOnce = (count + kSteps - 1) / kSteps;
    const int64_t offset = offset_ + step / kSteps * kSteps * bytes;
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t row = step % kSteps * kAtOnce + i;
      if (count % kSteps != 0 && row >= count) break;
#pragma GCC unroll 4
      for (int b = 0; b < bytes; b += kLine) {
        FetchLine(rows_[row] + offset + b, offset + b == 0);
      }
    }
  }

  // A step from rows to the next.
  template <int count, int bytes>
  [[gnu::always_inline]] inline void StepRows(int64_t step) const {
    if (offset_ % kLine != 0) return;  // with the columns before
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int b = 0; b < bytes; b += kLine) {
        FetchLine(rows_[step * count + i] + offset_ + b, offset_ + b == 0);
      }
    }
  }

 private:
  const char* const* const rows_;
  int64_t offset_ = 0;
};

// Nothing.
struct NoFetch {
  NoFetch Take(int64_t, int64_t, int64_t) const { return {}; }

  template <int count, int bytes>
  inline void Step(int64_t) const {}
  template <int count, int bytes>
  inline void StepRows(int64_t) const {}
};

// Bytes side by side in memory.
struct FetchBytes {
  const char* first;

  template <int count, int bytes>
  [[gnu::always_inline]] inline void Step(int64_t step) const {
    constexpr int kSteps = count * bytes < kLine ? kLine / (count * bytes) : 1;
    if (step % kSteps != 0) return;
#pragma GCC unroll 8
    for (int b = 0; b < count * bytes; b += kLine) {
      const char* const at = first + step * count * bytes + b;
      FetchLine(at, reinterpret_cast<uintptr_t>(at) % kSystemPage < kLine);
    }
  }

  template <int count, int bytes>
  [[gnu::always_inline]] inline void StepRows(int64_t step) const {
    Step<count, bytes>(step);
  }
};

// Rows side by side in memory, in a straight line, as the processor's own prefetchers do.
class FetchStream {
 public:
  // `rows` from so many bytes on, then those of `after`, of which may be none.
  FetchStream(const Rows& rows, int64_t skipped, const Rows& after)
      : rows_(Join(rows)), after_(Join(after)) {
    const int64_t skipped_rows = skipped / rows_.bytes;
    rows_.count -= skipped_rows;
    rows_.first += skipped_rows * rows_.stride;
    if (rows_.count <= 0) NextRows();
    Begin(skipped % rows_.bytes);
  }

  // In the time of work on so many bytes, whichever these are.
  FetchBytes Take(int64_t, int64_t, int64_t bytes) {
    const char* const taken = next_;
    next_ += bytes;
    if (__builtin_expect(next_ >= end_, 0)) NextRow();
    return {taken};
  }

 private:
  // Rows that touch are one.
  static Rows Join(const Rows& rows) {
    if (rows.bytes != rows.stride || rows.count == 0) return rows;
    return {rows.first, 0, rows.bytes * rows.count, 1};
  }

  void Begin(int64_t offset) {
    next_ = rows_.first + offset;
    end_ = rows_.first + rows_.bytes;
  }

  [[gnu::noinline]] void NextRow() {
    --rows_.count;
    rows_.first += rows_.stride;
    if (rows_.count <= 0) NextRows();
    Begin(0);
  }

  // The last row again where there are no more.
  void NextRows() {
    if (after_.count > 0) {
      rows_ = after_;
      after_.count = 0;
    } else {
      rows_.first -= rows_.stride;
    }
  }

  Rows rows_, after_;
  const char *next_, *end_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_FETCH_H_
