// The choice of blocks by their importance.

#ifndef JAX_NSA_CPU_TOP_BLOCKS_H_
#define JAX_NSA_CPU_TOP_BLOCKS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/compress_attention_kernel.h"

namespace jax_nsa::cpu::compressed {

// A block as a number that is greater than that of another if it goes before, as selection.h
// orders them.
using RankedBlock = uint64_t;

inline RankedBlock Rank(float importance, int64_t index) {
  // Floats that are not negative are ordered as the integers of their bits; NaN is below them.
  uint32_t bits = 0;
  if (importance >= 0) {
    std::memcpy(&bits, &importance, sizeof bits);
    ++bits;
  }
  return RankedBlock{bits} << 32 | ~static_cast<uint32_t>(index);
}

// Writes the indices of the most important of `count` blocks, padded with -1. `heap` is memory for
// as many as are chosen.
inline void SelectBlocks(const float* importance, int64_t count, const Problem& problem,
                         std::vector<RankedBlock>& heap, int32_t* indices) {
  const int64_t k = problem.select_count;
  const auto ranked = [&](int64_t j) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    return Rank(problem.forced.Has(j, count) ? kInfinity : importance[j], j);
  };
  const std::greater<RankedBlock> before;
  heap.clear();
  for (int64_t j = 0; j < std::min(k, count); ++j) heap.push_back(ranked(j));
  std::make_heap(heap.begin(), heap.end(), before);
  for (int64_t j = k; j < count; ++j) {
    const RankedBlock block = ranked(j);
    if (!before(block, heap.front())) continue;
    std::pop_heap(heap.begin(), heap.end(), before);
    heap.back() = block;
    std::push_heap(heap.begin(), heap.end(), before);
  }
  std::sort_heap(heap.begin(), heap.end(), before);
  for (int64_t n = 0; n < k; ++n) indices[n] = n < count ? static_cast<int32_t>(~heap[n]) : -1;
}

}  // namespace jax_nsa::cpu::compressed

#endif  // JAX_NSA_CPU_TOP_BLOCKS_H_
