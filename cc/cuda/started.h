// What a handler says of the start of its operator's kernel.

#ifndef JAX_NSA_CUDA_STARTED_H_
#define JAX_NSA_CUDA_STARTED_H_

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda {

inline xla::ffi::Error Started(const std::string& operator_name, cudaError_t error) {
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error(
      xla::ffi::ErrorCode::kInternal,
      operator_name + ": the CUDA kernel cannot start: " + cudaGetErrorString(error));
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_STARTED_H_
