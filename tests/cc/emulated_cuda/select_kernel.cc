// cc/cuda/select_kernel.cu, compiled for the emulated machine.

#include "cuda_runtime_api.h"
#include "language.h"
#include "machine.h"

namespace jax_nsa::cuda::select {

// The shared memory that the kernel declares: the most that a device has.
alignas(1024) char memory[232448];

}  // namespace jax_nsa::cuda::select

#include "cuda/select_kernel.cu"

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  using jax_nsa::cuda::select::Params;
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const Params& params = *static_cast<const Params*>(arguments[0]);
  emulated_cuda::Launch(config->gridDim.x, config->blockDim.x, jax_nsa::cuda::select::memory,
                        static_cast<int>(config->dynamicSmemBytes), false, config->numAttrs > 0,
                        [&] { function(params); });
  return cudaSuccess;
}
