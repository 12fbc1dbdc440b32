// Vectors of the instruction set that this translation unit is compiled for. What else differs
// between instruction sets: tiles (amx.h), how values are paired (values.h), how memory is fetched
// ahead (fetch.h). Everything has internal linkage (see compress_attention_kernel.h).
//
// A *word* is what one 32-bit lane holds of the operands of a product: a float, or, where the
// machine multiplies pairs of bfloat16, such a pair.

#ifndef JAX_NSA_CPU_SIMD_H_
#define JAX_NSA_CPU_SIMD_H_

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kAccumulators = 16;  // vectors that an inner loop sums into
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kAccumulators = 8;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kAccumulators = 16;
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 8;
#endif

using Float = float __attribute__((vector_size(4 * kLanes)));
using Word = uint32_t __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));

// A number as a type.
template <int n>
struct Constant {
  constexpr int operator()() const { return n; }
};

// Calls the function with a power of two up to kLanes as a Constant.
template <class Function>
inline void WithConstant(int64_t n, Function function) {
  if (n == 1) function(Constant<1>());
  if (n == 2) function(Constant<2>());
  if (n == 4) function(Constant<4>());
  if constexpr (kLanes >= 8) {
    if (n == 8) function(Constant<8>());
  }
  if constexpr (kLanes >= 16) {
    if (n == 16) function(Constant<16>());
  }
}

template <typename V>
inline V Load(const void* source) {
  V vector;
  __builtin_memcpy(&vector, source, sizeof vector);
  return vector;
}

template <typename V>
inline void Store(void* target, V vector) {
  __builtin_memcpy(target, &vector, sizeof vector);
}

// The greater; b if one is NaN.
inline Float Max(Float a, Float b) { return a > b ? a : b; }

inline Float Set(float value) { return Float{} + value; }

// Whether any lane of a is greater than that of b.
inline bool AnyGreater(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(a > b)) != 0;
#else
  const Int greater = a > b;
  int any = 0;
  for (int lane = 0; lane < kLanes; ++lane) any |= greater[lane];
  return any != 0;
#endif
}

// Where a vector holds several positions of `rows` rows each, a power of two: the greatest of each
// row, in all its lanes.
inline Float GreatestOfRows(Float a, int64_t rows) {
  for (int64_t turn = rows; turn < kLanes; turn *= 2) {
    float twice[2 * kLanes];
    Store(twice, a);
    Store(twice + kLanes, a);
    a = Max(Load<Float>(twice + turn), a);
  }
  return a;
}

// 2^f to 2 ulp, for f in [-1/2, 1/2].
inline Float Exp2OfFraction(Float f) {
  Float p = Set(0x1.5c08e6p-10f);  // minimax polynomial of relative error 7.5e-8
  p = p * f + 0x1.3d0c52p-7f;
  p = p * f + 0x1.c6b6e4p-5f;
  p = p * f + 0x1.ebf918p-3f;
  p = p * f + 0x1.62e428p-1f;
  return p * f + 1.0f;
}

// 2^x to 2 ulp; 0 below 2^-126. NaN stays NaN.
inline Float Exp2(Float x) {
#if defined(__AVX512F__)
  const Float f = (Float)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  return (Float)_mm512_maskz_scalef_ps(normal, (__m512)Exp2OfFraction(f), (__m512)(x - f));
#else
  x = Max(Set(-127.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; adding the bias too
  // makes them those of an exponent.
  constexpr float kShift = 12582912.0f + 127.0f;
  const Float shifted = x + kShift;
  return Exp2OfFraction(x - (shifted - kShift)) * (Float)((Int)shifted << 23);
#endif
}

// Repeats the `count` words at `source` over a vector.
template <int count>
inline Word Repeated(const void* source) {
  static_assert(kLanes % count == 0);
  if constexpr (count == kLanes) {
    return Load<Word>(source);
  } else if constexpr (count == 1) {
    uint32_t word;
    __builtin_memcpy(&word, source, sizeof word);
    return Word{} + word;
  } else if constexpr (count == 2) {
    using Pairs = uint64_t __attribute__((vector_size(4 * kLanes)));
    uint64_t pair;
    __builtin_memcpy(&pair, source, sizeof pair);
    return (Word)(Pairs{} + pair);
#if defined(__AVX512F__)
  } else if constexpr (count == 4) {
    return (Word)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(source)));
  } else if constexpr (count == 8) {
    return (Word)_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
#elif defined(__AVX2__)
  } else if constexpr (count == 4) {
    return (Word)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(source)));
#endif
  }
}

using AllLanes = std::make_integer_sequence<int, kLanes>;

// Exchanges the lanes of `a` that have bit h with those of `b` that have not, h lanes before.
template <int h, int... lane>
inline void Exchange(Float* a, Float* b, std::integer_sequence<int, lane...>) {
  const Float low = __builtin_shufflevector(*a, *b, (lane & h ? kLanes + lane - h : lane)...);
  *b = __builtin_shufflevector(*a, *b, (lane & h ? kLanes + lane : lane + h)...);
  *a = low;
}

// Sums runs of `size` lanes: lane r * size + e of the result is the sum of lanes
// [r * size, (r + 1) * size) of vectors[e].
template <int size, int h = 1>
inline Float FoldRuns(const Float* vectors) {
  if constexpr (h >= size) {
    return vectors[0];
  } else {
    Float a = FoldRuns<size, 2 * h>(vectors), b = FoldRuns<size, 2 * h>(vectors + h);
    Exchange<h>(&a, &b, AllLanes{});
    return a + b;
  }
}

template <int h, int... lane>
inline Float Rotate(Float a, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, a, ((lane + h) % kLanes)...);
}

// The sum of all runs of `size` lanes, in each of them.
template <int size>
inline Float SumOfRuns(Float a) {
  if constexpr (size >= kLanes) {
    return a;
  } else {
    const Float sum = SumOfRuns<2 * size>(a);
    return sum + Rotate<size>(sum, AllLanes{});
  }
}

template <int size, int... lane>
inline Float TransposeRuns(Float a, std::integer_sequence<int, lane...>) {
  constexpr int runs = kLanes / size;
  return __builtin_shufflevector(a, a, (lane % runs * size + lane / runs)...);
}

// Lane r * size + e to lane e * (kLanes / size) + r.
template <int size>
inline Float TransposeRuns(Float a) {
  if constexpr (size == 1 || size == kLanes) return a;
  return TransposeRuns<size>(a, AllLanes{});
}

// Transposes a matrix of `size` columns and kLanes rows, which fill as many vectors. Called, it
// would have them in memory.
template <int size, int h = 1>
[[gnu::always_inline]] inline void Transpose(Float* vectors) {
  if constexpr (h < size) {
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) {
      if ((i & h) == 0) Exchange<h>(&vectors[i], &vectors[i + h], AllLanes{});
    }
    Transpose<size, 2 * h>(vectors);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) vectors[i] = TransposeRuns<size>(vectors[i]);
  }
}

template <int... lane>
inline void Interleave(Float* a, Float* b, std::integer_sequence<int, lane...>) {
  const Float low = __builtin_shufflevector(*a, *b, (lane / 2 + lane % 2 * kLanes)...);
  *b = __builtin_shufflevector(*a, *b, (kLanes / 2 + lane / 2 + lane % 2 * kLanes)...);
  *a = low;
}

// From the even and the odd elements of a run to its first and its second half.
inline void Interleave(Float* a, Float* b) { Interleave(a, b, AllLanes{}); }

template <int... lane>
inline void Deinterleave(Float* a, Float* b, std::integer_sequence<int, lane...>) {
  const Float even = __builtin_shufflevector(*a, *b, (2 * lane)...);
  *b = __builtin_shufflevector(*a, *b, (2 * lane + 1)...);
  *a = even;
}

// The inverse.
inline void Deinterleave(Float* a, Float* b) { Deinterleave(a, b, AllLanes{}); }

inline Float FromBFloat16(Word bits) { return (Float)(bits << 16); }

// The bits of each float rounded to bfloat16, to nearest even.
inline Word ToBFloat16(Float a) {
  const Word bits = (Word)a;
  const Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return a == a ? rounded : (bits >> 16) | 0x40;
}

// An element type in memory. `Load` reads 2 * kLanes elements into two vectors: the even and the
// odd ones if it interleaves, else the first and the second half. `Store` is its inverse.
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr bool kInterleaves = true;
  static inline void Load(const void* source, Float* a, Float* b) {
    const Word pairs = JAX_NSA_ISA::Load<Word>(source);
    *a = FromBFloat16(pairs);
    *b = (Float)(pairs & 0xffff0000u);
  }
  static inline void Store(void* target, Float a, Float b) {
    JAX_NSA_ISA::Store(target, ToBFloat16(a) | (ToBFloat16(b) << 16));
  }

#if defined(__AVX512BF16__)
  // Two vectors of positions of `rows` rows each, rounded, in pairs of positions.
  template <int rows>
  static inline Word RoundPairs(Float a, Float b) {
    if constexpr (rows == kLanes) {
      // Of weights, which ties away from zero do not bias: a third fewer instructions.
      return (((Word)a + 0x8000) >> 16) | (((Word)b + 0x8000) & 0xffff0000);
    }
    return RoundPairs<rows>(a, b, std::make_integer_sequence<int, 2 * kLanes>{});
  }

 private:
  template <int rows, int... half>
  static inline Word RoundPairs(Float a, Float b, std::integer_sequence<int, half...>) {
    using Halves = uint16_t __attribute__((vector_size(4 * kLanes)));
    const Halves rounded = (Halves)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    return (Word)__builtin_shufflevector(
        rounded, rounded, (half / 2 / rows * 2 * rows + half % 2 * rows + half / 2 % rows)...);
  }
#endif
};

struct Float32 {
  using Bits = uint32_t;
  static constexpr bool kInterleaves = false;
  static inline void Load(const void* source, Float* a, Float* b) {
    *a = JAX_NSA_ISA::Load<Float>(source);
    *b = JAX_NSA_ISA::Load<Float>(static_cast<const Bits*>(source) + kLanes);
  }
  static inline void Store(void* target, Float a, Float b) {
    JAX_NSA_ISA::Store(target, a);
    JAX_NSA_ISA::Store(static_cast<Bits*>(target) + kLanes, b);
  }
};

struct Float16 {
  using Bits = uint16_t;
#if defined(__AVX512F__)
  static inline Float Half(const void* source) {
    return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
  }
  static inline void Half(void* target, Float a) {
    _mm256_storeu_si256(static_cast<__m256i*>(target),
                        _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static inline Float Half(const void* source) {
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(source)));
  }
  static inline void Half(void* target, Float a) {
    _mm_storeu_si128(static_cast<__m128i*>(target),
                     _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__aarch64__)
  static inline Float Half(const void* source) {
    return (Float)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const Bits*>(source))));
  }
  static inline void Half(void* target, Float a) {
    vst1_u16(static_cast<Bits*>(target), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a)));
  }
#endif
#if defined(__AVX512F__) || defined(__F16C__) || defined(__aarch64__)
  static constexpr bool kInterleaves = false;
  static inline void Load(const void* source, Float* a, Float* b) {
    *a = Half(source);
    *b = Half(static_cast<const Bits*>(source) + kLanes);
  }
  static inline void Store(void* target, Float a, Float b) {
    Half(target, a);
    Half(static_cast<Bits*>(target) + kLanes, b);
  }
#else
  static constexpr bool kInterleaves = true;
  static inline Float FromBits(Word half) {
    // Exponent and mantissa in place, the bias mended. XLA has denormal floats taken for 0, so
    // those of halves, which floats hold as normal numbers, are made from integers.
    const Word exponent = half & 0x7c00, denormal = half & 0x3ff;
    Word bits = ((half & 0x7fff) << 13) + 0x38000000u;
    bits = exponent == 0x7c00 ? bits | 0x7f800000u : bits;
    bits = exponent == 0 ? (Word)(__builtin_convertvector((Int)denormal, Float) * 0x1p-24f) : bits;
    return (Float)(bits | ((half & 0x8000) << 16));
  }
  static inline Word ToBits(Float a) {
    const Word bits = (Word)a, sign = (bits >> 16) & 0x8000;
    const Word magnitude = bits & 0x7fffffff;
    // Denormal halves: adding 1/2 leaves the mantissa, rounded, in the low bits.
    const Word denormal = (Word)((Float)magnitude + 0.5f) - 0x3f000000u;
    const Word normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    Word half = magnitude < 0x38800000u ? denormal : normal;
    half = magnitude >= 0x477ff000u ? Word{} + 0x7c00 : half;
    half = magnitude > 0x7f800000u ? Word{} + 0x7e00 : half;
    return half | sign;
  }
  static inline void Load(const void* source, Float* a, Float* b) {
    const Word pairs = JAX_NSA_ISA::Load<Word>(source);
    *a = FromBits(pairs & 0xffff);
    *b = FromBits(pairs >> 16);
  }
  static inline void Store(void* target, Float a, Float b) {
    JAX_NSA_ISA::Store(target, ToBits(a) | (ToBits(b) << 16));
  }
#endif
};

// Products of words that are floats.
struct FloatProducts {
  static constexpr int kElements = 1;  // of an operand in a word
  static inline Float MultiplyAdd(Word a, Word b, Float sum) { return (Float)a * (Float)b + sum; }
};

#if defined(__AVX512BF16__)
// Products of words that are pairs of bfloat16.
struct BFloat16Products {
  static constexpr int kElements = 2;
  static inline Float MultiplyAdd(Word a, Word b, Float sum) {
    return (Float)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};

#else
using BFloat16Products = FloatProducts;
#endif

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SIMD_H_
