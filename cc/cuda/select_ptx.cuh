// Machine instructions of the selected branch's kernel alone; ptx.cuh has those of all.

#ifndef JAX_NSA_CUDA_SELECT_PTX_CUH_
#define JAX_NSA_CUDA_SELECT_PTX_CUH_

#include <cstdint>

namespace jax_nsa::cuda {

// Waits for `threads` threads, whole warps, that come to this barrier, which is not 0. (Numbers
// that only the running kernel knew would take all barriers that there are.)
template <int kBarrier>
__device__ inline void SyncSome(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// Of two threads that each store, come here, and then load what the other stored, one at least
// sees it.
__device__ inline void FenceStoresAndLoads() { asm volatile("fence.sc.gpu;" ::: "memory"); }

__device__ inline uint64_t LoadAcquire(const uint64_t* from) {
  uint64_t found;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(from) : "memory");
  return found;
}

// Waits until the kernel queued before this one is through and its results are seen, if this one
// may begin before.
__device__ inline void AwaitKernelBefore() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Loads what other thread blocks have stored in this launch: never from the first-level cache.
__device__ inline float LoadShared(const float* from) { return __ldcg(from); }
__device__ inline float4 LoadShared(const float4* from) { return __ldcg(from); }

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECT_PTX_CUH_
