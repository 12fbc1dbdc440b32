// The XLA FFI handler of a whole decode step: the compressed branch and the branch that reads the
// blocks which that one chooses, in one custom call, so that XLA has nothing to do in between, and
// the second kernel may begin before the first one is through.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/handlers.h"
#include "cuda/started.h"
#include "ffi_call.h"
#include "parts.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda {
namespace {

namespace ffi = xla::ffi;

constexpr char kName[] = "nsa_decode_step";

// Beginning early pays where each multiprocessor has so many bytes of compressed keys and values to
// read that some are through long before others. Where they have less it costs a little.
constexpr int64_t kLongBytes = 256 << 10;

ffi::Error Refused(const std::string& message) {
  return InvalidArgument(std::string(kName) + ": " + message);
}

bool IsLong(const compress_attention::Problem& problem, int multiprocessors) {
  const int64_t element = problem.dtype == DataType::kFloat32 ? 4 : 2;
  const int64_t position =
      problem.key_value_heads * (problem.head_size + problem.value_size) * element;
  return problem.sequences * problem.capacity() * position >= kLongBytes * multiprocessors;
}

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attributes) {
  Parts parts(args, rets, attributes);
  const auto decode_reading = [&parts](const char* prefix, const Part* earlier) {
    const Part part = parts.Next(prefix, earlier);
    return select_attention::Decode(part.args, part.rets, part.attributes);
  };
  const Part first = parts.Next("compressed_");
  const auto compressed = compress_attention::Decode(first.args, first.rets, first.attributes);
  if (compressed.has_error()) return compressed.error();
  const auto chosen = decode_reading("chosen_", &first);
  if (chosen.has_error()) return chosen.error();
  if (chosen->arrays.topk_indices != compressed->arrays.topk_indices) {
    return Refused("the blocks that are read are not those that are chosen");
  }
  std::optional<select_attention::Call> window;  // where it has pools of its own
  if (!parts.Done()) {
    const auto decoded = decode_reading("window_", nullptr);
    if (decoded.has_error()) return decoded.error();
    window = *decoded;
  }
  if (!parts.Done()) return Refused("there are arrays that belong to none of its branches");

  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return Started(kName, error);
  ffi::Error failed = Queue(*compressed, stream);
  if (failed.success()) {
    failed = Queue(*chosen, /*early=*/IsLong(compressed->problem, multiprocessors), stream);
  }
  if (failed.success() && window) failed = Queue(*window, /*early=*/false, stream);
  return failed;
}

}  // namespace
}  // namespace jax_nsa::cuda

// Kernels on the given stream and nothing else, so XLA may record them in command buffers.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_step_cuda, jax_nsa::cuda::Run,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
