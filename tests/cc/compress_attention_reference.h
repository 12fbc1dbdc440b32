// The compressed branch by its definition, for the tests of every kernel: attention, the scores of
// blocks, and which blocks are chosen.

#ifndef JAX_NSA_TESTS_COMPRESS_ATTENTION_REFERENCE_H_
#define JAX_NSA_TESTS_COMPRESS_ATTENTION_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "compress_attention.h"
#include "expect.h"
#include "reference.h"

namespace jax_nsa::testing {

class CompressAttentionReference : PagedReference {
 public:
  using Problem = compress_attention::Problem;
  using Arrays = compress_attention::Arrays;

  // `exact_order`: whether importances that may differ by rounding are equal by design, so that
  // blocks come in exactly one order.
  CompressAttentionReference(const Problem& problem, const Arrays& arrays, bool exact_order = false)
      : PagedReference(problem, arrays),
        problem_(problem),
        arrays_(arrays),
        exact_order_(exact_order),
        items_(problem.rows * problem.key_value_heads) {}

  // Compares the results of a call.
  void Check(const Arrays& results, const std::string& context) {
    for (int64_t b = 0; b < problem_.sequences; ++b) {
      const OwnedRows rows = RowsOf(b);
      const bool faulty = IsFaulty(b, rows);
      for (int64_t t = 0; t < rows.owned; ++t) {
        for (int64_t h = 0; h < problem_.key_value_heads; ++h) {
          CheckItem(results, b, rows, t, h, faulty,
                    context + ", sequence " + std::to_string(b) + " of length " +
                        std::to_string(arrays_.lengths[b]) + " token " + std::to_string(t) +
                        " kv head " + std::to_string(h));
        }
      }
    }
  }

 private:
  // A kv head of a row of query.
  struct Item {
    std::vector<Attention> heads;             // of the group
    std::vector<std::vector<double>> scores;  // of each head, for each block
  };

  int64_t Tokens(int64_t b) const {  // original ones that the newest token counts
    if (problem_.blocks.aligned) return arrays_.select_lengths[b];
    const int64_t length = arrays_.lengths[b];
    return length == 0 ? 0
                       : (length - 1) * problem_.blocks.compress_stride +
                             problem_.blocks.compress_block_size;
  }

  // The blocks that a token chooses from: those begun by the original tokens that it counts.
  int64_t CountBlocks(int64_t b, const OwnedRows& rows, int64_t t) const {
    const int64_t tokens = Tokens(b) - (problem_.causal ? rows.count - 1 - t : 0);
    return tokens <= 0 ? 0 : (tokens - 1) / problem_.blocks.select_block_size + 1;
  }

  bool IsFaulty(int64_t b, const OwnedRows& rows) const {
    const int64_t length = arrays_.lengths[b];
    if (!rows.fits() || !IsLegalLength(b)) return true;
    if (arrays_.early_counts != nullptr && arrays_.early_counts[b] < 0) return true;
    if (problem_.blocks.aligned) {
      const int64_t past = arrays_.select_lengths[b] - problem_.blocks.compress_block_size;
      const int64_t windows = past < 0 ? 0 : past / problem_.blocks.compress_stride + 1;
      if (arrays_.select_lengths[b] < 0 || windows != length) return true;
    }
    for (int64_t i = 0; i < length && rows.count > 0; ++i) {
      if (!HasPage(b, i)) return true;
    }
    return false;
  }

  // score[j] = sum over m < l'/d and n < floor(l/d) of p[(l'/d) (j + 1) - m - n], or, where blocks
  // are aligned, of p[(l'/d) j + m - n]: equation 9 of the NSA paper, as CANN and as open training
  // codes read it.
  std::vector<double> Scores(const std::vector<double>& p, int64_t num_blocks) const {
    const Blocks& blocks = problem_.blocks;
    const int64_t m_count = blocks.select_block_size / blocks.compress_stride;
    const int64_t n_count = blocks.compress_block_size / blocks.compress_stride;
    std::vector<double> scores(problem_.max_blocks());
    for (int64_t j = 0; j < num_blocks; ++j) {
      for (int64_t m = 0; m < m_count; ++m) {
        for (int64_t n = 0; n < n_count; ++n) {
          const int64_t i = blocks.aligned ? m_count * j + m - n : m_count * (j + 1) - m - n;
          if (i >= 0 && i < static_cast<int64_t>(p.size())) scores[j] += p[i];
        }
      }
    }
    return scores;
  }

  Item Spoilt() const {
    const int64_t group = problem_.heads / problem_.key_value_heads;
    return {
        std::vector<Attention>(group, Filled(problem_.value_size, kNaN, kNaN)),
        std::vector<std::vector<double>>(group, std::vector<double>(problem_.max_blocks(), kNaN))};
  }

  Item Compute(int64_t b, const OwnedRows& rows, int64_t t, int64_t h) const {
    Item item;
    const int64_t group = problem_.heads / problem_.key_value_heads;
    const bool late = arrays_.early_counts == nullptr || t >= arrays_.early_counts[b];
    const bool has_token = t < rows.count && arrays_.lengths[b] > 0;
    std::vector<int64_t> positions(has_token ? arrays_.lengths[b] - (late ? 0 : 1) : 0);
    std::iota(positions.begin(), positions.end(), 0);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = (rows.first + t) * problem_.heads + h * group + g;
      item.heads.push_back(Attend(b, head, positions));
      item.scores.push_back(
          Scores(item.heads.back().probabilities, CountBlocks(b, rows, rows.count - 1)));
    }
    return item;
  }

  void CheckItem(const Arrays& results, int64_t b, const OwnedRows& rows, int64_t t, int64_t h,
                 bool faulty, const std::string& context) {
    const int64_t row = rows.first + t, at = row * problem_.key_value_heads + h;
    if (!faulty && items_[at].heads.empty()) items_[at] = Compute(b, rows, t, h);
    const Item& item = faulty ? spoilt_ : items_[at];
    const int64_t blocks = faulty || t >= rows.count ? 0 : CountBlocks(b, rows, t);
    const int64_t group = static_cast<int64_t>(item.heads.size());
    std::vector<double> importance(blocks), doubt(blocks);
    for (int64_t g = 0; g < group; ++g) {
      const Attention& expected = item.heads[g];
      const int64_t head = row * problem_.heads + h * group + g;
      const std::string here = context + " head " + std::to_string(g);
      ExpectRow(problem_.attention_dtype, results.attention, head * problem_.value_size,
                expected.row, Tolerance(problem_.dtype) + expected.rounding, here);
      if (results.lse != nullptr) ExpectLse(results.lse[head], expected, here);
      for (int64_t j = 0; j < problem_.max_blocks(); ++j) {
        const double score = item.scores[g][j];
        const double legal = (1e-4 + expected.rounding) * score + 1e-30;
        if (j < blocks) {
          importance[j] += score;
          doubt[j] += legal;
        }
        if (results.block_scores == nullptr || std::isnan(expected.lse) != faulty) continue;
        const float got = results.block_scores[head * problem_.max_blocks() + j];
        EXPECT(faulty ? std::isnan(got) : std::abs(got - score) <= legal)
            << here << ": score of block " << j << " is " << got << ", expected " << score;
      }
    }
    CheckIndices(results.topk_indices + at * problem_.select_count, importance, doubt, context);
  }

  // Blocks come by descending importance, the first of equals first, forced ones before all others.
  void CheckIndices(const int32_t* indices, std::vector<double> importance,
                    const std::vector<double>& doubt, const std::string& context) const {
    const int64_t blocks = static_cast<int64_t>(importance.size());
    for (int64_t j = 0; j < blocks; ++j) {
      if (std::isnan(importance[j])) importance[j] = -1;  // below every number
      if (j < problem_.forced.first || j >= blocks - problem_.forced.last) {
        importance[j] = std::numeric_limits<double>::max();
      }
    }
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return importance[i] > importance[j]; });
    // Blocks without a position are exactly equal, unless others are too little to tell from them.
    const bool vanishing = std::any_of(importance.begin(), importance.end(),
                                       [](double x) { return x > 0 && x < 1e-30; });
    std::vector<bool> seen(blocks);
    for (int64_t n = 0; n < problem_.select_count; ++n) {
      const int64_t got = indices[n], expected = n < blocks ? order[n] : -1;
      const bool is_new = got >= 0 && got < blocks && !seen[got];
      if (is_new) seen[got] = true;
      if (got == expected && (got == -1 || is_new)) continue;
      EXPECT(is_new && expected >= 0 && !exact_order_ && (importance[expected] > 0 || vanishing) &&
             std::abs(importance[got] - importance[expected]) <= doubt[got] + doubt[expected])
          << context << ": index " << n << " is " << got << ", expected " << expected
          << ", importances " << (is_new ? importance[got] : NAN) << " and "
          << (expected >= 0 ? importance[expected] : NAN);
    }
  }

  const Problem problem_;
  const Arrays arrays_;
  const bool exact_order_;
  const Item spoilt_ = Spoilt();
  std::vector<Item> items_;  // computed when first compared
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_COMPRESS_ATTENTION_REFERENCE_H_
