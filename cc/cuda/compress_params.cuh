// What compression's kernel is launched with.

#ifndef JAX_NSA_CUDA_COMPRESS_PARAMS_CUH_
#define JAX_NSA_CUDA_COMPRESS_PARAMS_CUH_

#include <cstdint>

#include "cuda/compress_launch.h"

namespace jax_nsa::cuda::compress {

// A *chunk* is the columns of one input that a warp sums at a time.
struct Params {
  Problem problem;
  Arrays arrays;
  bool aligned[kMaxPairs];    // whether 16 bytes are columns of one head, at a multiple of 16 bytes
  int64_t chunks[kMaxPairs];  // of each input
  int64_t warps;              // all sequences' chunks of all inputs

  __device__ int64_t chunks_per_sequence() const { return chunks[0] + chunks[1]; }
};

}  // namespace jax_nsa::cuda::compress

#endif  // JAX_NSA_CUDA_COMPRESS_PARAMS_CUH_
