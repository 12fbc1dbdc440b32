// The instruction sets that kernels are compiled for and this machine has.

#ifndef JAX_NSA_CPU_ISA_H_
#define JAX_NSA_CPU_ISA_H_

#include <string_view>
#include <vector>

namespace jax_nsa::cpu {

// Those that this processor and operating system support, best first. Empty on processors that are
// neither x86-64 nor aarch64.
const std::vector<std::string_view>& SupportedIsas();

// The supported one of that name, the best one if the name is empty, or an empty one.
std::string_view FindIsa(std::string_view name);

// The same for operators that have no use for tiles: AVX-512 where it is AMX.
std::string_view FindVectorIsa(std::string_view name);

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_ISA_H_
