// The CPU kernels of the compressed branch that this machine can run: those of the product, and one
// whose tiles are emulated.

#ifndef JAX_NSA_TESTS_COMPRESS_ATTENTION_CPU_KERNELS_H_
#define JAX_NSA_TESTS_COMPRESS_ATTENTION_CPU_KERNELS_H_

#include <string_view>
#include <vector>

#include "cpu/compress_attention_isa.h"
#include "cpu/compress_attention_kernel.h"
#include "cpu/isa.h"

namespace jax_nsa::cpu {

// compress_attention_kernel.cc with the tiles of emulated_amx_instructions.h, where the machine has
// AVX-512 BF16 for the rest.
#if defined(JAX_NSA_EMULATED_AMX)
namespace emulated_amx {
extern const compressed::Kernel kCompressedKernel;
}
#endif

namespace compressed {

inline std::vector<const Kernel*> Kernels() {
  std::vector<const Kernel*> kernels;
  for (const std::string_view isa : SupportedIsas()) kernels.push_back(FindKernel(isa));
#if defined(JAX_NSA_EMULATED_AMX)
  if (!FindIsa("avx512").empty()) kernels.push_back(&emulated_amx::kCompressedKernel);
#endif
  return kernels;
}

}  // namespace compressed
}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_TESTS_COMPRESS_ATTENTION_CPU_KERNELS_H_
