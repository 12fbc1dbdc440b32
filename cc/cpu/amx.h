// The two products of attention, by tiles of bfloat16 (Intel AMX).
//
// A tile product is C[m][n] += sum_k A[m][k] B[k][n], with A of 16 rows of 32 elements, and B of 16
// rows of 16 pairs. Keys are A as they lie in memory, queries B as packed for vectors that do not
// repeat; weights are A transposed, values B as packed for vectors.

#ifndef JAX_NSA_CPU_AMX_H_
#define JAX_NSA_CPU_AMX_H_

#include <cstdint>

#include "cpu/multiply.h"
#if defined(JAX_NSA_EMULATED_AMX)
#include "emulated_amx_instructions.h"
#else
#include "cpu/amx_instructions.h"
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileWords = 16;  // of 4 bytes, in a row of a tile

// Registers 0 to 3 are sums, kA and kB operands. With a panel of fewer than 16 rows, sums and kB
// are as narrow as its scores.
constexpr int kSums = 4, kA = 4, kB = 5;

// Makes the tile registers usable while it lives.
class TileScope {
 public:
  explicit TileScope(int64_t padded_rows) {
    TileConfiguration configuration;
    for (int tile = 0; tile <= kB; ++tile) {
      const int64_t words = tile == kA || padded_rows > kTileWords ? kTileWords : padded_rows;
      configuration.row_bytes[tile] = static_cast<uint16_t>(4 * words);
      configuration.rows[tile] = kTileRows;
    }
    ConfigureTiles(configuration);
  }
  ~TileScope() { ReleaseTiles(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

class AmxTiles {
 public:
  static constexpr int kElements = 2;
  static constexpr int64_t kStepGranule = kTileRows;

  static int64_t Repeat(int64_t) { return 1; }
  static int64_t WordGranule(int64_t) { return kTileWords; }

  static int64_t ScoreSteps(const Keys& keys, int64_t padded_rows) {
    return keys.count / kTileRows * (keys.words / kTileWords) * RowTiles(padded_rows) *
           kStepsOfTile;
  }

  static void Score(const Keys& keys, const Queries& queries, float* scores, Ahead& ahead) {
    const int64_t rows = queries.padded_rows;
    if (rows <= kTileWords) {
      // Up to four tiles of keys share each tile of queries.
      for (int64_t p = 0; p < keys.count; p += kSums * kTileRows) {
        const int64_t tiles = (keys.count - p) / kTileRows;
        ScoreKeys(keys, p, tiles < kSums ? tiles : kSums, queries, scores, ahead);
      }
    } else {
      // A tile of keys meets up to four tiles of queries.
      for (int64_t p = 0; p < keys.count; p += kTileRows) {
        for (int64_t r = 0; r < rows; r += kSums * kTileWords) {
          const int64_t tiles = RowTiles(rows - r);
          ScoreQueries(keys, p, queries, r, tiles < kSums ? tiles : kSums, scores, ahead);
        }
      }
    }
  }

  static int64_t WeighSteps(int64_t rows, int64_t columns, int64_t steps) {
    return RowTiles(rows) * (columns / kTileWords) * ((steps + kTileRows - 1) / kTileRows) *
           kStepsOfTile;
  }

  // As Vectors::Weigh, for a panel of at least 16 padded rows. Weights and values of the steps up
  // to the next multiple of 16 must be zero; sums must hold all padded rows.
  static void Weigh(const Weighing& weighing, int64_t rows, float* sums, Ahead& ahead) {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      alignas(64) uint32_t weights[kMostSteps * kTileWords];
      for (int64_t s = 0; s < weighing.steps; s += kTileRows) {
        TransposeTile(weighing.weights + s * weighing.stride + r, weighing.stride,
                      weights + s * kTileWords);
      }
      for (int64_t c = 0; c < weighing.columns; c += 2 * kTileWords) {
        WeighColumns(weights, weighing, c, sums + r * weighing.columns + c, ahead);
      }
    }
  }

 private:
  static constexpr int64_t kStepsOfTile = 2;  // of Ahead, in the time of a product

  static int64_t RowTiles(int64_t rows) { return (rows + kTileWords - 1) / kTileWords; }

  // Calls the function with the numbers below `count`, as constants.
  template <class Function>
  static inline void ForEach(int64_t count, Function function) {
    function(Constant<0>());
    if (count > 1) function(Constant<1>());
    if (count > 2) function(Constant<2>());
    if (count > 3) function(Constant<3>());
  }

  // `tiles` tiles of keys from key p.
  static void ScoreKeys(const Keys& keys, int64_t p, int64_t tiles, const Queries& queries,
                        float* scores, Ahead& ahead) {
    const int64_t rows = queries.padded_rows;
    ForEach(tiles, [](auto tile) { ClearTile<tile()>(); });
    for (int64_t w = 0; w < keys.words; w += kTileWords) {
      LoadTile<kB>(queries.words + w * rows, 4 * rows);
      ForEach(tiles, [&](auto tile) {
        LoadTile<kA>(keys.first + (p + tile() * kTileRows) * keys.stride + 4 * w, keys.stride);
        MultiplyTiles<tile(), kA, kB>();
        ahead.Step(kStepsOfTile);
      });
    }
    ForEach(tiles, [&](auto tile) {
      StoreTile<tile()>(scores + (p + tile() * kTileRows) * rows, 4 * rows);
    });
  }

  // `tiles` tiles of queries from row r.
  static void ScoreQueries(const Keys& keys, int64_t p, const Queries& queries, int64_t r,
                           int64_t tiles, float* scores, Ahead& ahead) {
    const int64_t rows = queries.padded_rows;
    ForEach(tiles, [](auto tile) { ClearTile<tile()>(); });
    for (int64_t w = 0; w < keys.words; w += kTileWords) {
      LoadTile<kA>(keys.first + p * keys.stride + 4 * w, keys.stride);
      ForEach(tiles, [&](auto tile) {
        LoadTile<kB>(queries.words + w * rows + r + tile() * kTileWords, 4 * rows);
        MultiplyTiles<tile(), kA, kB>();
        ahead.Step(kStepsOfTile);
      });
    }
    ForEach(tiles, [&](auto tile) {
      StoreTile<tile()>(scores + p * rows + r + tile() * kTileWords, 4 * rows);
    });
  }

  // Adds the weighted values of two tiles of columns to those of 16 rows.
  static void WeighColumns(const uint32_t* weights, const Weighing& weighing, int64_t c,
                           float* sums, Ahead& ahead) {
    const int64_t stride = 4 * weighing.columns;
    LoadTile<0>(sums, stride);
    LoadTile<1>(sums + kTileWords, stride);
    for (int64_t s = 0; s < weighing.steps; s += kTileRows) {
      const uint32_t* const values = weighing.values + s * weighing.columns + c;
      LoadTile<kA>(weights + s * kTileWords, 4 * kTileWords);
      LoadTile<2>(values, stride);
      LoadTile<3>(values + kTileWords, stride);
      MultiplyTiles<0, kA, 2>();
      MultiplyTiles<1, kA, 3>();
      ahead.Step(2 * kStepsOfTile);
    }
    StoreTile<0>(sums, stride);
    StoreTile<1>(sums + kTileWords, stride);
  }

  // [16][stride] to [16][16].
  static void TransposeTile(const uint32_t* source, int64_t stride, uint32_t* target) {
    Float rows[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) rows[i] = Load<Float>(source + i * stride);
    Transpose(rows);
    for (int64_t i = 0; i < kTileRows; ++i) Store(target + i * kTileWords, rows[i]);
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_AMX_H_
