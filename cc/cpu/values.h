// Sums of weighted values, which are read where they lie.

#ifndef JAX_NSA_CPU_VALUES_H_
#define JAX_NSA_CPU_VALUES_H_

#include <cstdint>

#include "cpu/fetch.h"
#include "cpu/operands.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

constexpr int64_t kChunk = 2 * kLanes;  // columns that are loaded at once, as two vectors

// Zeros, as a row of values of any type.
alignas(64) constexpr char kZeroRow[4 * kMaxValueSize] = {};

// How rows of values become words: a step is one row, as floats.
template <class Type, class Products>
struct ValueWords {
  static constexpr int64_t kRows = 1;
  static constexpr int64_t kElement = sizeof(typename Type::Bits);

  // Columns [c, c + count) of a step; `whole`: as many as a chunk has.
  template <bool whole, class Rows>
  static inline void Load(const Rows& rows, int64_t row, int64_t c, int64_t count, Word* words) {
    Float a, b;
    if constexpr (whole) {
      Type::Load(rows[row] + c * kElement, &a, &b);
    } else {
      LoadSome<Type>(rows[row] + c * kElement, count, &a, &b);
    }
    words[0] = (Word)a;
    words[1] = (Word)b;
  }

  // From the order of Load to that of columns.
  static inline void Order(Float* a, Float* b) {
    if constexpr (Type::kInterleaves) Interleave(a, b);
  }
};

#if defined(__AVX512BF16__)
// A step is two rows, their elements in pairs.
template <>
struct ValueWords<BFloat16, BFloat16Products> {
  static constexpr int64_t kRows = 2;

  template <bool whole, class Rows>
  static inline void Load(const Rows& rows, int64_t row, int64_t c, int64_t count, Word* words) {
    const __mmask32 mask = whole ? ~0u : (1u << count) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(mask, rows[row] + 2 * c);
    const __m512i high = _mm512_maskz_loadu_epi16(mask, rows[row + 1] + 2 * c);
    words[0] = (Word)_mm512_unpacklo_epi16(low, high);
    words[1] = (Word)_mm512_unpackhi_epi16(low, high);
  }

  // Unpacking left four of eight columns in each of the two vectors, in turn.
  static inline void Order(Float* a, Float* b) {
    const Float first =
        __builtin_shufflevector(*a, *b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    *b = __builtin_shufflevector(*a, *b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30,
                                 31);
    *a = first;
  }
};
#endif

// Adds weighted values to sums, [row][columns]. Rows has the values by operator[]; Ahead is what
// is fetched, a FetchRows or FetchStream.
template <class Type, class Products, class Rows, class Ahead>
class Weigh {
 public:
  using Words = ValueWords<Type, Products>;

  // Of weights, [step][stride], the first `rows` of each step count.
  Weigh(const uint32_t* weights, int64_t stride, int64_t rows, int64_t size, Ahead& ahead)
      : weights_(weights),
        stride_(stride),
        rows_(rows),
        size_(size),
        columns_(RoundUp(size, kChunk)),
        ahead_(ahead) {}

  // Adds `count` values, weighted.
  void Add(const Rows& values, int64_t count, float* sums) const {
    WithConstant(Least(stride_, kMostRows), [&](auto at_once) {
      if constexpr (at_once() <= kMostRows) {
        Columns<at_once()>(values, RoundUp(count, Words::kRows) / Words::kRows, sums);
      }
    });
  }

 private:
  static constexpr int64_t kMostRows = Least(kAccumulators / 2, kLanes);

  // Chunks of two vectors that fill the accumulators.
  static constexpr int64_t ChunksAtOnce(int64_t rows) { return Least(kAccumulators / 2 / rows, 4); }

  template <int rows>
  void Columns(const Rows& values, int64_t steps, float* sums) const {
    constexpr int kChunks = ChunksAtOnce(rows);
    int64_t c = 0;
    for (; c + kChunks * kChunk <= size_; c += kChunks * kChunk) {
      Blocks<rows, kChunks, true>(values, steps, c, sums);
    }
    for (; c + kChunk <= size_; c += kChunk) Blocks<rows, 1, true>(values, steps, c, sums);
    if (c < size_) Blocks<rows, 1, false>(values, steps, c, sums);
  }

  // Some rows after the other meet the same values, and share in fetching.
  template <int rows, int chunks, bool whole>
  void Blocks(const Rows& values, int64_t steps, int64_t c, float* sums) const {
    for (int64_t r = 0; r < rows_; r += rows) {
      Block<rows, chunks, whole>(values, steps, c, r, sums + r * columns_ + c);
    }
  }

  // `rows` rows from row r, `chunks` chunks of columns from column c.
  template <int rows, int chunks, bool whole>
  inline void Block(const Rows& values, int64_t steps, int64_t c, int64_t r, float* sums) const {
    constexpr int kVectors = 2 * chunks;
    constexpr int kBytes = chunks * kChunk * sizeof(typename Type::Bits);
    Float block[rows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        block[i][v] = Load<Float>(sums + i * columns_ + v * kLanes);
      }
    }
    const uint32_t* weights = weights_ + r;
#pragma GCC unroll 4
    for (int64_t s = 0; s < steps; ++s, weights += stride_) {
      if (r == 0) ahead_.template Step<Words::kRows, kBytes>(s * Words::kRows, c / (chunks * kChunk));
      Word value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < chunks; ++v) {
        Words::template Load<whole>(values, s * Words::kRows, c + v * kChunk, size_ - c,
                                    value + 2 * v);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Word weight = Repeated<1>(weights + i);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          block[i][v] = Products::MultiplyAdd(weight, value[v], block[i][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Store(sums + i * columns_ + v * kLanes, block[i][v]);
      }
    }
  }

  const uint32_t* const weights_;
  const int64_t stride_, rows_, size_, columns_;
  Ahead& ahead_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_VALUES_H_
