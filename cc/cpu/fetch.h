// Fetching memory ahead of its use.
//
// Each row that is worked on fetches another, the same number of bytes of it, as the work goes on:
// one or two lines every few products, as bursts of fetches would be lost. Only fetches into the
// innermost cache are carried out where the translation of the address is not at hand.

#ifndef JAX_NSA_CPU_FETCH_H_
#define JAX_NSA_CPU_FETCH_H_

#include <cstdint>

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes

// Rows that are worked on at once, and as many are fetched meanwhile: what is fetched must fit into
// the innermost cache beside what is worked on.
constexpr int64_t kGranule = 16;

inline void FetchLine(const char* at) { __builtin_prefetch(at, 0, 3); }

// The share of a step in fetching `count` rows, where a step works on `bytes` bytes of as many.
template <int count, int bytes>
inline void FetchStep(const char* const* rows, int64_t step) {
  constexpr int kSteps = bytes < kLine ? kLine / bytes : 1;  // in which a line of each is due
  constexpr int kAtOnce = (count + kSteps - 1) / kSteps;
  const int64_t offset = step / kSteps * kSteps * bytes;
#pragma GCC unroll 8
  for (int i = 0; i < kAtOnce; ++i) {
    const int64_t row = step % kSteps * kAtOnce + i;
    if (count % kSteps == 0 || row < count) FetchLine(rows[row] + offset);
  }
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_FETCH_H_
