// From sums over tiles to results, as both attention kernels have them.

#ifndef JAX_NSA_CUDA_RESULTS_CUH_
#define JAX_NSA_CUDA_RESULTS_CUH_

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "paged.h"

namespace jax_nsa::cuda {

// Exponentials are at most 2^-Headroom, so that as many times the greatest values are still finite
// when they are added up, before the division. With float16 no sum is too great, and its
// exponentials would vanish.
JAX_NSA_HOST_DEVICE constexpr float Headroom(DataType dtype) {
  return dtype == DataType::kFloat16 ? 0.0f : 22.0f;
}

// exp2(a - b); 0 where b is -inf, as where nothing was seen, so that -inf - -inf makes no NaN.
__device__ inline float Shrink(float a, float b) { return b == -INFINITY ? 0.0f : Exp2(a - b); }

// Of a row's total of exponentials, which is 0 where it sees nothing.
__device__ inline float InverseOf(float total) { return total == 0.0f ? 0.0f : Inverse(total); }
__device__ inline float LogSumExp(float maximum, float total, float headroom) {
  constexpr float kLn2 = 0.6931471805599453f;
  return total == 0.0f ? -INFINITY : (maximum + (log2f(total) + headroom)) * kLn2;
}

// Writes up to four columns of a row.
template <typename T>
__device__ inline void StoreColumns(T* to, const float (&x)[4], int columns) {
  if (columns >= 4 && reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T)) == 0) {
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
    } else {
      *reinterpret_cast<uint2*>(to) = {Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3])};
    }
  } else {
    for (int c = 0; c < 4; ++c) {
      if (c < columns) to[c] = static_cast<T>(x[c]);
    }
  }
}

// Writes four columns of row `row` of attention [rows, size], as far as they exist.
template <typename T>
__device__ inline void StoreAttentionRow(void* attention, DataType dtype, int64_t row, int size,
                                         int column, const float (&x)[4]) {
  const int64_t at = row * size + column;
  if (dtype == DataType::kFloat32) {
    StoreColumns(static_cast<float*>(attention) + at, x, size - column);
  } else {
    StoreColumns(static_cast<T*>(attention) + at, x, size - column);
  }
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_RESULTS_CUH_
