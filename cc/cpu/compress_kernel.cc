// The kernel of compression, for the instruction set that this file is compiled for.

#include "cpu/compress_kernel.h"

#include "cpu/operands.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

using compress::Pair;
using compress::Problem;

constexpr int64_t kColumns = 2 * kLanes;  // that are loaded at once, as two vectors

constexpr int64_t kMostFloats =
    RoundUp(Most(kMaxBlockSize, jax_nsa::compress::kMaxCompressedHeadSize), kColumns);

// Converts `count` elements that lie `stride` apart, and zeros up to the end of a vector.
template <class Type>
void ToFloats(const void* source, int64_t stride, int64_t count, float* floats) {
  for (int64_t i = 0; i < count; i += kColumns) {
    typename Type::Bits elements[kColumns] = {};
    for (int64_t n = 0; n < Least(count - i, kColumns); ++n) {
      elements[n] = static_cast<const typename Type::Bits*>(source)[(i + n) * stride];
    }
    Float a, b;
    Type::Load(elements, &a, &b);
    if constexpr (Type::kInterleaves) Interleave(&a, &b);
    StoreSome<Float32>(floats + i, kColumns, a, b);
  }
}

// The factors of one head: its weights and biases.
struct Factors {
  float weights[kMostFloats];
  float bias[kMostFloats];

  template <class Type>
  void Load(const Problem& problem, const Pair& pair, int64_t head) {
    const auto load = [&](DataType dtype, const void* array, int64_t first, int64_t stride,
                          int64_t count, float* floats) {
      if (dtype == problem.dtype) {
        const auto* const elements = static_cast<const typename Type::Bits*>(array);
        ToFloats<Type>(elements + first, stride, count, floats);
      } else {
        ToFloats<Float32>(static_cast<const float*>(array) + first, stride, count, floats);
      }
    };
    load(pair.weight_dtype, pair.weight, head, problem.heads, problem.compress_block_size, weights);
    if (pair.bias != nullptr) {
      load(pair.bias_dtype, pair.bias, head * pair.head_size, 1, pair.head_size, bias);
    } else {
      for (float& element : bias) element = 0;
    }
  }
};

// Sums the `count` columns from byte `offset` of all rows, in the order of the rows; `count` is
// kColumns if they are whole.
template <class Type, bool whole>
void SumColumns(const char* const* rows, int64_t num_rows, int64_t offset, int64_t count,
                const float* weights, const float* bias, char* target) {
  Float a = {}, b = {};
  for (int64_t t = 0; t < num_rows; ++t) {
    Float x, y;
    if constexpr (whole) {
      Type::Load(rows[t] + offset, &x, &y);
    } else {
      LoadSome<Type>(rows[t] + offset, count, &x, &y);
    }
    a += x * weights[t];
    b += y * weights[t];
  }
  if constexpr (Type::kInterleaves) Interleave(&a, &b);
  a += Load<Float>(bias);
  b += Load<Float>(bias + kLanes);
  StoreColumns<Type>(target + offset, count, a, b);
}

template <class Type>
void Compress(const Problem& problem, const Pair& pair, const char* const* rows, char* target) {
  constexpr int64_t kElement = sizeof(typename Type::Bits);
  const int64_t size = pair.head_size;
  Factors factors;
  for (int64_t head = 0; head < problem.heads; ++head) {
    factors.Load<Type>(problem, pair, head);
    const auto sum = [&](auto sum_columns, int64_t column, int64_t count) {
      sum_columns(rows, problem.compress_block_size, (head * size + column) * kElement, count,
                  factors.weights, factors.bias + column, target);
    };
    if (size < kColumns) {
      sum(SumColumns<Type, false>, 0, size);
      continue;
    }
    // The last columns may be among the ones before, too, whose sums are the same.
    for (int64_t c = 0; c < size; c += kColumns) {
      sum(SumColumns<Type, true>, Least(c, size - kColumns), kColumns);
    }
  }
}

void CompressAny(const Problem& problem, const Pair& pair, const char* const* rows, char* target) {
  switch (problem.dtype) {
    case DataType::kBFloat16:
      return Compress<BFloat16>(problem, pair, rows, target);
    case DataType::kFloat16:
      return Compress<Float16>(problem, pair, rows, target);
    case DataType::kFloat32:
      return Compress<Float32>(problem, pair, rows, target);
  }
}

}  // namespace

extern const compress::Kernel kCompressKernel;
const compress::Kernel kCompressKernel = CompressAny;

}  // namespace jax_nsa::cpu::JAX_NSA_ISA
