#include "cpu/compress_attention_isa.h"

#include "cpu/isa.h"

namespace jax_nsa::cpu {

// Each is compress_attention_kernel.cc, compiled for one instruction set.
#if defined(__x86_64__)
namespace sse2 {
extern const compressed::Kernel kCompressedKernel;
}
namespace avx2 {
extern const compressed::Kernel kCompressedKernel;
}
namespace avx512 {
extern const compressed::Kernel kCompressedKernel;
}
namespace amx {
extern const compressed::Kernel kCompressedKernel;
}
#elif defined(__aarch64__)
namespace neon {
extern const compressed::Kernel kCompressedKernel;
}
#endif

namespace compressed {

const Kernel* FindKernel(std::string_view name) {
  [[maybe_unused]] const std::string_view isa = FindIsa(name);
#if defined(__x86_64__)
  if (isa == "sse2") return &sse2::kCompressedKernel;
  if (isa == "avx2") return &avx2::kCompressedKernel;
  if (isa == "avx512") return &avx512::kCompressedKernel;
  if (isa == "amx") return &amx::kCompressedKernel;
#elif defined(__aarch64__)
  if (isa == "neon") return &neon::kCompressedKernel;
#endif
  return nullptr;
}

}  // namespace compressed
}  // namespace jax_nsa::cpu
