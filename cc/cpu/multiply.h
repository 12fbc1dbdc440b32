// The two products of attention, by vectors: keys with queries, and weights with values.
//
// A *multiplier* is a class of static members that kernel.cc is generic over: this one, or that of
// amx.h.

#ifndef JAX_NSA_CPU_MULTIPLY_H_
#define JAX_NSA_CPU_MULTIPLY_H_

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/kernel.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Keys as a multiplier reads them: `words` words each, a multiple of its WordGranule.
struct Keys {
  const char* first;
  int64_t stride;  // bytes from one to the next
  int64_t count;   // a multiple of kPositionGranule
  int64_t words;
};

// The queries of a panel: [words / repeat][padded_rows][repeat], so that `repeat` words of each row
// lie side by side.
struct Queries {
  const uint32_t* words;
  int64_t padded_rows;
};

constexpr int64_t kMostSteps = 64;  // weighed at once, by any multiplier

// Weights of some steps and `stride` rows, and the values to be weighed, [step][columns]. A step is
// as many positions as a word has elements. Of weights, the steps of a granule of the multiplier
// lie side by side: [step / granule][row][step % granule]. Both are zero up to a whole granule.
struct Weighing {
  const uint32_t* weights;
  int64_t stride;
  const uint32_t* values;
  int64_t columns;
  int64_t steps;
};

// By vectors of Products. With `chain`, no more products than that are added one after another.
template <class Products, int64_t chain = 0>
class Vectors {
 public:
  static constexpr int kElements = Products::kElements;
  static constexpr int64_t kStepGranule = 1;
  static constexpr int64_t kSteps = 32;  // weighed at once: a share of the L1 cache

  // Words of a key that meet as many of each row at a time. A panel that is no wider than a vector
  // fills two: the more lanes a load of the key repeats over, the fewer loads there are.
  static int64_t Repeat(int64_t padded_rows) {
    if (padded_rows > kLanes) return 1;
    return padded_rows == 1 ? kLanes : 2 * kLanes / padded_rows;
  }

  // The words of a key must be a multiple of it.
  static int64_t WordGranule(int64_t padded_rows) { return Repeat(padded_rows); }

  static int64_t ScoreSteps(const Keys& keys, int64_t padded_rows) {
    const int64_t repeat = Repeat(padded_rows), vectors = padded_rows * repeat / kLanes;
    const int64_t passes = keys.count * vectors / kAccumulators;
    return (passes > keys.count / kMostKeys ? passes : keys.count / kMostKeys) * keys.words /
           repeat / kLoopsInStep;
  }

  // Products of keys with queries: scores [position][padded_rows].
  static void Score(const Keys& keys, const Queries& queries, float* scores, Ahead& ahead) {
    for (int64_t p = 0; p < keys.count; p += kPositionGranule) {
      const char* const granule = keys.first + p * keys.stride;
      // Words up to the end, or as many as make a chain; their sums are added up.
      const int64_t repeat = Repeat(queries.padded_rows);
      const int64_t most = chain == 0 ? keys.words : chain * repeat;
      for (int64_t w = 0; w < keys.words; w += most) {
        const int64_t words = keys.words - w < most ? keys.words - w : most;
        ScoreGranule({granule + 4 * w, keys.stride, kPositionGranule, words},
                     {queries.words + w * queries.padded_rows, queries.padded_rows}, w > 0,
                     scores + p * queries.padded_rows, ahead);
      }
    }
  }

  static int64_t WeighSteps(int64_t rows, int64_t columns, int64_t steps) {
    return (columns + kWide - 1) / kWide * (rows / kRows + rows % kRows) * steps / kLoopsInStep;
  }

  // Adds weighted values to sums [row][columns].
  static void Weigh(const Weighing& weighing, int64_t rows, float* sums, Ahead& ahead) {
    int64_t c = 0;
    for (; c + kWide <= weighing.columns; c += kWide) {
      WeighColumns<kWide / kLanes>(weighing, c, rows, sums, ahead);
    }
    if (c < weighing.columns) WeighColumns<2>(weighing, c, rows, sums, ahead);
  }

 private:
  static constexpr int64_t kMostKeys = 8;  // multiplied at once: their addresses fill registers
  static constexpr int64_t kLoopsInStep = 16 / kAccumulators;  // inner loops in a step of Ahead
  static constexpr int64_t kWide = 4 * kLanes;                 // columns weighed at once
  static constexpr int64_t kRows = kAccumulators / 4;          // rows weighed at once

  static constexpr int KeysAtOnce(int vectors) {
    return kAccumulators / vectors < kMostKeys ? kAccumulators / vectors : kMostKeys;
  }

  // The sums of `count` keys' products with `vectors` vectors of queries, `query_stride` words from
  // one group of `repeat` words to the next.
  template <int repeat, int vectors, int count>
  static inline void MultiplyKeys(const char* first, const Keys& keys, const uint32_t* queries,
                                  int64_t query_stride, Ahead& ahead, Float* sums) {
    Float block[count][vectors] = {};
    for (int64_t g = 0; g < keys.words / repeat; ++g) {
      if (g % kLoopsInStep == 0) ahead.Step();
      Word query[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        query[v] = Load<Word>(queries + g * query_stride + v * kLanes);
      }
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
        const Word key = Repeated<repeat>(first + p * keys.stride + g * 4 * repeat);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          block[p][v] = Products::MultiplyAdd(key, query[v], block[p][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[p * vectors + v] = block[p][v];
    }
  }

  static inline void Put(Float sum, bool add, float* target) {
    Store(target, add ? Load<Float>(target) + sum : sum);
  }

  // For a panel that is no wider than a vector: the `repeat` lanes of each row are summed at last.
  template <int repeat, int vectors>
  static void ScoreNarrow(const Keys& keys, const Queries& queries, bool add, float* scores,
                          Ahead& ahead) {
    constexpr int kKeys = KeysAtOnce(vectors);
    Float sums[kPositionGranule * vectors];
    for (int64_t p = 0; p < kPositionGranule; p += kKeys) {
      MultiplyKeys<repeat, vectors, kKeys>(keys.first + p * keys.stride, keys, queries.words,
                                           vectors * kLanes, ahead, sums + p * vectors);
    }
    for (int64_t i = 0; i < kPositionGranule * vectors; i += repeat) {
      Put(TransposeRuns<repeat>(FoldRuns<repeat>(sums + i)), add, scores + i / repeat * kLanes);
    }
  }

  // For the rows of `vectors` vectors of a wider panel.
  template <int vectors>
  static void ScoreWide(const Keys& keys, const Queries& queries, int64_t row, bool add,
                        float* scores, Ahead& ahead) {
    constexpr int kKeys = KeysAtOnce(vectors);
    for (int64_t p = 0; p < kPositionGranule; p += kKeys) {
      Float sums[kKeys * vectors];
      MultiplyKeys<1, vectors, kKeys>(keys.first + p * keys.stride, keys, queries.words + row,
                                      queries.padded_rows, ahead, sums);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          Put(sums[i * vectors + v], add,
              scores + (p + i) * queries.padded_rows + row + v * kLanes);
        }
      }
    }
  }

  static void ScoreGranule(const Keys& keys, const Queries& queries, bool add, float* scores,
                           Ahead& ahead) {
    const int64_t rows = queries.padded_rows;
    if (rows == 1) return ScoreNarrow<kLanes, 1>(keys, queries, add, scores, ahead);
    if (rows <= kLanes) {
      return WithConstant(Repeat(rows), [&](auto repeat) {
        ScoreNarrow<repeat(), 2>(keys, queries, add, scores, ahead);
      });
    }
    int64_t r = 0;
    if constexpr (kAccumulators >= 16) {
      for (; r + 4 * kLanes <= rows; r += 4 * kLanes) {
        ScoreWide<4>(keys, queries, r, add, scores, ahead);
      }
    }
    for (; r + 2 * kLanes <= rows; r += 2 * kLanes) {
      ScoreWide<2>(keys, queries, r, add, scores, ahead);
    }
    if (r < rows) ScoreWide<1>(keys, queries, r, add, scores, ahead);
  }

  // `rows` rows from row r, `vectors` vectors of columns from column c.
  template <int rows, int vectors>
  static inline void WeighBlock(const Weighing& weighing, int64_t c, int64_t r, float* sums,
                                Ahead& ahead) {
    Float block[rows][vectors] = {};
    for (int64_t s = 0; s < weighing.steps; ++s) {
      if (s % kLoopsInStep == 0) ahead.Step();
      Word value[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        value[v] = Load<Word>(weighing.values + s * weighing.columns + c + v * kLanes);
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const Word weight = Repeated<1>(weighing.weights + s * weighing.stride + r + i);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          block[i][v] = Products::MultiplyAdd(weight, value[v], block[i][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        Put(block[i][v], true, sums + (r + i) * weighing.columns + c + v * kLanes);
      }
    }
  }

  template <int vectors>
  static void WeighColumns(const Weighing& weighing, int64_t c, int64_t rows, float* sums,
                           Ahead& ahead) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      WeighBlock<kRows, vectors>(weighing, c, r, sums, ahead);
    }
    for (; r < rows; ++r) WeighBlock<1, vectors>(weighing, c, r, sums, ahead);
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_MULTIPLY_H_
