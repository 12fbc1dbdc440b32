// The XLA FFI handler of a whole decode step: the compressed branch and the branch that reads the
// blocks which that one chooses, in one custom call, so that XLA has nothing to do in between, and
// the second kernel may begin before the first one is through.

#include <cuda_runtime_api.h>

#include "cuda/handlers.h"
#include "cuda/queue.h"
#include "cuda/step_plan.h"
#include "step_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda {
namespace {

namespace ffi = xla::ffi;

cudaError_t FindMultiprocessors(int* count) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attributes) {
  const ffi::ErrorOr<step::Call> call = step::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  int multiprocessors = 0;
  if (cudaError_t error = FindMultiprocessors(&multiprocessors); error != cudaSuccess) {
    return Started("nsa_decode_step", error);
  }
  ffi::Error error = Queue(call->compressed, stream);
  if (error.success()) {
    const bool early = BeginsEarly(call->compressed.problem, multiprocessors);
    error = Queue(call->chosen, early, stream);
  }
  if (error.success() && call->window) error = Queue(*call->window, /*early=*/false, stream);
  return error;
}

}  // namespace
}  // namespace jax_nsa::cuda

JAX_NSA_CUDA_HANDLER(step, jax_nsa::cuda::Run);
