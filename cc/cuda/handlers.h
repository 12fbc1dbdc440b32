// What the XLA FFI handlers of all kernels on GPUs share.

#ifndef JAX_NSA_CUDA_HANDLERS_H_
#define JAX_NSA_CUDA_HANDLERS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

// Defines a handler under the name that custom calls know. It queues kernels on the given stream
// and nothing else, so XLA may record it in command buffers.
#define JAX_NSA_CUDA_HANDLER(target, run)                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_##target##_cuda, run,                      \
                                xla::ffi::Ffi::Bind()                              \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                               \
                                    .RemainingRets()                               \
                                    .Attrs(),                                      \
                                {xla::ffi::Traits::kCmdBufferCompatible})

namespace jax_nsa::cuda {

// What a handler says of the start of its operator's kernel.
inline xla::ffi::Error Started(const std::string& operator_name, cudaError_t error) {
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error(
      xla::ffi::ErrorCode::kInternal,
      operator_name + ": the CUDA kernel cannot start: " + cudaGetErrorString(error));
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_HANDLERS_H_
