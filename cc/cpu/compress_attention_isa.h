// The kernels of the compressed branch that this machine can run.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_ISA_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_ISA_H_

#include <string_view>

#include "cpu/compress_attention_kernel.h"

namespace jax_nsa::cpu::compressed {

// The kernel for the instruction set FindIsa(name), or null.
const Kernel* FindKernel(std::string_view name);

}  // namespace jax_nsa::cpu::compressed

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_ISA_H_
