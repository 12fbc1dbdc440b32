// From scores to weights, tile by tile.

#ifndef JAX_NSA_CPU_SELECT_SOFTMAX_H_
#define JAX_NSA_CPU_SELECT_SOFTMAX_H_

#include <cstdint>

#include "cpu/operands.h"
#include "cpu/select_kernel.h"
#include "cpu/select_tile.h"
#include "cpu/simd.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Weights are powers of two, relative to a reference of each row: its greatest product, or a little
// less, as what was summed is only rescaled when a product exceeds the reference by much. With
// `pairs`, weights of two positions are rounded into a word. Means divide by the sum of what was
// rounded: where one position has nearly all the weight, rounding it must not move the mean.
template <class Type, bool pairs>
class Softmax {
 public:
  Softmax(const select::Plan& plan, float* scores, uint32_t* words)
      : scores_(scores),
        words_(words),
        rows_(plan.group),
        scale_(plan.exponent_scale),
        slack_(select::kSlack / scale_ < kMostSlack ? select::kSlack / scale_ : kMostSlack),
        shift_(plan.headroom + select::kSlack) {}

  // Begins a section.
  void Begin(const select::Partial& partial, int64_t columns) {
    for (int64_t i = 0; i < rows_ * columns; i += kLanes) Store(partial.attention + i, Float{});
    for (int64_t i = 0; i < stride_; i += kLanes) {
      Store(partial.reference + i, Set(select::kNoPeak));
      Store(partial.total + i, Float{});
      Store(partial.rounded + i, Float{});
    }
    begun_ = true;
  }

  // Turns the scores of a tile of `count` positions into weights, and adds these to the totals.
  void Weigh(int64_t count, const select::Partial& partial, int64_t columns) {
    const int64_t end = RoundUp(count, kGranule) * rows_;
    for (int64_t i = count * rows_; i < end; ++i) scores_[i] = -__builtin_inff();
    for (int64_t v = 0; v < stride_; v += kLanes) {
      const Float peak = Peak(v, end);
      const Float reference = Load<Float>(partial.reference + v);
      if (begun_ || AnyGreater(peak, reference + slack_)) Raise(v, peak, partial, columns);
      WithConstant(Least(rows_, kLanes), [&](auto rows) { WeighRows<rows()>(v, end, partial); });
    }
    begun_ = false;
  }

  // Ends a section. Several lanes hold the total of a row where a vector holds several positions.
  void End(const select::Partial& partial) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t lane = r + rows_; lane < kLanes; lane += rows_) {
        partial.total[r] += partial.total[lane];
        partial.rounded[r] += partial.rounded[lane];
      }
    }
  }

  // The weights, [position][row], or with `pairs` [pair of positions][row].
  const uint32_t* words() const {
    return pairs ? words_ : reinterpret_cast<const uint32_t*>(scores_);
  }

 private:
  static constexpr float kMostSlack = 1e30f;
  static constexpr int kChains = 4;  // of what is compared one after another

  // The greatest score of each lane.
  Float Peak(int64_t v, int64_t end) const {
    Float peaks[kChains];
    for (Float& chain : peaks) chain = Set(-__builtin_inff());
    int64_t i = v;
    for (; i + (kChains - 1) * stride_ < end; i += kChains * stride_) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        peaks[c] = Max(Load<Float>(scores_ + i + c * stride_), peaks[c]);
      }
    }
    for (; i < end; i += stride_) peaks[0] = Max(Load<Float>(scores_ + i), peaks[0]);
    return Max(Max(peaks[0], peaks[1]), Max(peaks[2], peaks[3]));
  }

  // Makes the peak the reference of rows v and further, and rescales what was summed.
  [[gnu::noinline]] void Raise(int64_t v, Float peak, const select::Partial& partial,
                               int64_t columns) const {
    peak = GreatestOfRows(peak, rows_);
    const Float old = Load<Float>(partial.reference + v);
    peak = Max(peak, old);
    Store(partial.reference + v, peak);
    if (begun_) return;
    float factors[kLanes];
    Store(factors, Exp2((old - peak) * scale_));
    Store(partial.total + v, Load<Float>(partial.total + v) * Load<Float>(factors));
    Store(partial.rounded + v, Load<Float>(partial.rounded + v) * Load<Float>(factors));
    for (int64_t r = 0; r < Least(rows_, kLanes); ++r) {
      if (factors[r] == 1.0f) continue;
      float* const row = partial.attention + (v + r) * columns;
      for (int64_t c = 0; c < columns; c += kLanes) {
        Store(row + c, Load<Float>(row + c) * factors[r]);
      }
    }
  }

  // The weight of a vector of scores. The difference first: however large products are, that of the
  // greatest is 0.
  inline Float Weight(int64_t i, Float reference) const {
    return Exp2((Load<Float>(scores_ + i) - reference) * scale_ - shift_);
  }

  // Of the rows of a vector, of which each position has `rows`.
  template <int rows>
  void WeighRows(int64_t v, int64_t end, const select::Partial& partial) {
    const Float reference = Load<Float>(partial.reference + v);
    Float even_total = Load<Float>(partial.total + v), odd_total = {};
    Float rounded = Load<Float>(partial.rounded + v);
    uint32_t* target = words_ + v;
    for (int64_t i = v; i < end; i += 2 * stride_, target += stride_) {
      const bool both = i + stride_ < end;
      const Float even = Weight(i, reference);
      const Float odd = both ? Weight(i + stride_, reference) : Float{};
      even_total += even;
      odd_total += odd;
      if constexpr (pairs) {
        const Word words = Type::template RoundPairs<rows>(even, odd);
        rounded = BFloat16Products::MultiplyAdd(words, Word{} + 0x3f803f80u, rounded);  // by 1
        Store(target, words);
      } else {
        Store(scores_ + i, even);
        if (both) Store(scores_ + i + stride_, odd);
      }
    }
    const Float total = even_total + odd_total;
    Store(partial.total + v, total);
    Store(partial.rounded + v, pairs ? rounded : total);
  }

  float* const scores_;
  uint32_t* const words_;
  const int64_t rows_;
  const int64_t stride_ = Most(rows_, kLanes);  // from one vector of a row to the next
  const float scale_, slack_, shift_;
  bool begun_ = false;  // the section has no tile yet
};

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_SELECT_SOFTMAX_H_
