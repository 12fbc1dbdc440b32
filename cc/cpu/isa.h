// The kernels that this machine can run.

#ifndef JAX_NSA_CPU_ISA_H_
#define JAX_NSA_CPU_ISA_H_

#include <string_view>
#include <vector>

#include "cpu/compress_attention_kernel.h"

namespace jax_nsa::cpu {

// The kernels that this processor and operating system support, best first; never empty.
const std::vector<const Kernel*>& SupportedKernels();

// The supported kernel of that name, the best one if the name is empty, or null.
const Kernel* FindKernel(std::string_view name);

// The instruction set of FindKernel(name), for operators that have no use for tiles: AVX-512 where
// that is AMX. Empty where there is no such kernel.
std::string_view FindVectorIsa(std::string_view name);

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_ISA_H_
