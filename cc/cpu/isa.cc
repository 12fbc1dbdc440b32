#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace jax_nsa::cpu {
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

std::vector<std::string_view> Detect() {
#if defined(__x86_64__)
  std::vector<std::string_view> isas;
  if (HasAmx()) isas.push_back("amx");
  if (HasAvx512()) isas.push_back("avx512");
  if (HasAvx2()) isas.push_back("avx2");
  isas.push_back("sse2");
  return isas;
#elif defined(__aarch64__)
  return {"neon"};
#else
  return {};
#endif
}

}  // namespace

const std::vector<std::string_view>& SupportedIsas() {
  static const std::vector<std::string_view> isas = Detect();
  return isas;
}

std::string_view FindIsa(std::string_view name) {
  for (const std::string_view isa : SupportedIsas()) {
    if (name.empty() || name == isa) return isa;
  }
  return {};
}

std::string_view FindVectorIsa(std::string_view name) {
  const std::string_view isa = FindIsa(name);
  return isa == "amx" ? "avx512" : isa;
}

}  // namespace jax_nsa::cpu
