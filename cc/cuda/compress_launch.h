// Starts compression's kernel on a stream.

#ifndef JAX_NSA_CUDA_COMPRESS_LAUNCH_H_
#define JAX_NSA_CUDA_COMPRESS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "compress.h"

namespace jax_nsa::cuda::compress {

using jax_nsa::compress::Arrays;
using jax_nsa::compress::kMaxPairs;
using jax_nsa::compress::Pair;
using jax_nsa::compress::Problem;

// Queues the computation on `stream` of the current device: one kernel, or none where there are no
// sequences.
cudaError_t Launch(const Problem& problem, const Arrays& arrays, cudaStream_t stream);

}  // namespace jax_nsa::cuda::compress

#endif  // JAX_NSA_CUDA_COMPRESS_LAUNCH_H_
