// Products of keys with the queries of panels, by vectors.

#ifndef JAX_NSA_CPU_SCORES_H_
#define JAX_NSA_CPU_SCORES_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// The queries of the panels of some kv heads: [head][words / repeat][rows][repeat], so that
// `repeat` words of each row lie side by side, see Scores::Repeat.
struct Queries {
  const uint32_t* words;
  int64_t rows;       // of a panel; a power of two that divides a vector, or whole vectors
  int64_t row_words;  // of a query, and of a key; a multiple of `repeat`
  int64_t heads = 1;
  int64_t head_bytes = 0;   // from a head's key to the next one's, in a row of memory
  int64_t head_scores = 0;  // from a head's scores to the next one's
};

// Type is that of keys in memory. With `chain`, no more products than that are added one after
// another.
template <class Type, class Products, int64_t chain = 0>
class Scores {
 public:
  using Key = Operands<Type, Products::kElements>;

  // Words of a key that meet as many of each row at a time. Few rows take whole vectors of a key's
  // words, so that keys are read one after the other, as memory likes it best; for more, a load
  // repeats some words over the lanes of two vectors, or one over as many as there are.
  static constexpr int64_t Repeat(int64_t rows) {
    if (rows <= kMostWhole) return kLanes;
    return rows > kLanes ? 1 : 2 * kLanes / rows;
  }

  // Whether keys are read where they lie: they are words there, or whole vectors become words as
  // they are loaded. Others are to be packed before.
  static bool ReadsInPlace(int64_t rows, int64_t head_size) {
    if (Key::kInPlace) return head_size % (Repeat(rows) * Products::kElements) == 0;
    return rows <= kMostWhole && head_size % Key::kChunk == 0;
  }

  // Writes the products of kGranule keys of each head, [key][row], and fetches what is `ahead`, a
  // FetchRows or FetchStream. `keys` are those of the first head, as ReadsInPlace says.
  template <bool in_place, class Ahead>
  static void Multiply(const char* const* keys, const Queries& queries, float* scores,
                       Ahead& ahead) {
    const int64_t rows = queries.rows;
    if (rows <= kMostWhole) {
      return WithConstant(rows, [&](auto count) {
        if constexpr (count() <= kMostWhole) {
          Narrow<in_place, kLanes, count()>(keys, queries, scores, ahead);
        }
      });
    }
    if (rows <= kLanes) {
      return WithConstant(Repeat(rows), [&](auto repeat) {
        if constexpr (repeat() < kLanes)
          Narrow<in_place, repeat(), 2>(keys, queries, scores, ahead);
      });
    }
    int64_t r = 0;
    const auto wide = [&](auto vectors) {
      for (; r + vectors() * kLanes <= rows; r += vectors() * kLanes) {
        NoFetch fetched;  // for the first rows
        if (r == 0) {
          Wide<vectors()>(keys, queries, r, scores, ahead);
        } else {
          Wide<vectors()>(keys, queries, r, scores, fetched);
        }
      }
    };
    if constexpr (kAccumulators >= 16) wide(Constant<4>());
    wide(Constant<2>());
    wide(Constant<1>());
  }

 private:
  static constexpr int kMostKeys = 8;  // multiplied at once: their addresses fill registers
  // Rows that meet keys one after the other, at most.
  static constexpr int64_t kMostWhole = kAccumulators / 2 < kLanes ? kAccumulators / 2 : kLanes;

  static constexpr int KeysAtOnce(int vectors) {
    return kAccumulators / vectors < kMostKeys ? kAccumulators / vectors : kMostKeys;
  }

  // Of whole keys: so that a load of a query serves several.
  static constexpr int WholeKeysAtOnce(int rows) { return Least(kAccumulators / rows, 4); }

  // The sums of `count` keys' products with `vectors` vectors of queries, `stride` words from one
  // group of `repeat` words to the next. Elements become words as they are loaded if `converts`.
  template <int repeat, int vectors, int count, bool converts, class Ahead>
  static inline void MultiplyKeys(const char* const* keys, int64_t offset, int64_t first,
                                  const uint32_t* queries, int64_t stride, int64_t row_words,
                                  Ahead& ahead, Float* sums) {
    static_assert(!converts || repeat == kLanes);
    constexpr int kLoads = converts ? 2 : 1;  // vectors that a load of a key gives
    constexpr int kWords = repeat * kLoads;
    constexpr int kWordBytes = Products::kElements * Key::kElementSize;  // in memory
    const int64_t most = chain > 0 ? chain * kWords : row_words;
    const char* rows[count];
#pragma GCC unroll 8
    for (int p = 0; p < count; ++p) rows[p] = keys[first + p] + offset;
    const auto fetched = ahead.Take(first, 0, count * row_words * kWordBytes);
    int64_t step = 0;
    for (int64_t begin = 0; begin < row_words; begin += most) {
      const int64_t end = chain > 0 ? Least(begin + most, row_words) : row_words;
      Float block[count][vectors] = {};
#pragma GCC unroll 2
      for (int64_t w = begin; w < end; w += kWords, ++step) {
        fetched.template Step<count, kWordBytes * kWords>(step);
        Word key[count][kLoads];
#pragma GCC unroll 8
        for (int p = 0; p < count; ++p) {
          if constexpr (converts) {
            Float a, b;
            Type::Load(rows[p] + w * kWordBytes, &a, &b);
            key[p][0] = (Word)a, key[p][1] = (Word)b;
          } else {
            key[p][0] = Repeated<repeat>(rows[p] + 4 * w);
          }
        }
#pragma GCC unroll 2
        for (int load = 0; load < kLoads; ++load, queries += stride) {
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) {
            const Word query = Load<Word>(queries + v * kLanes);
#pragma GCC unroll 8
            for (int p = 0; p < count; ++p) {
              block[p][v] = Products::MultiplyAdd(key[p][load], query, block[p][v]);
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int p = 0; p < count; ++p) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          Float* const sum = sums + p * vectors + v;
          *sum = begin == 0 ? block[p][v] : *sum + block[p][v];
        }
      }
    }
  }

  // For panels of few rows, or no wider than a vector. Inlined, it would have too few registers.
  template <bool in_place, int repeat, int vectors, class Ahead>
  [[gnu::noinline]] static void Narrow(const char* const* keys, const Queries& queries,
                                       float* scores, Ahead& ahead) {
    constexpr bool kWhole = repeat == kLanes, kConverts = kWhole && in_place && !Key::kInPlace;
    constexpr int kKeys = kWhole ? WholeKeysAtOnce(vectors) : KeysAtOnce(vectors);
    // Two heads have code of their own, which was measured to bring more lines from memory. Where
    // registers are few it spills them.
    constexpr int kHeads = kAccumulators >= 16 ? 2 : 1;
    for (int64_t p = 0; p < kGranule; p += kKeys) {
      int64_t h = 0;
      for (; h + kHeads <= queries.heads; h += kHeads) {
        NarrowHeads<kHeads, repeat, vectors, kKeys, kConverts>(keys, p, queries, h, scores, ahead);
      }
      if (kHeads > 1 && h < queries.heads) {
        NarrowHeads<1, repeat, vectors, kKeys, kConverts>(keys, p, queries, h, scores, ahead);
      }
    }
  }

  // `count` keys from key p, of some heads from head h.
  template <int heads, int repeat, int vectors, int count, bool converts, class Ahead>
  static inline void NarrowHeads(const char* const* keys, int64_t p, const Queries& queries,
                                 int64_t h, float* scores, Ahead& ahead) {
    const uint32_t* words = queries.words + h * queries.row_words * queries.rows;
#pragma GCC unroll 2
    for (int i = 0; i < heads; ++i, ++h, words += queries.row_words * queries.rows) {
      Float sums[count * vectors];
      MultiplyKeys<repeat, vectors, count, converts>(
          keys, h * queries.head_bytes, p, words, vectors * kLanes, queries.row_words, ahead, sums);
      StoreSums<repeat, count * vectors>(sums, scores + h * queries.head_scores + p * queries.rows);
    }
  }

  // Stores the sum of each run of `repeat` lanes of each vector.
  template <int repeat, int vectors>
  static inline void StoreSums(const Float* sums, float* target) {
    if constexpr (vectors >= repeat) {
#pragma GCC unroll 8
      for (int i = 0; i < vectors; i += repeat) {
        Store(target + i / repeat * kLanes, TransposeRuns<repeat>(FoldRuns<repeat>(sums + i)));
      }
    } else {
      static_assert(repeat == kLanes);
      const Float sum = SumOfRuns<vectors>(FoldRuns<vectors>(sums));
      __builtin_memcpy(target, &sum, 4 * vectors);
    }
  }

  // For `vectors` vectors of rows of wider ones, from row r.
  template <int vectors, class Ahead>
  static void Wide(const char* const* keys, const Queries& queries, int64_t r, float* scores,
                   Ahead& ahead) {
    constexpr int kKeys = KeysAtOnce(vectors);
    for (int64_t p = 0; p < kGranule; p += kKeys) {
      for (int64_t h = 0; h < queries.heads; ++h) {
        Float sums[kKeys * vectors];
        MultiplyKeys<1, vectors, kKeys, false>(
            keys, h * queries.head_bytes, p,
            queries.words + h * queries.row_words * queries.rows + r, queries.rows,
            queries.row_words, ahead, sums);
        float* const target = scores + h * queries.head_scores + r;
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            Store(target + (p + i) * queries.rows + v * kLanes, sums[i * vectors + v]);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SCORES_H_
