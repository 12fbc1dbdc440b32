// What each tile register of Intel AMX holds, as the processor reads it.

#ifndef JAX_NSA_CPU_AMX_CONFIGURATION_H_
#define JAX_NSA_CPU_AMX_CONFIGURATION_H_

#include <cstdint>

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// A palette, and the rows and bytes in a row of each register.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, int64_t tile_rows, int64_t words) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(4 * words);
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_AMX_CONFIGURATION_H_
