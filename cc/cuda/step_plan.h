// When a step's second kernel should begin before the first one is through. Decided from shapes and
// the device. Free of CUDA.

#ifndef JAX_NSA_CUDA_STEP_PLAN_H_
#define JAX_NSA_CUDA_STEP_PLAN_H_

#include <cstdint>

#include "paged.h"

namespace jax_nsa::cuda {

// Beginning early pays where each multiprocessor has so many bytes of compressed keys and values to
// read that some are through long before others. Where they have less it costs a little.
constexpr int64_t kLongBytes = 256 << 10;

// By what the compressed branch's table can name: the host does not know lengths.
constexpr bool BeginsEarly(const PagedProblem& compressed, int multiprocessors) {
  const int64_t position = compressed.key_value_heads *
                           (compressed.head_size + compressed.value_size) *
                           ElementSize(compressed.dtype);
  return compressed.sequences * compressed.capacity() * position >= kLongBytes * multiprocessors;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_STEP_PLAN_H_
