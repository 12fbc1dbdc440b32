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
  template <bool whole>
  static inline void Load(const char* const* rows, int64_t c, int64_t count, Word* words) {
    Float a, b;
    if constexpr (whole) {
      Type::Load(rows[0] + c * kElement, &a, &b);
    } else {
      LoadSome<Type>(rows[0] + c * kElement, count, &a, &b);
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
  static inline void Load(const char* const* rows, int64_t c, int64_t count, Word* words) {
    const __mmask32 mask = whole ? ~0u : (1u << count) - 1;
    const __m512i low = _mm512_maskz_loadu_epi16(mask, rows[0] + 2 * c);
    const __m512i high = _mm512_maskz_loadu_epi16(mask, rows[1] + 2 * c);
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

// Adds weighted values to sums, [row][columns].
template <class Type, class Products>
class Weigh {
 public:
  using Words = ValueWords<Type, Products>;

  // Adds kGranule values, weighted, and fetches as many rows `ahead`. Of weights, [step][stride],
  // the first `rows` of each step count.
  static void Add(const char* const* values, const char* const* ahead, int64_t size,
                  const uint32_t* weights, int64_t stride, int64_t rows, float* sums) {
    const Weigh weigh = {values, ahead, size, weights, stride, rows, sums};
    WithConstant(Least(stride, kMostRows), [&](auto at_once) {
      if constexpr (at_once() <= kMostRows) weigh.template Columns<at_once()>();
    });
  }

 private:
  static constexpr int64_t kMostRows = Least(kAccumulators / 2, kLanes);

  // Chunks of two vectors that fill the accumulators.
  static constexpr int64_t ChunksAtOnce(int64_t rows) { return Least(kAccumulators / 2 / rows, 4); }

  Weigh(const char* const* values, const char* const* ahead, int64_t size, const uint32_t* weights,
        int64_t stride, int64_t rows, float* sums)
      : values_(values),
        ahead_(ahead),
        size_(size),
        weights_(weights),
        stride_(stride),
        rows_(rows),
        columns_(RoundUp(size, kChunk)),
        sums_(sums) {}

  template <int rows>
  void Columns() const {
    constexpr int kChunks = ChunksAtOnce(rows);
    int64_t c = 0;
    for (; c + kChunks * kChunk <= size_; c += kChunks * kChunk) Rows<rows, kChunks, true>(c);
    for (; c + kChunk <= size_; c += kChunk) Rows<rows, 1, true>(c);
    if (c < size_) Rows<rows, 1, false>(c);
  }

  template <int rows, int chunks, bool whole>
  void Rows(int64_t c) const {
    for (int64_t r = 0; r < rows_; r += rows) Block<rows, chunks, whole>(c, r);
  }

  // `rows` rows from row r, `chunks` chunks of columns from column c.
  template <int rows, int chunks, bool whole>
  inline void Block(int64_t c, int64_t r) const {
    constexpr int kVectors = 2 * chunks;
    float* const target = sums_ + r * columns_ + c;
    const int64_t count = size_ - c;
    constexpr int64_t kElement = sizeof(typename Type::Bits), kBytes = chunks * kChunk * kElement;
    const int64_t first = c * kElement;
    const bool fetches = r == 0 && first % kLine == 0;
    Float block[rows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        block[i][v] = Load<Float>(target + i * columns_ + v * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int64_t s = 0; s < kGranule / Words::kRows; ++s) {
      if (fetches) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < Words::kRows; ++i) {
          const char* const row = ahead_[s * Words::kRows + i] + first;
          for (int64_t b = 0; b < kBytes; b += kLine) FetchLine(row + b);
        }
      }
      Word value[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < chunks; ++v) {
        Words::template Load<whole>(values_ + s * Words::kRows, c + v * kChunk, count,
                                    value + 2 * v);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const Word weight = Repeated<1>(weights_ + s * stride_ + r + i);
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
        Store(target + i * columns_ + v * kLanes, block[i][v]);
      }
    }
  }

  const char* const* const values_;
  const char* const* const ahead_;
  const int64_t size_;
  const uint32_t* const weights_;
  const int64_t stride_, rows_, columns_;
  float* const sums_;
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_VALUES_H_
