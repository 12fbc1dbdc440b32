#include "cpu/select_isa.h"

#include "cpu/isa.h"

namespace jax_nsa::cpu {

// Each is select_kernel.cc, compiled for one instruction set. Rows in any order suit no tiles: AMX
// machines run that of AVX-512.
#if defined(__x86_64__)
namespace sse2 {
extern const select::Kernel kSelectKernel;
}
namespace avx2 {
extern const select::Kernel kSelectKernel;
}
namespace avx512 {
extern const select::Kernel kSelectKernel;
}
#elif defined(__aarch64__)
namespace neon {
extern const select::Kernel kSelectKernel;
}
#endif

namespace select {

const Kernel* FindKernel(std::string_view name) {
  [[maybe_unused]] const std::string_view isa = FindVectorIsa(name);
#if defined(__x86_64__)
  if (isa == "sse2") return &sse2::kSelectKernel;
  if (isa == "avx2") return &avx2::kSelectKernel;
  if (isa == "avx512") return &avx512::kSelectKernel;
#elif defined(__aarch64__)
  if (isa == "neon") return &neon::kSelectKernel;
#endif
  return nullptr;
}

}  // namespace select
}  // namespace jax_nsa::cpu
