// Starts the selected branch's kernel on a stream.

#ifndef JAX_NSA_CUDA_SELECT_LAUNCH_H_
#define JAX_NSA_CUDA_SELECT_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "select_attention.h"

namespace jax_nsa::cuda::select {

using select_attention::Arrays;
using select_attention::Problem;

// Why the kernel cannot serve a problem that is within paged.h's limits, or null if it can.
const char* Refuses(const Problem& problem);

// Queues the computation on `stream` of the current device: one kernel, nothing else. `workspace`
// lies on the device and may hold anything; select_plan.h's WorkspaceBytes says how large it must
// be.
//
// `early` lets the kernel begin while the one queued before it still runs, where the device can. It
// then attends to windows until that one is through: only topk_indices may be of its results.
cudaError_t Launch(const Problem& problem, const Arrays& arrays, void* workspace,
                   int64_t workspace_bytes, bool early, cudaStream_t stream);

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_LAUNCH_H_
