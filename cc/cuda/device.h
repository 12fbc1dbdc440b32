// Which of an operator's kernels serves a call, and what a launch needs to know of a device.

#ifndef JAX_NSA_CUDA_DEVICE_H_
#define JAX_NSA_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "paged.h"

namespace jax_nsa::cuda {

// A kernel, compiled for head sizes up to its own; smaller ones are padded with zeros in shared
// memory.
struct KernelOf {
  DataType dtype;
  int head_size, value_size;
  const void* function;
};

// The first that fits.
template <typename Kernel, size_t kCount>
const Kernel& ChooseKernel(const Kernel (&kernels)[kCount], const PagedProblem& problem) {
  for (const Kernel& kernel : kernels) {
    if (kernel.dtype == problem.dtype && kernel.head_size >= problem.head_size &&
        kernel.value_size >= problem.value_size) {
      return kernel;
    }
  }
  std::abort();  // each list's last kernels have the sizes that decoding lets through
}

inline bool IsAligned(const void* array, int64_t row_size, DataType dtype) {
  return reinterpret_cast<uintptr_t>(array) % 16 == 0 && row_size * ElementSize(dtype) % 16 == 0;
}

struct Device {
  std::once_flag once;
  cudaError_t error = cudaSuccess;
  int multiprocessors = 0;
  int shared_bytes = 0;       // that a thread block can have
  bool has_engine = false;    // that copies boxes (tensor_map.h)
  bool starts_early = false;  // kernels before those queued before them end
};

// The current device, these kernels allowed all shared memory that there is.
template <typename Kernel, size_t kCount>
cudaError_t FindDevice(const Kernel (&kernels)[kCount], const Device** found) {
  constexpr int kMaxDevices = 64;
  static Device devices[kMaxDevices];
  int id = 0;
  if (cudaError_t error = cudaGetDevice(&id); error != cudaSuccess) return error;
  if (id >= kMaxDevices) return cudaErrorInvalidDevice;
  Device& device = devices[id];
  std::call_once(device.once, [&] {
    const auto check = [&](cudaError_t error) {
      if (device.error == cudaSuccess) device.error = error;
    };
    int major = 0, driver = 0;
    check(cudaDriverGetVersion(&driver));
    check(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id));
    check(
        cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
    device.has_engine = major >= 9;
    // Drivers before CUDA 12.3 cannot record such a start in a graph.
    device.starts_early = major >= 9 && driver >= 12030;
    for (const Kernel& kernel : kernels) {
      check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_bytes));
    }
  });
  *found = &device;
  return device.error;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_DEVICE_H_
