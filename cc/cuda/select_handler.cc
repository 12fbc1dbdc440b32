// The XLA FFI handler of the selected branch's CUDA kernel.

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/handlers.h"
#include "cuda/queue.h"
#include "cuda/select_launch.h"
#include "cuda/select_plan.h"
#include "cuda/workspace.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cuda::select {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
               ffi::Dictionary attributes) {
  ffi::ErrorOr<select_attention::Call> call = select_attention::Decode(args, rets, attributes);
  return call.has_error() ? call.error() : Queue(*call, /*early=*/false, stream);
}

}  // namespace
}  // namespace jax_nsa::cuda::select

xla::ffi::Error jax_nsa::cuda::Queue(const select_attention::Call& call, bool early,
                                     cudaStream_t stream) {
  if (const char* reason = select::Refuses(call.problem)) {
    return xla::ffi::Error(
        xla::ffi::ErrorCode::kInvalidArgument,
        std::string("nsa_select_attention_infer: the CUDA kernel cannot serve ") + reason);
  }
  return Started("nsa_select_attention_infer",
                 select::Launch(call.problem, call.arrays, call.workspace, call.workspace_bytes,
                                early, stream));
}

int64_t jax_nsa::cuda::SelectAttentionWorkspace(const Sizes& sizes) {
  select::Problem problem = {};
  problem.rows = sizes.Rows();
  problem.heads = sizes["h"] * sizes["g"];
  problem.key_value_heads = sizes["h"];
  problem.value_size = sizes["e"];
  problem.page_size = sizes["r"];
  problem.pages_per_sequence = sizes["c"];
  problem.select_block_size = sizes["select_block_size"];
  problem.select_count = sizes.Has("k") ? sizes["k"] : 0;
  problem.window_size = sizes["window_size"];
  return select::WorkspaceBytes(problem);
}

JAX_NSA_CUDA_HANDLER(select_attention, jax_nsa::cuda::select::Run);
