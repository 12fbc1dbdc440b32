// Division that rounds up, for sizes that are not negative.

#ifndef JAX_NSA_ROUNDING_H_
#define JAX_NSA_ROUNDING_H_

#include <cstdint>

namespace jax_nsa {

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t n, int64_t multiple) { return CeilDiv(n, multiple) * multiple; }

}  // namespace jax_nsa

#endif  // JAX_NSA_ROUNDING_H_
