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

// Values of a head; zeros past the last.
struct ValueRows : HeadRows {
  const char* operator[](int64_t i) const { return i < count ? first + i * stride : kZeroRow; }
};

// What is read after what is worked on: a straight line through the keys of a tile, its values, and
// the keys of the next tile.
class AheadInOrder {
 public:
  // To be fetched `distance` bytes ahead.
  AheadInOrder(const TileRows& tile, const TileRows& next, int64_t distance)
      : tile_(tile), next_(next), distance_(distance), stream_(tile.keys, 0, tile.values) {}

  // Before the tile's keys, or its values, are read.
  void BeginKeys() { stream_ = FetchStream(tile_.keys, distance_, tile_.values); }
  void BeginValues() { stream_ = FetchStream(tile_.values, distance_, next_.keys); }

  FetchStream& stream() { return stream_; }

  // In the time of other work, which fetches nothing.
  inline void Step(int64_t = 1) {}

 private:
  const TileRows tile_, next_;
  const int64_t distance_;
  FetchStream stream_;
};

template <class Type, class KeyProducts, class ValueProducts, int64_t chain = 0>
class Vectors {
 public:
  using Key = Operands<Type, KeyProducts::kElements>;
  using Words = ValueWords<Type, ValueProducts>;
  using Ahead = AheadInOrder;
  static constexpr bool kPairs = ValueProducts::kElements == 2;  // whether weights are in pairs
  static constexpr int64_t kStepGranule = 1;
  // The heads of a unit are read together, in the order of memory.
  static constexpr bool kHeadsTogether = true;

  // What the processor must be told while products are made: nothing.
  struct Scope {
    explicit Scope(int64_t) {}
  };

  static int64_t Repeat(int64_t padded_rows) { return ByKeys::Repeat(padded_rows); }
  // Whether keys are read where they lie.
  static bool ReadsInPlace(int64_t padded_rows, int64_t head_size) {
    return ByKeys::ReadsInPlace(padded_rows, head_size);
  }

  static Ahead FetchAhead(const TileRows& tile, const TileRows& next, const Rows&,
                          const TileWork&) {
    return {tile, next, kFetchDistance + kValuesAtOnce * tile.values.bytes};
  }

  static constexpr int64_t kAtOnce = kGranule;  // positions

  // Products of kGranule keys of each head with queries: scores [position][padded rows].
  template <bool in_place>
  static void Score(const HeadRows& keys, const Queries& queries, float* scores, Ahead& ahead) {
    const char* rows[kGranule];
    for (int64_t i = 0; i < kGranule; ++i) rows[i] = keys.first + i * keys.stride;
    ByKeys::template Multiply<in_place>(rows, queries, scores, ahead.stream());
  }

  // Adds the weighted values of some heads. Weights are [step][padded rows]. `head(h)` is a
  // HeadValues.
  template <class Head>
  static void Weigh(Head head, int64_t heads, int64_t size, int64_t padded_rows, int64_t rows,
                    uint32_t*, Ahead& ahead) {
    const ByValues weigh(padded_rows, rows, size, ahead.stream());
    const int64_t count = head(0).rows.count;
    ByValues::WithRows(padded_rows, [&](auto rows_at_once) {
      for (int64_t p = 0; p < count; p += kValuesAtOnce) {
        for (int64_t h = 0; h < heads; ++h) {
          const HeadValues values = head(h);
          const ValueRows some = {{values.rows.first + p * values.rows.stride, values.rows.stride,
                                   Least(kValuesAtOnce, count - p)}};
          weigh.template Add<rows_at_once()>(
              some, some.count, values.weights + p / Words::kRows * padded_rows, values.sums);
        }
      }
    });
  }

 private:
  // Values of a head that are weighed before those of the next head: as many as pay for loading and
  // storing its sums, and no more, so that heads are read nearly in the order of memory.
  static constexpr int64_t kValuesAtOnce = 64;
  static constexpr int64_t kFetchDistance = 8 << 10;  // bytes, beside what is worked on

  using ByKeys = Scores<Type, KeyProducts, chain>;
  using ByValues = JAX_NSA_ISA::Weigh<Type, ValueProducts, FetchStream>;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_VECTORS_H_
