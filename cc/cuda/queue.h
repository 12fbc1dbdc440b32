// Decoded calls to kernels on a stream, for handlers of one call and for that of a whole step.

#ifndef JAX_NSA_CUDA_QUEUE_H_
#define JAX_NSA_CUDA_QUEUE_H_

#include <cuda_runtime_api.h>

#include "compress_attention_call.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda {

// Queues the kernel of a call; each defined beside its operator's handler.
xla::ffi::Error Queue(const compress_attention::Call& call, cudaStream_t stream);
// `early`: as select_launch.h's Launch takes it.
xla::ffi::Error Queue(const select_attention::Call& call, bool early, cudaStream_t stream);

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_QUEUE_H_
