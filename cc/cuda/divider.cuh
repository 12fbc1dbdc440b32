// Division on the device by a number known at launch.

#ifndef JAX_NSA_CUDA_DIVIDER_CUH_
#define JAX_NSA_CUDA_DIVIDER_CUH_

#include <cstdint>

namespace jax_nsa::cuda {

// A multiplication and a shift, for dividends below 2^31.
struct Divider {
  uint32_t multiplier;
  int shift;

  static Divider By(int64_t divisor) {
    int bits = 0;
    while ((int64_t{1} << bits) < divisor) ++bits;
    // ceil(2^(31 + bits) / divisor)
    const uint64_t power = uint64_t{1} << (31 + bits), by = static_cast<uint64_t>(divisor);
    return {static_cast<uint32_t>((power + by - 1) / by), bits - 1};
  }
  __device__ int operator()(int dividend) const {
    const uint64_t product = uint64_t{static_cast<uint32_t>(dividend)} * multiplier;
    return static_cast<int>(product >> (32 + shift));
  }
};

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_DIVIDER_CUH_
