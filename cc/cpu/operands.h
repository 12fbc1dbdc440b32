// How rows of elements in memory become operands of products, and results elements.

#ifndef JAX_NSA_CPU_OPERANDS_H_
#define JAX_NSA_CPU_OPERANDS_H_

#include <cstdint>

#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Not rounding.h's, which has one body for all instruction sets.
constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t Least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// Words of a row of `size` elements in scratch memory, by any multiplier.
constexpr int64_t PaddedWords(int64_t size) { return RoundUp(size, 2 * kLanes); }

// Calls Type::Load on `count` elements, fewer than it reads, and zeros after them.
template <class Type>
inline void LoadSome(const void* source, int64_t count, Float* a, Float* b) {
  typename Type::Bits elements[2 * kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    elements[i] = static_cast<const typename Type::Bits*>(source)[i];
  }
  Type::Load(elements, a, b);
}

// Stores the first `count` elements of two vectors in the order of Type::Load.
template <class Type>
inline void StoreSome(void* target, int64_t count, Float a, Float b) {
  if (count >= 2 * kLanes) return Type::Store(target, a, b);
  typename Type::Bits elements[2 * kLanes];
  Type::Store(elements, a, b);
  for (int64_t i = 0; i < count; ++i) {
    static_cast<typename Type::Bits*>(target)[i] = elements[i];
  }
}

// Stores `count` of two vectors of columns, rounded once.
template <class Type>
inline void StoreColumns(void* target, int64_t count, Float a, Float b) {
  if constexpr (Type::kInterleaves) Deinterleave(&a, &b);
  StoreSome<Type>(target, count, a, b);
}

// How rows of elements become words for a multiplier of `elements` elements in a word.
template <class Type, int elements>
struct Operands {
  static constexpr int kElements = elements;
  static constexpr bool kPairs = elements == 2;
  static constexpr int64_t kElementSize = sizeof(typename Type::Bits);
  // Whether the words of a row are its bytes in memory.
  static constexpr bool kInPlace = kElementSize * elements == 4;
  static constexpr int64_t kChunk = 2 * kLanes;  // elements that are converted at once

  static constexpr int64_t RowWords(int64_t size) { return RoundUp(size, kChunk) / elements; }

  // Writes the RowWords(size) words of a row, zeros past its end; keys and queries in one order.
  static void PackRow(const char* row, int64_t size, uint32_t* words) {
    if constexpr (kPairs) {
      for (int64_t c = 0; c < size; c += kChunk) {
        Store(words + c / 2, LoadPairs(row + c * kElementSize, size - c));
      }
    } else {
      Convert(row, size, words);
    }
  }

  // Writes the words of a step of values, in the order of Type::Load: two rows in pairs, of which
  // the second may be null.
  static void PackStep(const char* first, const char* second, int64_t size, uint32_t* words) {
    static_assert(kPairs);
    int64_t c = 0;
    for (; second != nullptr && c + kChunk <= size; c += kChunk) {
      const int64_t offset = c * kElementSize;
      StorePairs(Load<Word>(first + offset), Load<Word>(second + offset), words + c);
    }
    for (; c < size; c += kChunk) {
      const Word low = LoadPairs(first + c * kElementSize, size - c);
      const Word high = second ? LoadPairs(second + c * kElementSize, size - c) : Word{};
      StorePairs(low, high, words + c);
    }
  }

 private:
  // The even elements of two rows, side by side, then the odd ones.
  static inline void StorePairs(Word low, Word high, uint32_t* words) {
    Store(words, (low & 0xffff) | (high << 16));
    Store(words + kLanes, (low >> 16) | (high & 0xffff0000));
  }

  static void Convert(const char* row, int64_t size, uint32_t* words) {
    Float a, b;
    int64_t c = 0;
    for (; c + kChunk <= size; c += kChunk) {
      Type::Load(row + c * kElementSize, &a, &b);
      Store(words + c, a);
      Store(words + c + kLanes, b);
    }
    if (c == size) return;
    LoadSome<Type>(row + c * kElementSize, size - c, &a, &b);
    Store(words + c, a);
    Store(words + c + kLanes, b);
  }

  static Word LoadPairs(const char* source, int64_t count) {
    if (count >= kChunk) return Load<Word>(source);
    typename Type::Bits elements_here[kChunk] = {};
    __builtin_memcpy(elements_here, source, count * kElementSize);
    return Load<Word>(elements_here);
  }
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_OPERANDS_H_
