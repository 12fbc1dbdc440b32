// The kernel of the selected branch, for the instruction set that this file is compiled for: which
// types and products serve a call.

#include "cpu/select_kernel.h"

#include "cpu/select_attend.h"
#include "cpu/select_merge.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

using select::Partial;
using select::Plan;
using select::Unit;
using select::Upcoming;

// Weights are rounded for products of pairs; short rows of values would not average that away.
bool PairsValues(const Plan& plan) { return plan.problem.value_size >= 16; }

int64_t ScratchSize(const Plan& plan) {
  return Most(SelectScratch(plan, nullptr).size, MergeScratch(plan, nullptr).size);
}

template <class Type, class KeyProducts, class ValueProducts>
void Attend(const Plan& plan, const Unit& unit, const Upcoming& upcoming, const Partial* partials,
            void* scratch) {
  SelectAttention<Type, KeyProducts, ValueProducts>(plan, unit, partials, scratch).Run(upcoming);
}

void AttendAny(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
               const Partial* partials, void* scratch) {
  switch (plan.problem.dtype) {
    case DataType::kBFloat16: {
      const auto attend = PairsValues(plan) ? Attend<BFloat16, BFloat16Products, BFloat16Products>
                                            : Attend<BFloat16, BFloat16Products, FloatProducts>;
      return attend(plan, unit, upcoming, partials, scratch);
    }
    case DataType::kFloat16:
      return Attend<Float16, FloatProducts, FloatProducts>(plan, unit, upcoming, partials, scratch);
    case DataType::kFloat32:
      return Attend<Float32, FloatProducts, FloatProducts>(plan, unit, upcoming, partials, scratch);
  }
}

void MergeAny(const Plan& plan, int64_t row, int64_t head, const Partial* const* partials,
              int64_t count, void* attention, float* lse, void* scratch) {
  const auto merge = [&](auto merge_typed) {
    merge_typed(plan, row, head, partials, count, attention, lse, scratch);
  };
  const bool same_type = plan.problem.attention_dtype == plan.problem.dtype;
  switch (plan.problem.dtype) {
    case DataType::kBFloat16: {
      using Pairs = ValueWords<BFloat16, BFloat16Products>;
      using Floats = ValueWords<BFloat16, FloatProducts>;
      if (PairsValues(plan)) {
        return merge(same_type ? MergePartials<Pairs, BFloat16> : MergePartials<Pairs, Float32>);
      }
      return merge(same_type ? MergePartials<Floats, BFloat16> : MergePartials<Floats, Float32>);
    }
    case DataType::kFloat16: {
      using Floats = ValueWords<Float16, FloatProducts>;
      return merge(same_type ? MergePartials<Floats, Float16> : MergePartials<Floats, Float32>);
    }
    case DataType::kFloat32:
      return merge(MergePartials<ValueWords<Float32, FloatProducts>, Float32>);
  }
}

}  // namespace

extern const select::Kernel kSelectKernel;
#define JAX_NSA_STRING(name) #name
#define JAX_NSA_EXPANDED_STRING(name) JAX_NSA_STRING(name)
const select::Kernel kSelectKernel = {JAX_NSA_EXPANDED_STRING(JAX_NSA_ISA), kLanes, ScratchSize,
                                      AttendAny, MergeAny};

}  // namespace jax_nsa::cpu::JAX_NSA_ISA
