// Products of keys with the queries of a panel, by vectors.

#ifndef JAX_NSA_CPU_SCORES_H_
#define JAX_NSA_CPU_SCORES_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// The queries of a panel: [words / repeat][rows][repeat], so that `repeat` words of each row lie
// side by side, see Scores::Repeat.
struct Queries {
  const uint32_t* words;
  int64_t rows;       // a power of two that divides a vector, or whole vectors
  int64_t row_words;  // of a query, and of a key; a multiple of `repeat`
};

// Type is that of keys in memory. With `chain`, no more products than that are added one after
// another.
template <class Type, class Products, int64_t chain = 0>
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

  // Writes the products of kGranule keys, [key][row], and fetches as many rows `ahead`.
  // Where keys have been converted, what is fetched has not.
  static void Multiply(const char* const* keys, const char* const* ahead, const Queries& queries,
                       float* scores) {
    if constexpr (chain == 0) {
      MultiplySome(keys, ahead, queries, false, scores);
    } else {
      // Some words of all keys, then the next; their sums are added up.
      const int64_t most = chain * Repeat(queries.rows);
      for (int64_t w = 0; w < queries.row_words; w += most) {
        const char *some[kGranule], *some_ahead[kGranule];
        for (int64_t i = 0; i < kGranule; ++i) {
          some[i] = keys[i] + 4 * w;
          some_ahead[i] = ahead[i] + kWordBytes * w;
        }
        const int64_t left = queries.row_words - w;
        MultiplySome(some, some_ahead,
                     {queries.words + w * queries.rows, queries.rows, left < most ? left : most},
                     w > 0, scores);
      }
    }
  }

 private:
  static constexpr int kWordBytes = kElements * sizeof(typename Type::Bits);  // in memory

  static void MultiplySome(const char* const* keys, const char* const* ahead,
                           const Queries& queries, bool add, float* scores) {
    const int64_t rows = queries.rows;
    if (rows <= kMostWhole) {
      return WithConstant(rows, [&](auto count) {
        if constexpr (count() <= kMostWhole) {
          Narrow<kLanes, count()>(keys, ahead, queries, add, scores);
        }
      });
    }
    if (rows <= kLanes) {
      return WithConstant(Repeat(rows), [&](auto repeat) {
        Narrow<repeat(), 2>(keys, ahead, queries, add, scores);
      });
    }
    int64_t r = 0;
    if constexpr (kAccumulators >= 16) {
      for (; r + 4 * kLanes <= rows; r += 4 * kLanes) {
        Wide<4>(keys, ahead, queries, r, add, scores);
      }
    }
    for (; r + 2 * kLanes <= rows; r += 2 * kLanes) Wide<2>(keys, ahead, queries, r, add, scores);
    if (r < rows) Wide<1>(keys, ahead, queries, r, add, scores);
  }

  static inline void Put(Float sum, bool add, float* target) {
    Store(target, add ? Load<Float>(target) + sum : sum);
  }

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
      FetchStep<count, kWordBytes * repeat>(ahead, w / repeat);
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
  static void Narrow(const char* const* keys, const char* const* ahead, const Queries& queries,
                     bool add, float* scores) {
    constexpr bool kWhole = repeat == kLanes;
    constexpr int kKeys = kWhole ? WholeKeys(vectors) : KeysAtOnce(vectors);
    Float sums[kGranule * vectors];
    for (int64_t p = 0; p < kGranule; p += kKeys) {
      MultiplyKeys<repeat, vectors, kKeys>(keys + p, ahead + p, queries.words, vectors * kLanes,
                                           queries.row_words, sums + p * vectors);
    }
    for (int64_t i = 0; i < kGranule * vectors; i += repeat) {
      Put(TransposeRuns<repeat>(FoldRuns<repeat>(sums + i)), add, scores + i / repeat * kLanes);
    }
  }

  // For `vectors` vectors of rows of a wider one, from row r.
  template <int vectors>
  static void Wide(const char* const* keys, const char* const* ahead, const Queries& queries,
                   int64_t r, bool add, float* scores) {
    constexpr int kKeys = KeysAtOnce(vectors);
    for (int64_t p = 0; p < kGranule; p += kKeys) {
      Float sums[kKeys * vectors];
      MultiplyKeys<1, vectors, kKeys>(keys + p, ahead + p, queries.words + r, queries.rows,
                                      queries.row_words, sums);
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          Put(sums[i * vectors + v], add, scores + (p + i) * queries.rows + r + v * kLanes);
        }
      }
    }
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SCORES_H_
