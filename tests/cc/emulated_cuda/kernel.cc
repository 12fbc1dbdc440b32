// cc/cuda/compress_attention_kernel.cu, compiled for the emulated machine.

#include "cuda_runtime_api.h"
#include "language.h"
#include "machine.h"

namespace jax_nsa::cuda::compressed {

// The shared memory that the kernel declares: the most that a device has.
alignas(1024) char memory[232448];

}  // namespace jax_nsa::cuda::compressed

#include "cuda/compress_attention_kernel.cu"

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulated_cuda::current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const emulated_cuda::Device& found = emulated_cuda::kDevices[device];
  *value = attribute == cudaDevAttrMultiProcessorCount            ? found.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? found.shared_bytes
                                                                  : found.major;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
  using jax_nsa::cuda::compressed::Params;
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const Params& params = *static_cast<const Params*>(arguments[0]);
  emulated_cuda::Launch(grid.x, block.x, jax_nsa::cuda::compressed::memory,
                        static_cast<int>(shared_bytes), true, false, [&] { function(params); });
  return cudaSuccess;
}
