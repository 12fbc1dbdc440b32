// The two products of attention over the rows of a page, by vectors.
//
// A *multiplier* is a class of static members that compress_attention_attend.h is generic over:
// this one, or that of amx.h.

#ifndef JAX_NSA_CPU_VECTORS_H_
#define JAX_NSA_CPU_VECTORS_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "cpu/scores.h"
#include "cpu/values.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// What is read after the present tile. Rows are fetched as those a granule before are worked on.
class AheadByRow {
 public:
  AheadByRow(const Rows& keys, const Rows& values) : keys_(keys.first), values_(values.first) {}

  const char* keys() const { return keys_; }
  const char* values() const { return values_; }

  // In the time of other work, which fetches nothing.
  inline void Step(int64_t = 1) {}

 private:
  const char *const keys_, *const values_;
};

template <class Type, class KeyProducts, class ValueProducts, int64_t chain = 0>
class Vectors {
 public:
  using Key = Operands<Type, KeyProducts::kElements>;
  using Words = ValueWords<Type, ValueProducts>;
  using Ahead = AheadByRow;
  static constexpr bool kPairs = ValueProducts::kElements == 2;  // whether weights are in pairs
  static constexpr int64_t kStepGranule = 1;

  // What the processor must be told while products are made: nothing.
  struct Scope {
    explicit Scope(int64_t) {}
  };

  static int64_t Repeat(int64_t padded_rows) { return ByKeys::Repeat(padded_rows); }
  // The words of a key must be a multiple of it.
  static int64_t WordGranule(int64_t padded_rows) { return Repeat(padded_rows); }

  static Ahead FetchAhead(const Rows& keys, const Rows& values, const Rows&, const TileWork&) {
    return {keys, values};
  }

  static constexpr int64_t kAtOnce = kGranule;  // positions

  // Products of kGranule keys with queries: scores [position][padded rows]. `next` are read next.
  static void Score(const HeadRows& keys, const HeadRows& next, const Queries& queries,
                    float* scores, Ahead&) {
    const char *rows[kGranule], *ahead[kGranule];
    for (int64_t i = 0; i < kGranule; ++i) {
      rows[i] = keys.first + i * keys.stride;
      ahead[i] = next.first + i * next.stride;
    }
    ByKeys::Multiply(rows, ahead, queries, scores);
  }

  // Adds up to kGranule values, weighted, to sums [row][columns]. Weights are [step][padded rows].
  // `next` are read next.
  static void Weigh(const HeadRows& values, const HeadRows& next, int64_t size,
                    const uint32_t* weights, int64_t padded_rows, int64_t rows, float* sums,
                    uint32_t*, Ahead&) {
    const char *positions[kGranule], *ahead[kGranule];
    for (int64_t i = 0; i < kGranule; ++i) {
      positions[i] = i < values.count ? values.first + i * values.stride : kZeroRow;
      ahead[i] = next.first + i * next.stride;
    }
    ByValues::Add(positions, ahead, size, weights, padded_rows, rows, sums);
  }

 private:
  using ByKeys = Scores<Type, KeyProducts, chain>;
  using ByValues = JAX_NSA_ISA::Weigh<Type, ValueProducts>;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_VECTORS_H_
