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
  uint64_t* flags = params.flags() + 2 * blockIdx.x;
  flags[0] = 0;
  flags[1] = 0;
}
// By one thread, after all have stored the part.
__device__ inline void RaiseFlag(const Params& params, const Part& part) {
  StoreRelease(params.flags() + part.own_region(), kArrived);
}
// By each warp that reads the parts.
__device__ inline void AwaitFlags(const Params& params, const Part& part) {
#pragma unroll 1
  for (int p = ThreadIndex() % 32; p < part.parts - 1; p += 32) {
    AwaitAcquire(params.flags() + part.Region(p), kArrived);
  }
  __syncwarp();
}
__device__ inline void LowerFlags(const Params& params, const Part& part) {
#pragma unroll 1
  for (int p = ThreadIndex(); p < part.parts - 1; p += kComputeThreads) {
    params.flags()[part.Region(p)] = 0;
  }
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_FLAGS_CUH_
