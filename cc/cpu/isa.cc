#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace jax_nsa::cpu {

// Each is compress_attention_kernel.cc, compiled for one instruction set.
#if defined(__x86_64__)
namespace sse2 {
extern const Kernel kKernel;
}
namespace avx2 {
extern const Kernel kKernel;
}
namespace avx512 {
extern const Kernel kKernel;
}
namespace amx {
extern const Kernel kKernel;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernel kKernel;
}
#endif

namespace {

#if defined(__x86_64__)
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

// Tiles need the processor's support, and the system's leave to use their registers.
bool HasAmx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kTileBFloat16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  if (!HasAvx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kTile | kTileBFloat16)) != (kTile | kTileBFloat16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernel*> Detect() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  if (HasAmx()) kernels.push_back(&amx::kKernel);
  if (HasAvx512()) kernels.push_back(&avx512::kKernel);
  if (HasAvx2()) kernels.push_back(&avx2::kKernel);
  kernels.push_back(&sse2::kKernel);
#elif defined(__aarch64__)
  kernels.push_back(&neon::kKernel);
#endif
  return kernels;
}

}  // namespace

const std::vector<const Kernel*>& SupportedKernels() {
  static const std::vector<const Kernel*> kernels = Detect();
  return kernels;
}

const Kernel* FindKernel(std::string_view name) {
  for (const Kernel* kernel : SupportedKernels()) {
    if (name.empty() || name == kernel->name) return kernel;
  }
  return nullptr;
}

std::string_view FindVectorIsa(std::string_view name) {
  const Kernel* const found = FindKernel(name);
  if (found == nullptr) return {};
  const std::string_view isa = found->name;
  return isa == "amx" ? "avx512" : isa;
}

}  // namespace jax_nsa::cpu
