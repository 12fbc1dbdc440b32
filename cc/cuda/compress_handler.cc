// The XLA FFI handler of compression's CUDA kernel.

#include <cuda_runtime_api.h>

#include "compress_call.h"
#include "cuda/compress_launch.h"
#include "cuda/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda::compress {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attributes) {
  const ffi::ErrorOr<jax_nsa::compress::Call> call =
      jax_nsa::compress::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  return Started("nsa_compress_infer", Launch(call->problem, call->arrays, stream));
}

}  // namespace
}  // namespace jax_nsa::cuda::compress

JAX_NSA_CUDA_HANDLER(compress, jax_nsa::cuda::compress::Run);
