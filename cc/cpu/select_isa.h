// The kernels of the selected branch that this machine can run.

#ifndef JAX_NSA_CPU_SELECT_ISA_H_
#define JAX_NSA_CPU_SELECT_ISA_H_

#include <string_view>

#include "cpu/select_kernel.h"

namespace jax_nsa::cpu::select {

// The kernel for the instruction set of FindVectorIsa(name), or null.
const Kernel* FindKernel(std::string_view name);

}  // namespace jax_nsa::cpu::select

#endif  // JAX_NSA_CPU_SELECT_ISA_H_
