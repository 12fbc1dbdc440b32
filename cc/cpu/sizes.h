// Arithmetic that schedulers of several operators share.

#ifndef JAX_NSA_CPU_SIZES_H_
#define JAX_NSA_CPU_SIZES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "paged.h"
#include "rounding.h"

namespace jax_nsa::cpu {

// The factor from products of queries and keys to powers of two. Kernels take the scale's sign, and
// whether it is zero, into account with the queries. Neither end may spoil a difference of nothing
// or of infinity.
inline float ExponentScale(float scale) {
  constexpr float kLog2E = 1.44269504f;
  using Limits = std::numeric_limits<float>;
  if (scale == 0) return 1;
  return std::clamp(std::fabs(scale) * kLog2E, Limits::min(), Limits::max());
}

// Weights are powers of two up to 2^-Headroom: as many products of weights and values as there are
// positions add up to no more than the greatest value, so that no sum leaves the range of float32.
inline float Headroom(int64_t positions) {
  return static_cast<float>(std::ceil(std::log2(std::max<double>(1, positions))));
}

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_SIZES_H_
