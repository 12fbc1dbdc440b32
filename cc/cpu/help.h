// What calls have in common whose work any number of threads may take part in.

#ifndef JAX_NSA_CPU_HELP_H_
#define JAX_NSA_CPU_HELP_H_

#include <cstdint>
#include <functional>

namespace jax_nsa::cpu {

// Work that reads less is not given to other threads: waking them costs more.
constexpr int64_t kSerialBytes = 1 << 20;

// Asks so many threads to come, or come back, and work.
using CallHelp = std::function<void(int64_t threads)>;

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_HELP_H_
