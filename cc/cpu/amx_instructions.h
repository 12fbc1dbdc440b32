// The tile instructions of Intel AMX. Tests put emulated ones in the place of this file.

#ifndef JAX_NSA_CPU_AMX_INSTRUCTIONS_H_
#define JAX_NSA_CPU_AMX_INSTRUCTIONS_H_

#include <cstdint>

#include "cpu/amx_configuration.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

inline void ConfigureTiles(const TileConfiguration& configuration) {
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}

inline void ReleaseTiles() { asm volatile("tilerelease"); }

// `tile` is a register, 0 to 7; strides are in bytes.
template <int tile>
inline void LoadTile(const void* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void StoreTile(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void ClearTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// Adds to tile c, of floats, the product of tiles a and b, of pairs of bfloat16.
template <int c, int a, int b>
inline void MultiplyTiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_AMX_INSTRUCTIONS_H_
