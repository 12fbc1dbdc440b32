// Products of keys with the queries of a panel, where keys are rows in any order.

#ifndef JAX_NSA_CPU_SELECT_SCORES_H_
#define JAX_NSA_CPU_SELECT_SCORES_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/select_tile.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// The queries of a panel: [words / repeat][rows][repeat], so that `repeat` words of each row lie
// side by side, see Scores::Repeat.
struct PanelQueries {
  const uint32_t* words;
  int64_t rows;       // a power of two
  int64_t row_words;  // of a query, and of a key; a multiple of `repeat`
};

template <class Products>
class Scores {
 public:
  static constexpr int kElements = Products::kElements;  // in a word

  // Words of a key that meet as many of each row at a time. Few rows take whole vectors of a key's
  // words, so that keys are read one after the other, as memory likes it best; for more, a load
  // repeats some words over the lanes of two vectors, or one over as many as there are.
  static constexpr int64_t Repeat(int64_t rows) {
    if (rows <= kMostWhole) return kLanes;
    return rows > kLanes ? 1 : 2 * kLanes / rows;
  }

  // Writes the products of kTile keys, [key][row], and fetches as many rows `ahead`.
  static void Multiply(const char* const* keys, const char* const* ahead,
                       const PanelQueries& queries, float* scores) {
    const int64_t rows = queries.rows;
    if (rows <= kMostWhole) {
      return WithConstant(rows, [&](auto count) {
        if constexpr (count() <= kMostWhole) Narrow<kLanes, count()>(keys, ahead, queries, scores);
      });
    }
    if (rows <= kLanes) {
      return WithConstant(Repeat(rows),
                          [&](auto repeat) { Narrow<repeat(), 2>(keys, ahead, queries, scores); });
    }
    // Powers of two: whole passes of two vectors, or of four where there are as many.
    if constexpr (kAccumulators >= 16) {
      if (rows >= 4 * kLanes) return Wide<4>(keys, ahead, queries, scores);
    }
    Wide<2>(keys, ahead, queries, scores);
  }

 private:
  static constexpr int64_t kMostKeys = 8;  // multiplied at once: their addresses fill registers
  // Rows that meet keys one after the other, at most.
  static constexpr int64_t kMostWhole = kAccumulators / 2 < kLanes ? kAccumulators / 2 : kLanes;

  static constexpr int64_t KeysAtOnce(int64_t vectors) {
    return kAccumulators / vectors < kMostKeys ? kAccumulators / vectors : kMostKeys;
  }

  // Two, so that a load of a query serves two; one where it stays in a register.
  static constexpr int64_t WholeKeys(int64_t rows) { return rows >= 2 ? 2 : 1; }

  // The sums of `count` keys' products with `vectors` vectors of queries, `stride` words from one
  // group of `repeat` words to the next.
  template <int repeat, int vectors, int count>
  static inline void MultiplyKeys(const char* const* keys, const char* const* ahead,
                                  const uint32_t* queries, int64_t stride, int64_t row_words,
                                  Float* sums) {
    const char* rows[count];
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) rows[p] = keys[p];
    Float block[count][vectors] = {};
    for (int64_t w = 0; w < row_words; w += repeat) {
      FetchStep<count, 4 * repeat>(ahead, w / repeat);
      Word query[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) query[v] = Load<Word>(queries + v * kLanes);
      queries += stride;
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
        const Word key = Repeated<repeat>(rows[p] + 4 * w);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          block[p][v] = Products::MultiplyAdd(key, query[v], block[p][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[p * vectors + v] = block[p][v];
    }
  }

  // For a panel of few rows, or no wider than a vector: the `repeat` lanes of each row are summed
  // at last.
  template <int repeat, int vectors>
  static void Narrow(const char* const* keys, const char* const* ahead, const PanelQueries& queries,
                     float* scores) {
    constexpr bool kWhole = repeat == kLanes;
    constexpr int kKeys = kWhole ? WholeKeys(vectors) : KeysAtOnce(vectors);
    Float sums[kTile * vectors];
    for (int64_t p = 0; p < kTile; p += kKeys) {
      MultiplyKeys<repeat, vectors, kKeys>(keys + p, ahead + p, queries.words, vectors * kLanes,
                                           queries.row_words, sums + p * vectors);
    }
    for (int64_t i = 0; i < kTile * vectors; i += repeat) {
      Store(scores + i / repeat * kLanes, TransposeRuns<repeat>(FoldRuns<repeat>(sums + i)));
    }
  }

  // For a wider one, `vectors` vectors at a time.
  template <int vectors>
  static void Wide(const char* const* keys, const char* const* ahead, const PanelQueries& queries,
                   float* scores) {
    constexpr int kKeys = KeysAtOnce(vectors);
    for (int64_t p = 0; p < kTile; p += kKeys) {
      for (int64_t r = 0; r < queries.rows; r += vectors * kLanes) {
        Float sums[kKeys * vectors];
        MultiplyKeys<1, vectors, kKeys>(keys + p, ahead + p, queries.words + r, queries.rows,
                                        queries.row_words, sums);
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            Store(scores + (p + i) * queries.rows + r + v * kLanes, sums[i * vectors + v]);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_SCORES_H_
