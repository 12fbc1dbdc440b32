// The kernel, for the instruction set that this file is compiled for: which types and multipliers
// serve a call.

#include "cpu/kernel.h"

#include "cpu/attend.h"
#include "cpu/merge.h"
#include "cpu/multiply.h"
#include "cpu/simd.h"
#if defined(__AMX_BF16__) || defined(JAX_NSA_EMULATED_AMX)
#define JAX_NSA_TILES
#include "cpu/amx.h"
#endif

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

int64_t ScratchSize(const Plan& plan, int64_t heads, int64_t padded_rows) {
  return Scratch(plan, heads, padded_rows, nullptr).size;
}

template <class Type, class KeysBy, class ValuesBy>
void Attend(const Plan& plan, const Unit& unit, const Upcoming& upcoming, const Partial* partials,
            void* scratch) {
  Attention<Type, KeysBy, ValuesBy>(plan, unit, partials, scratch).Run(upcoming);
}

using ByFloats = Vectors<FloatProducts>;
// Sums of many products hold float32's accuracy if they are added up in parts.
using ByFloatsInParts = Vectors<FloatProducts, 32>;

void AttendBFloat16(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
                    const Partial* partials, void* scratch) {
#if defined(JAX_NSA_TILES)
  const TileScope tiles(unit.padded_rows);
  using Multiplier = AmxTiles;
#else
  using Multiplier = Vectors<BFloat16Products>;
#endif
  // Weights are rounded for products of pairs; short rows of values would not average that away.
  const auto attend = plan.problem.value_size < 16 ? Attend<BFloat16, Multiplier, ByFloats>
                                                   : Attend<BFloat16, Multiplier, Multiplier>;
  attend(plan, unit, upcoming, partials, scratch);
}

void AttendAny(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
               const Partial* partials, void* scratch) {
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      return AttendBFloat16(plan, unit, upcoming, partials, scratch);
    case DataType::kFloat16:
      return Attend<Float16, ByFloats, ByFloats>(plan, unit, upcoming, partials, scratch);
    case DataType::kFloat32:
      return Attend<Float32, ByFloatsInParts, ByFloats>(plan, unit, upcoming, partials, scratch);
  }
}

void MergeAny(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
              int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
              float* total) {
  const auto merge = [&](auto merge_typed) {
    merge_typed(plan, unit, head, splits, pages_per_split, partials, importance, peak, total);
  };
  const bool same_type = plan.problem.attention_dtype == plan.problem.dtype;
  switch (plan.problem.dtype) {
    case DataType::kBFloat16:
      return merge(same_type ? Merge<BFloat16, BFloat16> : Merge<BFloat16, Float32>);
    case DataType::kFloat16:
      return merge(same_type ? Merge<Float16, Float16> : Merge<Float16, Float32>);
    case DataType::kFloat32:
      return merge(Merge<Float32, Float32>);
  }
}

}  // namespace

extern const Kernel kKernel;
#define JAX_NSA_STRING(name) #name
#define JAX_NSA_EXPANDED_STRING(name) JAX_NSA_STRING(name)
const Kernel kKernel = {JAX_NSA_EXPANDED_STRING(JAX_NSA_ISA), kLanes, ScratchSize, AttendAny,
                        MergeAny};

}  // namespace jax_nsa::cpu::JAX_NSA_ISA
