// The tile instructions of Intel AMX. Tests put emulated ones in the place of this file.

#ifndef JAX_NSA_CPU_AMX_INSTRUCTIONS_H_
#define JAX_NSA_CPU_AMX_INSTRUCTIONS_H_

#include <cstdint>

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// What each tile register holds: its palette, rows and bytes in a row.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, int64_t tile_rows, int64_t words) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(4 * words);
  }
};

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
