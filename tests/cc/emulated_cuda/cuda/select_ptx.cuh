// The functions of cc/cuda/select_ptx.cuh in plain C++, on the emulated machine.

#ifndef JAX_NSA_CUDA_SELECT_PTX_CUH_
#define JAX_NSA_CUDA_SELECT_PTX_CUH_

#include <cstdint>

#include "language.h"
#include "machine.h"

namespace jax_nsa::cuda {

template <int kBarrier>
void SyncSome(int threads) {
  emulated_cuda::Sync(kBarrier, threads);
}

inline void AwaitKernelBefore() { emulated_cuda::AwaitKernelBefore(); }

// Stores are seen at once here.
inline void FenceStoresAndLoads() { emulated_cuda::MaybeYield(2); }

inline uint64_t LoadAcquire(const uint64_t* from) {
  emulated_cuda::MaybeYield(2);
  return *from;
}

template <typename T>
T LoadShared(const T* from) {
  return *from;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECT_PTX_CUH_
