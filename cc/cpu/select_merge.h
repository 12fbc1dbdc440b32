// The results of an item from the partials of its units.

#ifndef JAX_NSA_CPU_SELECT_MERGE_H_
#define JAX_NSA_CPU_SELECT_MERGE_H_

#include <cstdint>

#include "cpu/operands.h"
#include "cpu/select_kernel.h"
#include "cpu/simd.h"
#include "cpu/values.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// What is left of the partials when they are added up; over the same memory as SelectScratch.
struct MergeScratch {
  float* sums;       // [rows, padded value size]
  float* reference;  // [at least a vector of rows], the greatest
  float* total;      // the same
  float* rounded;    // the same
  float* factors;    // the same
  int64_t size;      // bytes

  MergeScratch(const select::Plan& plan, void* memory) {
    float* next = static_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
      float* const taken = next;
      next += RoundUp(floats, kAlignment / 4);
      return taken;
    };
    const int64_t state = Most(plan.group, kLanes);
    sums = take(plan.group * PaddedWords(plan.problem.value_size));
    reference = take(state);
    total = take(state);
    rounded = take(state);
    factors = take(state);
    size = reinterpret_cast<char*>(next) - static_cast<char*>(memory);
  }
};

// Adds up the partials of all rows relative to the greatest reference.
inline void AddPartials(const select::Plan& plan, const select::Partial* const* partials,
                        int64_t count, const MergeScratch& scratch) {
  const int64_t rows = plan.group, columns = PaddedWords(plan.problem.value_size);
  for (int64_t i = 0; i < rows * columns; i += kLanes) Store(scratch.sums + i, Float{});
  for (int64_t v = 0; v < Most(rows, kLanes); v += kLanes) {
    Float reference = Set(select::kNoPeak);
    for (int64_t n = 0; n < count; ++n) {
      reference = Max(Load<Float>(partials[n]->reference + v), reference);
    }
    Store(scratch.reference + v, reference);
    Store(scratch.total + v, Float{});
    Store(scratch.rounded + v, Float{});
  }
  for (int64_t n = 0; n < count; ++n) {
    const select::Partial& partial = *partials[n];
    for (int64_t v = 0; v < Most(rows, kLanes); v += kLanes) {
      const Float apart = Load<Float>(partial.reference + v) - Load<Float>(scratch.reference + v);
      const Float factor = Exp2(apart * plan.exponent_scale);
      const Float total = Load<Float>(partial.total + v);
      Store(scratch.factors + v, factor);
      Store(scratch.total + v, Load<Float>(scratch.total + v) + total * factor);
      const Float rounded = Load<Float>(partial.rounded + v);
      Store(scratch.rounded + v, Load<Float>(scratch.rounded + v) + rounded * factor);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = scratch.factors[r];
      for (int64_t c = r * columns; c < (r + 1) * columns; c += kLanes) {
        const Float part = Load<Float>(partial.attention + c);
        Store(scratch.sums + c, Load<Float>(scratch.sums + c) + part * factor);
      }
    }
  }
}

// Writes the item's attention as Out and its lse. Words is the order of the partials' columns.
template <class Words, class Out>
void MergePartials(const select::Plan& plan, int64_t row, int64_t head,
                   const select::Partial* const* partials, int64_t count, void* attention,
                   float* lse, void* memory) {
  const MergeScratch scratch(plan, memory);
  AddPartials(plan, partials, count, scratch);
  const int64_t rows = plan.group, size = plan.problem.value_size, columns = PaddedWords(size);
  const int64_t first = row * plan.problem.heads + head * rows;
  constexpr int64_t kBytes = sizeof(typename Out::Bits);
  for (int64_t r = 0; r < rows; ++r) {
    const float total = scratch.total[r], rounded = scratch.rounded[r];
    const float inverse = rounded == 0 ? 0 : 1 / rounded;  // 0 where there is no position
    char* const target = static_cast<char*>(attention) + (first + r) * size * kBytes;
    for (int64_t c = 0; c < size; c += kChunk) {
      Float a = Load<Float>(scratch.sums + r * columns + c) * inverse;
      Float b = Load<Float>(scratch.sums + r * columns + c + kLanes) * inverse;
      Words::Order(&a, &b);
      StoreColumns<Out>(target + c * kBytes, Least(size - c, kChunk), a, b);
    }
    if (lse == nullptr) continue;
    // Of a sum of powers of two. -inf where nothing was summed.
    const double log2_sum = double{scratch.reference[r]} * plan.exponent_scale +
                            __builtin_log2(double{total}) + plan.headroom + select::kSlack;
    lse[first + r] = static_cast<float>(log2_sum * 0.693147180559945309417);
  }
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_MERGE_H_
