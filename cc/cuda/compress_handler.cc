// The XLA FFI handler of compression's CUDA kernel.

#include <cuda_runtime_api.h>

#include "compress_call.h"
#include "cuda/compress_launch.h"
#include "cuda/started.h"
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

// One kernel on the given stream and nothing else, so XLA may record it in command buffers.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_compress_cuda, jax_nsa::cuda::compress::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
