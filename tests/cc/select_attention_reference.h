// The selected branch by its definition, for the tests of every kernel: attention to chosen blocks
// and to a window of the newest positions.

#ifndef JAX_NSA_TESTS_SELECT_ATTENTION_REFERENCE_H_
#define JAX_NSA_TESTS_SELECT_ATTENTION_REFERENCE_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "expect.h"
#include "reference.h"
#include "select_attention.h"

namespace jax_nsa::testing {

class SelectAttentionReference : PagedReference {
 public:
  using Problem = select_attention::Problem;
  using Arrays = select_attention::Arrays;
  enum Kind { kSelected, kWindow };
  static constexpr std::array<Kind, 2> kKinds = {kSelected, kWindow};

  // Integer operands may be spoilt, and mended, between checks.
  SelectAttentionReference(const Problem& problem, const Arrays& arrays)
      : PagedReference(problem, arrays),
        problem_(problem),
        arrays_(arrays),
        items_(2 * problem.rows * problem.heads) {}

  // Compares the results of a call.
  void Check(const Arrays& results, const std::string& context) {
    std::vector<bool> is_owned(problem_.rows);
    for (int64_t b = 0; b < problem_.sequences; ++b) {
      const OwnedRows rows = RowsOf(b);
      const bool faulty = !rows.fits() || !(problem_.partial || IsLegalLength(b));
      for (int64_t t = 0; t < rows.owned; ++t) {
        const int64_t row = rows.first + t, limit = arrays_.lengths[b] - (rows.count - 1 - t);
        is_owned[row] = true;
        for (int64_t h = 0; h < problem_.key_value_heads; ++h) {
          const std::string here = context + ", sequence " + std::to_string(b) + " of length " +
                                   std::to_string(arrays_.lengths[b]) + " token " +
                                   std::to_string(t) + " kv head " + std::to_string(h);
          if (faulty || (t < rows.count && IsFaulty(b, row, h, limit))) {
            CheckFilled(results, row, h, kNaN, kNaN, here);
          } else if (t >= rows.count) {
            CheckFilled(results, row, h, 0, -INFINITY, here + " absent");
          } else {
            CheckItem(results, b, row, h, limit, here);
          }
        }
      }
    }
    for (int64_t row = 0; row < problem_.rows; ++row) {
      for (int64_t h = 0; !is_owned[row] && h < problem_.key_value_heads; ++h) {
        CheckFilled(results, row, h, 0, -INFINITY, context + ", row of no sequence");
      }
    }
  }

  // Positions that a row seeing `limit` of them attends to, each as often as it does.
  static std::vector<int64_t> Positions(const Problem& problem, const Arrays& arrays, int64_t row,
                                        int64_t h, int64_t limit, Kind kind) {
    const int64_t capacity = problem.pages_per_sequence * problem.page_size;
    std::vector<int64_t> positions;
    const auto add = [&](int64_t first, int64_t end) {
      for (int64_t i = std::max<int64_t>(first, 0); i < std::min({end, limit, capacity}); ++i) {
        positions.push_back(i);
      }
    };
    if (kind == kWindow) {
      if (problem.window_size > 0) add(limit - problem.window_size, limit);
      return positions;
    }
    for (int64_t i = 0; i < problem.select_count; ++i) {
      const int64_t at = (row * problem.key_value_heads + h) * problem.select_count + i;
      const int64_t id = arrays.topk_indices[at], size = problem.select_block_size;
      if (id >= 0) add(id * size, (id + 1) * size);
    }
    return positions;
  }

 private:
  int64_t group() const { return problem_.heads / problem_.key_value_heads; }
  std::vector<int64_t> PositionsOf(int64_t row, int64_t h, int64_t limit, Kind kind) const {
    return Positions(problem_, arrays_, row, h, limit, kind);
  }

  // Whether a row names a block that its sequence has not begun, or needs a page that is none.
  bool IsFaulty(int64_t b, int64_t row, int64_t h, int64_t limit) const {
    for (int64_t i = 0; i < problem_.select_count && !problem_.partial; ++i) {
      const int64_t id =
          arrays_.topk_indices[(row * problem_.key_value_heads + h) * problem_.select_count + i];
      if (id < -1 || id * problem_.select_block_size >= std::max(arrays_.lengths[b], 0)) {
        return true;
      }
    }
    for (Kind kind : kKinds) {
      for (int64_t position : PositionsOf(row, h, limit, kind)) {
        if (!HasPage(b, position)) return true;
      }
    }
    return false;
  }

  void Compare(const Arrays& results, Kind kind, int64_t head, const Attention& expected,
               const std::string& context) const {
    const bool window = kind == kWindow;
    const void* const attention = window ? results.window_attention : results.attention;
    const float* const lse = window ? results.window_lse : results.lse;
    const std::string here = context + (window ? " window" : " selected");
    if (attention != nullptr) {
      ExpectRow(problem_.attention_dtype, attention, head * problem_.value_size, expected.row,
                Tolerance(problem_.dtype) + expected.rounding, here);
    }
    if (lse != nullptr) ExpectLse(lse[head], expected, here);
  }

  void CheckFilled(const Arrays& results, int64_t row, int64_t h, double value, double lse,
                   const std::string& context) const {
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t head = row * problem_.heads + h * group() + g;
      for (Kind kind : kKinds) {
        Compare(results, kind, head, Filled(problem_.value_size, value, lse), context);
      }
    }
  }

  void CheckItem(const Arrays& results, int64_t b, int64_t row, int64_t h, int64_t limit,
                 const std::string& context) {
    for (int64_t g = 0; g < group(); ++g) {
      const int64_t head = row * problem_.heads + h * group() + g;
      const std::string here = context + " head " + std::to_string(g);
      for (Kind kind : kKinds) {
        std::optional<Attention>& expected = items_[2 * head + kind];
        if (!expected) expected = Attend(b, head, PositionsOf(row, h, limit, kind));
        Compare(results, kind, head, *expected, here);
      }
    }
  }

  const Problem problem_;
  const Arrays arrays_;
  std::vector<std::optional<Attention>> items_;  // computed when first compared
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_SELECT_ATTENTION_REFERENCE_H_
