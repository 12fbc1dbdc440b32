// The kernel, for the instruction set that this file is compiled for: which types and multipliers
// serve a call.

#include "cpu/compress_attention_kernel.h"

#include "cpu/compress_attention_attend.h"
#include "cpu/compress_attention_merge.h"
#include "cpu/simd.h"
#include "cpu/vectors.h"
#if defined(__AMX_BF16__) || defined(JAX_NSA_EMULATED_AMX)
#define JAX_NSA_TILES
#include "cpu/amx.h"
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

int64_t ScratchSize(const Plan& plan, int64_t heads, int64_t padded_rows) {
  return Scratch(plan, heads, padded_rows, nullptr).size;
}

template <class Type, class Multiplier>
void Attend(const Plan& plan, const Unit& unit, const Upcoming& upcoming, const Partial* partials,
            void* scratch) {
  const typename Multiplier::Scope scope(unit.padded_rows);
  Attention<Type, Multiplier>(plan, unit, partials, scratch).Run(upcoming);
}

// Who attends by a multiplier, and merges what it leaves.
struct Functions {
  void (*attend)(const Plan&, const Unit&, const Upcoming&, const Partial*, void*);
  void (*merge)(const Plan&, const Unit&, int64_t head, int64_t splits, int64_t pages_per_split,
                const Partial*, float* importance, float* peak, float* total);
};

template <class Type, class Multiplier>
Functions By(const Plan& plan) {
  using Words = typename Multiplier::Words;
  const bool same_type = plan.problem.attention_dtype == plan.problem.dtype;
  return {Attend<Type, Multiplier>, same_type ? Merge<Words, Type> : Merge<Words, Float32>};
}

Functions Find(const Plan& plan, [[maybe_unused]] const Unit& unit) {
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      // Weights are rounded for products of pairs; short rows of values would not average that
      // away.
      if (plan.problem.value_size < 16) {
        return By<BFloat16, Vectors<BFloat16, BFloat16Products, FloatProducts>>(plan);
      }
#if defined(JAX_NSA_TILES)
      // One row or two leave most of a tile empty: vectors take no longer, mostly less.
      if (unit.padded_rows > 2) return By<BFloat16, AmxTiles>(plan);
#endif
      return By<BFloat16, Vectors<BFloat16, BFloat16Products, BFloat16Products>>(plan);
    case DataType::kFloat16:
      return By<Float16, Vectors<Float16, FloatProducts, FloatProducts>>(plan);
    case DataType::kFloat32:
      break;
  }
  // Sums of many products hold float32's accuracy if they are added up in parts.
  return By<Float32, Vectors<Float32, FloatProducts, FloatProducts, 32>>(plan);
}

void AttendAny(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
               const Partial* partials, void* scratch) {
  Find(plan, unit).attend(plan, unit, upcoming, partials, scratch);
}

void MergeAny(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
              int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
              float* total) {
  Find(plan, unit)
      .merge(plan, unit, head, splits, pages_per_split, partials, importance, peak, total);
}

}  // namespace

extern const compressed::Kernel kCompressedKernel;
#define JAX_NSA_STRING(name) #name
#define JAX_NSA_EXPANDED_STRING(name) JAX_NSA_STRING(name)
const compressed::Kernel kCompressedKernel = {JAX_NSA_EXPANDED_STRING(JAX_NSA_ISA), kLanes,
                                              ScratchSize, AttendAny, MergeAny};

}  // namespace jax_nsa::cpu::JAX_NSA_ISA
