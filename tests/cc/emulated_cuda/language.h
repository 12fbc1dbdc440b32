// The words, types and functions that CUDA C++ has beyond C++, as far as cc/cuda uses them.

#ifndef JAX_NSA_TESTS_EMULATED_CUDA_LANGUAGE_H_
#define JAX_NSA_TESTS_EMULATED_CUDA_LANGUAGE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __device__
#define __global__
#define __grid_constant__
#define __shared__
#define __launch_bounds__(...)

using std::isnan;
using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

namespace emulated_cuda {

template <typename To, typename From>
To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulated_cuda

inline uint32_t __float_as_uint(float x) { return emulated_cuda::BitCast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulated_cuda::BitCast<float>(x); }
inline float __int_as_float(int x) { return emulated_cuda::BitCast<float>(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}

// 16-bit floating types: conversions round to the nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t whole = __float_as_uint(x);
    bits = static_cast<uint16_t>(x != x ? 0x7fff : (whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __uint_as_float(uint32_t{bits} << 16); }
};

struct __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) {
    const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000;
    const float magnitude = std::fabs(x);
    uint32_t half;
    if (x != x) {
      half = 0x7fff;
    } else if (magnitude >= 65520.0f) {
      half = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
      half = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
    } else {
      const uint32_t whole = __float_as_uint(magnitude) - (112u << 23);
      half = (whole + 0xfff + (whole >> 13 & 1)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  explicit operator float() const {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent == 0
                                ? mantissa * 0x1p-24f
                                : __uint_as_float((exponent + 112u) << 23 | mantissa << 13);
    return bits >> 15 ? -magnitude : magnitude;
  }
};

// Warps. All lanes take part in all that cc/cuda does.

namespace emulated_cuda {

template <typename T>
struct Shuffled {
  T value;
  int source;
  T result;
};

template <typename T>
void Shuffle(Shuffled<T>* const (&lanes)[kLanes]) {
  for (Shuffled<T>* lane : lanes) lane->result = lanes[lane->source]->value;
}

template <typename T>
T ShuffleFrom(unsigned mask, T value, int source) {
  Require(mask == ~0u, "some lanes only");
  Shuffled<T> own = {value, source, {}};
  Together<&Shuffle<T>>("shfl", own);
  return own.result;
}

struct Reduced {
  uint32_t value, result;
};

enum class Reduction { kAnd, kOr, kAdd, kMin, kMax };

template <Reduction kReduction>
void Reduce(Reduced* const (&lanes)[kLanes]) {
  uint32_t result = lanes[0]->value;
  for (int i = 1; i < kLanes; ++i) {
    const uint32_t value = lanes[i]->value;
    result = kReduction == Reduction::kAnd   ? result & value
             : kReduction == Reduction::kOr  ? result | value
             : kReduction == Reduction::kAdd ? result + value
             : kReduction == Reduction::kMin ? min(result, value)
                                             : max(result, value);
  }
  for (Reduced* lane : lanes) lane->result = result;
}

template <Reduction kReduction>
uint32_t ReduceAll(unsigned mask, uint32_t value) {
  Require(mask == ~0u, "some lanes only");
  Reduced own = {value, 0};
  Together<&Reduce<kReduction>>("a reduction", own);
  return own.result;
}

inline int Lane() { return threadIdx.x % kLanes; }

}  // namespace emulated_cuda

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulated_cuda::ShuffleFrom(mask, value, lane % emulated_cuda::kLanes);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulated_cuda::ShuffleFrom(mask, value, emulated_cuda::Lane() ^ step);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  const int lane = emulated_cuda::Lane();
  return emulated_cuda::ShuffleFrom(mask, value, lane < step ? lane : lane - step);
}
inline bool __any_sync(unsigned mask, bool value) {
  return emulated_cuda::ReduceAll<emulated_cuda::Reduction::kOr>(mask, value) != 0;
}
inline bool __all_sync(unsigned mask, bool value) {
  return emulated_cuda::ReduceAll<emulated_cuda::Reduction::kAnd>(mask, value) != 0;
}
inline uint32_t __reduce_add_sync(unsigned mask, uint32_t value) {
  return emulated_cuda::ReduceAll<emulated_cuda::Reduction::kAdd>(mask, value);
}
inline uint32_t __reduce_min_sync(unsigned mask, uint32_t value) {
  return emulated_cuda::ReduceAll<emulated_cuda::Reduction::kMin>(mask, value);
}
inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  return emulated_cuda::ReduceAll<emulated_cuda::Reduction::kMax>(mask, value);
}
inline void __syncwarp() { __any_sync(~0u, false); }

inline void __syncthreads() { emulated_cuda::Sync(0, 0); }

// Memory. Fences order nothing here, but others may go on at them.

inline void __threadfence_block() { emulated_cuda::MaybeYield(2); }

template <typename T>
T atomicAdd(T* to, int value) {
  emulated_cuda::MaybeYield(8);
  const T before = *to;
  *to += value;
  return before;
}
inline uint32_t atomicInc(uint32_t* to, uint32_t most) {
  emulated_cuda::MaybeYield(8);
  const uint32_t before = *to;
  *to = before >= most ? 0 : before + 1;
  return before;
}

#endif  // JAX_NSA_TESTS_EMULATED_CUDA_LANGUAGE_H_
