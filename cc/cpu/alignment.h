#ifndef JAX_NSA_CPU_ALIGNMENT_H_
#define JAX_NSA_CPU_ALIGNMENT_H_

#include <cstdint>

namespace jax_nsa::cpu {

constexpr int64_t kAlignment = 64;  // bytes; of scratch memory, of partials, and of what is kept

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_ALIGNMENT_H_
