// Rows of the pools, as multipliers read and fetch them.

#ifndef JAX_NSA_CPU_ROWS_H_
#define JAX_NSA_CPU_ROWS_H_

#include <cstdint>

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Of one kv head; a stride is the bytes from one row to the next.
struct HeadRows {
  const char* first;
  int64_t stride;
  int64_t count;
};

// All kv heads of a unit side by side in each row.
struct Rows {
  const char* first;
  int64_t stride;
  int64_t bytes;  // of each
  int64_t count;
};

// The keys and values of a tile.
struct TileRows {
  Rows keys, values;
};

// The values of a head in a tile, what weighs them, and where they are added up.
struct HeadValues {
  HeadRows rows;
  const uint32_t* weights;  // words
  float* sums;              // [row][columns]
};

constexpr int64_t kMostSteps = 64;  // of values, converted at once by any multiplier

// Steps of Ahead in the time of a vector of block scores.
constexpr int64_t kBlockSteps = 2;

// The work on a tile, for what is to be fetched in its time.
struct TileWork {
  int64_t heads;
  int64_t positions;
  int64_t blocks;  // that close in it
  int64_t key_words;
  int64_t value_size;
  int64_t rows, padded_rows;  // of the panel
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_ROWS_H_
