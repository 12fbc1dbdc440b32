// The kernels of compression that this machine can run.

#ifndef JAX_NSA_CPU_COMPRESS_ISA_H_
#define JAX_NSA_CPU_COMPRESS_ISA_H_

#include <string_view>

#include "cpu/compress_kernel.h"

namespace jax_nsa::cpu::compress {

// The kernel for the instruction set of FindVectorIsa(name), or null.
Kernel FindKernel(std::string_view name);

}  // namespace jax_nsa::cpu::compress

#endif  // JAX_NSA_CPU_COMPRESS_ISA_H_
