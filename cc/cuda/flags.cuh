// Flags by which the parts of a cut item tell that they are in their regions
// (compress_attention_plan.h).

#ifndef JAX_NSA_CUDA_FLAGS_CUH_
#define JAX_NSA_CUDA_FLAGS_CUH_

#include <cstdint>

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// The workspace comes uninitialised, so arrivals cannot be counted. Each part but the last raises
// its flag to a value that hardly any garbage holds; the thread block of the last one, which has
// seen all of them, takes them down. All run at once, as the launch is cooperative, and none waits
// before it has raised its own flags.
//
// A flag may still be found raised when a launch begins: a line that some other call discarded
// holds what memory held before, and that is anything. So each thread block first takes down its
// own, long before anyone, at the end of a share, looks for them.
constexpr uint64_t kArrived = 0x6a61785f6e736121ull;

// By the thread that raises them.
__device__ inline void LowerOwnFlags(const Params& params) {
  for (uint64_t* flags : {params.flags(), params.importance_flags()}) {
    flags[2 * blockIdx.x] = 0;
    flags[2 * blockIdx.x + 1] = 0;
  }
}
// By one thread, after all have stored what the flag tells of.
__device__ inline void RaiseFlag(const Part& part, uint64_t* flags) {
  StoreRelease(flags + part.own_region(), kArrived);
}
// By each warp that reads what the first `parts` parts have stored.
__device__ inline void AwaitFlags(const Part& part, int parts, const uint64_t* flags) {
#pragma unroll 1
  for (int p = ThreadIndex() % 32; p < parts; p += 32) {
    AwaitAcquire(flags + part.Region(p), kArrived);
  }
  __syncwarp();
}
// By all consumers, when all of them have seen the flags of the first `parts` parts.
__device__ inline void LowerFlags(const Part& part, int parts, uint64_t* flags) {
#pragma unroll 1
  for (int p = ThreadIndex(); p < parts; p += kComputeThreads) flags[part.Region(p)] = 0;
}

// Waits until the parts of a cut item are there. Of a joint item each thread block waits for all of
// them; the last part's flag is raised only now, when the share is through, as until then the
// thread block may have other use for its room for importances.
__device__ inline void AwaitParts(const Params& params, const Part& part, bool is_joint) {
  if (is_joint && part.is_last() && ThreadIndex() == 0) RaiseFlag(part, params.flags());
  AwaitFlags(part, is_joint ? part.parts : part.parts - 1, params.flags());
}
// Tells that the importances of a joint item's part are there. Who finishes the item waits for
// those of all parts; nobody looks at its flags after that.
__device__ inline void ShareImportances(const Params& params, const Part& part) {
  if (!part.finishes()) {
    if (ThreadIndex() == 0) RaiseFlag(part, params.importance_flags());
    return;
  }
  AwaitFlags(part, part.parts - 1, params.importance_flags());
  SyncConsumers();
  LowerFlags(part, part.parts, params.flags());
  LowerFlags(part, part.parts - 1, params.importance_flags());
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_FLAGS_CUH_
