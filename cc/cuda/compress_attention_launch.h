// Starts the kernel on a stream.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_LAUNCH_H_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "compress_attention.h"

namespace jax_nsa::cuda::compressed {

using compress_attention::Arrays;
using compress_attention::Problem;

// Why the kernel cannot serve a legal problem, or null if it can.
const char* Refuses(const Problem& problem);

// Queues the computation on `stream` of the current device: one kernel, nothing else. `workspace`
// lies on the device and may hold anything; compress_attention_plan.h's WorkspaceBytes says how
// large it must be.
cudaError_t Launch(const Problem& problem, const Arrays& arrays, void* workspace,
                   int64_t workspace_bytes, cudaStream_t stream);

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_LAUNCH_H_
