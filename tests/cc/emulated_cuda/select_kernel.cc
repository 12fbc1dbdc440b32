// cc/cuda/select_kernel.cu, compiled for the emulated machine.

#include "cuda_runtime_api.h"
#include "language.h"
#include "machine.h"

namespace jax_nsa::cuda::select {

// The shared memory that the kernel declares: the most that a device has.
alignas(1024) char memory[232448];

}  // namespace jax_nsa::cuda::select

#include "cuda/select_kernel.cu"

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  using jax_nsa::cuda::select::Params;
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const Params& params = *static_cast<const Params*>(arguments[0]);
  emulated_cuda::Launch(grid.x, block.x, jax_nsa::cuda::select::memory,
                        static_cast<int>(shared_bytes), false, [&] { function(params); });
  return cudaSuccess;
}
