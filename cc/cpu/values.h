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

  // The first `count` columns of a step; `whole`: as many as a chunk has.
  template <bool whole>
  static inline void Load(const char* const* rows, int64_t count, Word* words) {
    Float a, b;
    if constexpr (whole) {
      Type::Load(rows[0], &a, &b);
    } else {
      LoadSome<Type>(rows[0], count, &a, &b);
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

  template <bool whole>
  static inline void Load(const char* const* rows, int64_t count, Word* words) {
    const __mmask32 mask = whole ? ~0u : (1u << count) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(mask, rows[0]);
    const __m512i high = _mm512_maskz_loadu_epi16(mask, rows[1]);
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

// Adds weighted values to sums, [row][columns]. Ahead is what is fetched, a FetchRows or
// FetchStream.
template <class Type, class Products, class Ahead>
class Weigh {
 public:
  using Words = ValueWords<Type, Products>;

  // Of the weights of a step, [stride], the first `rows` count.
  Weigh(int64_t stride, int64_t rows, int64_t size, Ahead& ahead)
      : stride_(stride), rows_(rows), size_(size), columns_(RoundUp(size, kChunk)), ahead_(ahead) {}

  // Calls the function with the number of rows that meet values at once, as a constant for Add.
  template <class Function>
  static void WithRows(int64_t stride, Function function) {
    WithConstant(Least(stride, kMostRows), [&](auto rows) {
      if constexpr (rows() <= kMostRows) function(rows);
    });
  }

  // Adds `count` values, weighted. Rows has them by operator[], also one past an odd number.
  template <int rows, class Rows>
  void Add(const Rows& values, int64_t count, const uint32_t* weights, float* sums) const {
    constexpr int kChunks = ChunksAtOnce(rows);
    const int64_t steps = RoundUp(count, Words::kRows) / Words::kRows;
    int64_t c = 0;
    for (; c + kChunks * kChunk <= size_; c += kChunks * kChunk) {
      AddColumns<rows, kChunks, true>(values, steps, weights, c, sums + c);
    }
    for (; c + kChunk <= size_; c += kChunk) {
      AddColumns<rows, 1, true>(values, steps, weights, c, sums + c);
    }
    if (c < size_) AddColumns<rows, 1, false>(values, steps, weights, c, sums + c);
  }

 private:
  static constexpr int64_t kMostRows = Least(kAccumulators / 2, kLanes);
  static constexpr int64_t kElement = sizeof(typename Type::Bits);

  // Chunks of two vectors that fill the accumulators.
  static constexpr int64_t ChunksAtOnce(int64_t rows) { return Least(kAccumulators / 2 / rows, 4); }

  // `chunks` chunks of columns from column c, some rows after the other.
  template <int rows, int chunks, bool whole, class Rows>
  void AddColumns(const Rows& values, int64_t steps, const uint32_t* weights, int64_t c,
                  float* sums) const {
    const int64_t bytes = steps * Words::kRows * chunks * kChunk * kElement;
    AddBlock<rows, chunks, whole>(values, steps, weights, c, sums,
                                  ahead_.Take(0, c * kElement, bytes));
    for (int64_t r = rows; r < rows_; r += rows) {
      AddBlock<rows, chunks, whole>(values, steps, weights + r, c, sums + r * columns_, NoFetch());
    }
  }

  template <int rows, int chunks, bool whole, class Rows, class Fetched>
  void AddBlock(const Rows& values, int64_t steps, const uint32_t* weights, int64_t c, float* sums,
                const Fetched& fetched) const {
    constexpr int kVectors = 2 * chunks;
    constexpr int kBytes = chunks * kChunk * kElement;
    Float block[rows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        block[i][v] = Load<Float>(sums + i * columns_ + v * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int64_t s = 0; s < steps; ++s, weights += stride_) {
      const char* rows_here[Words::kRows];
      for (int64_t i = 0; i < Words::kRows; ++i) {
        rows_here[i] = values[s * Words::kRows + i] + c * kElement;
      }
      Word value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < chunks; ++v) {
        Words::template Load<whole>(rows_here, size_ - c, value + 2 * v);
        for (const char*& row : rows_here) row += kChunk * kElement;
      }
      fetched.template StepRows<Words::kRows, kBytes>(s);
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

  const int64_t stride_, rows_, size_, columns_;
  Ahead& ahead_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_VALUES_H_
