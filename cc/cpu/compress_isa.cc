#include "cpu/compress_isa.h"

#include "cpu/isa.h"

namespace jax_nsa::cpu {

// Each is compress_kernel.cc, compiled for one instruction set. Sums have no use for tiles: AMX
// machines run that of AVX-512.
#if defined(__x86_64__)
namespace sse2 {
extern const compress::Kernel kCompressKernel;
}
namespace avx2 {
extern const compress::Kernel kCompressKernel;
}
namespace avx512 {
extern const compress::Kernel kCompressKernel;
}
#elif defined(__aarch64__)
namespace neon {
extern const compress::Kernel kCompressKernel;
}
#endif

namespace compress {

Kernel FindKernel(std::string_view name) {
  [[maybe_unused]] const std::string_view isa = FindVectorIsa(name);
#if defined(__x86_64__)
  if (isa == "sse2") return sse2::kCompressKernel;
  if (isa == "avx2") return avx2::kCompressKernel;
  if (isa == "avx512") return avx512::kCompressKernel;
#elif defined(__aarch64__)
  if (isa == "neon") return neon::kCompressKernel;
#endif
  return nullptr;
}

}  // namespace compress
}  // namespace jax_nsa::cpu
