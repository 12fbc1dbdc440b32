// The XLA FFI handler of the CUDA kernel.

#include <cuda_runtime_api.h>

#include <string>

#include "compress_attention_call.h"
#include "cuda/compress_attention_launch.h"
#include "cuda/compress_attention_plan.h"
#include "cuda/handlers.h"
#include "cuda/queue.h"
#include "cuda/workspace.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda::compressed {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attributes) {
  ffi::ErrorOr<compress_attention::Call> call = compress_attention::Decode(args, rets, attributes);
  return call.has_error() ? call.error() : Queue(*call, stream);
}

}  // namespace
}  // namespace jax_nsa::cuda::compressed

xla::ffi::Error jax_nsa::cuda::Queue(const compress_attention::Call& call, cudaStream_t stream) {
  if (const char* reason = compressed::Refuses(call.problem)) {
    return xla::ffi::Error(
        xla::ffi::ErrorCode::kInvalidArgument,
        std::string("nsa_compress_attention_infer: the CUDA kernel cannot serve ") + reason);
  }
  return Started(
      "nsa_compress_attention_infer",
      compressed::Launch(call.problem, call.arrays, call.workspace, call.workspace_bytes, stream));
}

int64_t jax_nsa::cuda::CompressAttentionWorkspace(const Sizes& sizes) {
  compressed::Problem problem = {};
  problem.sequences = sizes["b"];
  problem.rows = sizes.Rows();
  problem.tokens = sizes.Has("n") ? 0 : sizes["t"];
  problem.heads = sizes["h"] * sizes["g"];
  problem.key_value_heads = sizes["h"];
  problem.value_size = sizes["e"];
  problem.page_size = sizes["r"];
  problem.pages_per_sequence = sizes["c"];
  problem.select_count = sizes["k"];
  problem.blocks = {sizes["compress_block_size"], sizes["compress_stride"],
                    sizes["select_block_size"], sizes["aligned"] != 0};
  return compressed::WorkspaceBytes(problem);
}

JAX_NSA_CUDA_HANDLER(compress_attention, jax_nsa::cuda::compressed::Run);
