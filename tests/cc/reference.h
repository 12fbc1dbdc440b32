// Attention over paged caches by its definition, in loops of double precision, and how near a
// kernel's results must come to it. What an operator adds is in <operator>_reference.h.
//
// Nothing here shares a rule with the kernels: not even which rows are a sequence's.

#ifndef JAX_NSA_TESTS_REFERENCE_H_
#define JAX_NSA_TESTS_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "elements.h"
#include "expect.h"
#include "paged.h"

namespace jax_nsa::testing {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A row of values, and the sizes that rounding errors are measured by: of each value its square, or
// the sum of its terms' squares where they cancel.
struct Row {
  std::vector<double> values, squares;
};

// The attention of one query head.
struct Attention {
  Row row;
  double lse = -INFINITY;
  std::vector<double> probabilities = {};  // of the positions attended to
  double rounding = 0;                     // that a score may suffer in float32
};

// Attention to no position at all gives zeros and -inf; what a fault spoilt is NaN.
inline Attention Filled(int64_t value_size, double value, double lse) {
  return {{std::vector<double>(value_size, value), std::vector<double>(value_size)}, lse};
}

// What a result's own rounding, that of the probabilities, and fast exponentials may cost.
inline double Tolerance(DataType dtype) {
  return dtype == DataType::kBFloat16 ? 4e-3 : dtype == DataType::kFloat16 ? 6e-4 : 1e-5;
}

// Compares a result row that starts at element `first`, NaN exactly where it must be.
inline void ExpectRow(DataType dtype, const void* results, int64_t first, const Row& expected,
                      double tolerance, const std::string& context) {
  double error = 0, norm = 0;
  bool same_nan = true;
  for (size_t c = 0; c < expected.values.size(); ++c) {
    const char* const at = static_cast<const char*>(results) + (first + c) * SizeOf(dtype);
    const double got = Decode(dtype, at), value = expected.values[c];
    same_nan &= std::isnan(got) == std::isnan(value);
    if (std::isnan(value)) continue;
    error += (got - value) * (got - value);
    norm += expected.squares[c];
  }
  EXPECT(same_nan) << context << ": attention is NaN where it must not be, or the reverse";
  EXPECT(!same_nan || std::sqrt(error) <= tolerance * std::sqrt(norm))
      << context << ": attention off by " << std::sqrt(error) << " of " << std::sqrt(norm);
}

inline void ExpectLse(float got, const Attention& expected, const std::string& context) {
  const double lse = expected.lse, legal = 1e-5 + 1e-6 * std::abs(lse) + 4 * expected.rounding;
  EXPECT(std::isnan(lse) ? std::isnan(got) : got == lse || std::abs(got - lse) <= legal)
      << context << ": lse is " << got << ", expected " << lse;
}

// Rows of query that are one sequence's, the first `count` of them tokens.
struct OwnedRows {
  int64_t first, owned, count;
  bool fits() const { return count >= 0 && count <= owned; }
};

// The operands of any paged call. They are read when they are needed, but for query, key and value.
class PagedReference {
 public:
  PagedReference(const PagedProblem& problem, const PagedArrays& arrays)
      : paged_(problem),
        operands_(arrays),
        query_(DecodeAll(arrays.query, problem.rows * problem.heads * problem.head_size)),
        key_(DecodeAll(arrays.key, PoolRows() * problem.key_value_heads * problem.head_size)),
        value_(DecodeAll(arrays.value, PoolRows() * problem.key_value_heads * problem.value_size)) {
  }

 protected:
  OwnedRows RowsOf(int64_t b) const {
    const int32_t* const firsts = operands_.first_rows;
    const auto first = [&](int64_t n) {
      if (firsts == nullptr) return n * paged_.tokens;
      return n < paged_.sequences ? int64_t{firsts[n]} : paged_.rows;
    };
    const int32_t* const counts = operands_.token_counts;
    return {first(b), first(b + 1) - first(b), counts == nullptr ? paged_.tokens : counts[b]};
  }

  int64_t capacity() const { return paged_.pages_per_sequence * paged_.page_size; }
  bool IsLegalLength(int64_t b) const {
    return operands_.lengths[b] >= 0 && operands_.lengths[b] <= capacity();
  }
  int64_t Page(int64_t b, int64_t position) const {
    return operands_.block_table[b * paged_.pages_per_sequence + position / paged_.page_size];
  }
  bool HasPage(int64_t b, int64_t position) const {
    return Page(b, position) >= 0 && Page(b, position) < paged_.num_pages;
  }

  // Attention of a query head, counted over all rows, to positions of sequence b.
  Attention Attend(int64_t b, int64_t head, const std::vector<int64_t>& positions) const {
    const int64_t key_value_heads = paged_.key_value_heads;
    const int64_t h = head % paged_.heads / (paged_.heads / key_value_heads);
    Attention attention = Filled(paged_.value_size, 0, -INFINITY);
    if (positions.empty()) return attention;
    const auto row = [&](int64_t position) {
      return (Page(b, position) * paged_.page_size + position % paged_.page_size) *
                 key_value_heads +
             h;
    };
    std::vector<double>& p = attention.probabilities;
    double peak = -INFINITY, total = 0, size = 0;
    for (int64_t position : positions) {
      const float* const query = &query_[head * paged_.head_size];
      const float* const key = &key_[row(position) * paged_.head_size];
      double score = 0, absolute = 0;
      for (int64_t c = 0; c < paged_.head_size; ++c) {
        const double product = double{query[c]} * key[c];
        score += product;
        absolute += std::abs(product);
      }
      p.push_back(score * double{paged_.scale});
      size = std::max(size, absolute * std::abs(paged_.scale));
      peak = std::max(peak, p.back());
    }
    for (double& x : p) total += x = std::exp(x - peak);
    for (double& x : p) x /= total;
    attention.lse = peak + std::log(total);
    attention.rounding = size * std::ldexp(1.0, -24);
    auto& [values, squares] = attention.row;
    for (size_t n = 0; n < positions.size(); ++n) {
      const float* const value = &value_[row(positions[n]) * paged_.value_size];
      for (int64_t c = 0; c < paged_.value_size; ++c) {
        const double term = p[n] * value[c];
        values[c] += term;
        squares[c] += term * term;
      }
    }
    for (int64_t c = 0; c < paged_.value_size; ++c) {
      squares[c] = std::max(squares[c], values[c] * values[c]);
    }
    return attention;
  }

 private:
  int64_t PoolRows() const { return paged_.num_pages * paged_.page_size; }

  std::vector<float> DecodeAll(const void* array, int64_t count) const {
    std::vector<float> values(count);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = Decode(paged_.dtype, static_cast<const char*>(array) + i * SizeOf(paged_.dtype));
    }
    return values;
  }

  const PagedProblem paged_;
  const PagedArrays operands_;
  const std::vector<float> query_, key_, value_;
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_REFERENCE_H_
