// The tile instructions of cc/cpu/amx_instructions.h in plain loops, so that the kernel that uses
// them is tested on machines that lack them. It takes the place of that file where
// JAX_NSA_EMULATED_AMX is defined.

#ifndef JAX_NSA_TESTS_EMULATED_AMX_INSTRUCTIONS_H_
#define JAX_NSA_TESTS_EMULATED_AMX_INSTRUCTIONS_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/amx_configuration.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

thread_local TileConfiguration configured;
thread_local uint32_t tiles[8][16][16];

inline void Require(bool condition) {
  if (!condition) std::abort();
}

inline void ConfigureTiles(const TileConfiguration& configuration) {
  configured = configuration;
  std::memset(tiles, 0, sizeof tiles);
}

inline void ReleaseTiles() { configured = {}; }

template <int tile>
inline void LoadTile(const void* source, int64_t stride) {
  Require(configured.rows[tile] > 0);
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int row = 0; row < configured.rows[tile]; ++row) {
    std::memcpy(tiles[tile][row], static_cast<const char*>(source) + row * stride,
                configured.row_bytes[tile]);
  }
}

template <int tile>
inline void StoreTile(void* target, int64_t stride) {
  Require(configured.rows[tile] > 0);
  for (int row = 0; row < configured.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(target) + row * stride, tiles[tile][row],
                configured.row_bytes[tile]);
  }
}

template <int tile>
inline void ClearTile() {
  std::memset(tiles[tile], 0, sizeof tiles[tile]);
}

inline float FloatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <int c, int a, int b>
inline void MultiplyTiles() {
  // What the instruction demands; otherwise it faults.
  Require(configured.rows[a] == configured.rows[c]);
  Require(configured.row_bytes[b] == configured.row_bytes[c]);
  Require(configured.rows[b] * 4 == configured.row_bytes[a]);
  for (int m = 0; m < configured.rows[c]; ++m) {
    for (int k = 0; k < configured.row_bytes[a] / 4; ++k) {
      for (int n = 0; n < configured.row_bytes[c] / 4; ++n) {
        float sum = FloatOf(tiles[c][m][n]);
        sum += FloatOf(tiles[a][m][k] << 16) * FloatOf(tiles[b][k][n] << 16);
        sum += FloatOf(tiles[a][m][k] & 0xffff0000) * FloatOf(tiles[b][k][n] & 0xffff0000);
        std::memcpy(&tiles[c][m][n], &sum, sizeof sum);
      }
    }
  }
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_TESTS_EMULATED_AMX_INSTRUCTIONS_H_
