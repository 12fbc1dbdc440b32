// The CPU kernel of the selected branch against plain loops in double precision, for every
// instruction set that this machine can run, and its bits against themselves on several threads.
//
// Problems are drawn over the whole domain. Whatever a row of query must not read is NaN, and what
// lies around the pools of keys and values is not there to be read.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/select_isa.h"
#include "cpu/select_run.h"
#include "expect.h"
#include "select_problems.h"

namespace jax_nsa::cpu::select {
namespace {

using testing::Case;
using testing::Decode;
using testing::Drawer;
using testing::Encode;
using testing::Pool;
using testing::SizeOf;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Results {
  std::vector<char> attention, window;
  std::vector<float> lse, window_lse;

  bool operator==(const Results& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
    };
    return attention == other.attention && window == other.window && same(lse, other.lse) &&
           same(window_lse, other.window_lse);
  }
};

class Call {
 public:
  Call(const Case& c, Drawer& draw)
      : c_(c),
        p_(c_.problem),
        size_(SizeOf(p_.dtype)),
        key_row_(p_.key_value_heads * p_.head_size),
        value_row_(p_.key_value_heads * p_.value_size),
        queries_(p_.rows * p_.heads * p_.head_size, kNaN),
        keys_(p_.num_pages * p_.page_size * key_row_, kNaN),
        values_(p_.num_pages * p_.page_size * value_row_, kNaN),
        query_(queries_.size() * size_),
        key_(keys_.size() * size_),
        value_(values_.size() * size_) {
    std::set<int64_t> pages;
    ForItems([&](int64_t b, int64_t row, int64_t h, int64_t limit) {
      for (int64_t i = 0; i < group() * p_.head_size; ++i) {
        queries_[(row * p_.heads + h * group()) * p_.head_size + i] = draw.Value();
      }
      for (const bool window : {false, true}) {
        for (int64_t position : Positions(row, h, limit, window)) {
          pages.insert(b * p_.pages_per_sequence + position / p_.page_size);
          const int64_t at = PoolRow(b, position);
          if (!std::isnan(keys_[at * key_row_ + h * p_.head_size])) continue;
          for (int64_t i = 0; i < p_.head_size; ++i) {
            keys_[at * key_row_ + h * p_.head_size + i] = draw.Value();
          }
          for (int64_t i = 0; i < p_.value_size; ++i) {
            values_[at * value_row_ + h * p_.value_size + i] = draw.Value();
          }
        }
      }
    });
    // Pages that nobody needs are not even named.
    for (int64_t i = 0; i < static_cast<int64_t>(c_.table.size()); ++i) {
      if (pages.count(i) == 0) c_.table[i] = draw.Chance(0.5) ? -1 : 1 << 30;
    }
    Store(queries_, query_);
    Store(keys_, key_);
    Store(values_, value_);
  }

  Case& c() { return c_; }

  // Whether an item reads a page of its sequence.
  bool Needs(int64_t row, int64_t h, int64_t page) const {
    bool needs = false;
    ForItems([&](int64_t, int64_t r, int64_t n, int64_t limit) {
      for (const bool window : {false, true}) {
        if (r != row || n != h) continue;
        for (int64_t position : Positions(r, n, limit, window)) {
          needs |= position / p_.page_size == page;
        }
      }
    });
    return needs;
  }

  Results Compute(const Kernel& kernel, int threads) {
    const int64_t heads = p_.rows * p_.heads, bytes = heads * p_.value_size * ResultSize();
    Results r = {std::vector<char>(p_.select_count ? bytes : 0, 77),
                 std::vector<char>(p_.window_size ? bytes : 0, 77),
                 std::vector<float>(p_.select_count ? heads : 0, 77),
                 std::vector<float>(p_.window_size ? heads : 0, 77)};
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = c_.table.data();
    arrays.lengths = c_.lengths.data();
    arrays.token_counts = c_.counts.data();
    arrays.first_rows = c_.packed ? c_.firsts.data() : nullptr;
    arrays.topk_indices = p_.select_count ? c_.ids.data() : nullptr;
    arrays.attention = p_.select_count ? r.attention.data() : nullptr;
    arrays.window_attention = p_.window_size ? r.window.data() : nullptr;
    arrays.lse = p_.select_count ? r.lse.data() : nullptr;
    arrays.window_lse = p_.window_size ? r.window_lse.data() : nullptr;
    Run run(p_, arrays, kernel);
    std::vector<std::thread> helpers;
    std::atomic<int> last{0};
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&] { last += run.Work(); });
    last += run.Work();
    for (std::thread& helper : helpers) helper.join();
    EXPECT(last == 1) << last << " threads finished the last unit";
    return r;
  }

  // `spoilt(b, row, h)`: whether the results of an item must be NaN.
  template <class Spoilt>
  void Check(const Results& r, const std::string& context, Spoilt spoilt) const {
    std::vector<bool> seen(p_.rows * p_.key_value_heads);
    ForItems([&](int64_t b, int64_t row, int64_t h, int64_t limit) {
      seen[row * p_.key_value_heads + h] = true;
      const std::string at = context + " row " + std::to_string(row) + " head " + std::to_string(h);
      for (const bool window : {false, true}) {
        if (window ? p_.window_size == 0 : p_.select_count == 0) continue;
        const std::vector<char>& attention = window ? r.window : r.attention;
        const std::vector<float>& lse = window ? r.window_lse : r.lse;
        const std::string kind = at + (window ? " window" : " selected");
        if (spoilt(b, row, h)) {
          CheckAll(attention, lse, row, h, kNaN, kNaN, kind);
        } else {
          CheckItem(attention, lse, b, row, h, Positions(row, h, limit, window), kind);
        }
      }
    });
    for (int64_t i = 0; i < static_cast<int64_t>(seen.size()); ++i) {
      const int64_t row = i / p_.key_value_heads, h = i % p_.key_value_heads;
      if (seen[i] || spoilt(-1, row, h)) continue;
      if (p_.select_count) CheckAll(r.attention, r.lse, row, h, 0, -kInfinity, context + " absent");
      if (p_.window_size) CheckAll(r.window, r.window_lse, row, h, 0, -kInfinity, context);
    }
  }

 private:
  int64_t group() const { return p_.heads / p_.key_value_heads; }
  int64_t ResultSize() const { return SizeOf(p_.attention_dtype); }

  template <class Function>
  void ForItems(Function function) const {
    for (int64_t b = 0; b < p_.sequences; ++b) {
      for (int64_t t = 0; t < c_.counts[b]; ++t) {
        const int64_t row = (c_.packed ? c_.firsts[b] : b * p_.tokens) + t;
        for (int64_t h = 0; h < p_.key_value_heads; ++h) {
          function(b, row, h, c_.lengths[b] - (c_.counts[b] - 1 - t));
        }
      }
    }
  }

  // Positions that a row attends to, each as often as it does.
  std::vector<int64_t> Positions(int64_t row, int64_t h, int64_t limit, bool window) const {
    std::vector<int64_t> positions;
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t i = std::max<int64_t>(0, begin); i < end; ++i) {
        if (i < limit && i < p_.page_size * p_.pages_per_sequence) positions.push_back(i);
      }
    };
    if (window) {
      if (p_.window_size) add(limit - p_.window_size, limit);
      return positions;
    }
    for (int64_t i = 0; i < p_.select_count; ++i) {
      const int64_t id = c_.ids[(row * p_.key_value_heads + h) * p_.select_count + i];
      if (id >= 0) add(id * p_.select_block_size, std::min(limit, (id + 1) * p_.select_block_size));
    }
    return positions;
  }

  int64_t PoolRow(int64_t b, int64_t position) const {
    return int64_t{c_.table[b * p_.pages_per_sequence + position / p_.page_size]} * p_.page_size +
           position % p_.page_size;
  }

  void Store(const std::vector<float>& values, Pool& pool) const {
    for (size_t i = 0; i < values.size(); ++i) {
      Encode(p_.dtype, values[i], pool.data() + i * size_);
    }
  }

  double Result(const std::vector<char>& attention, int64_t i) const {
    return Decode(p_.attention_dtype, attention.data() + i * ResultSize());
  }

  void CheckAll(const std::vector<char>& attention, const std::vector<float>& lse, int64_t row,
                int64_t h, double value, double lse_value, const std::string& context) const {
    const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
    for (int64_t head = row * p_.heads + h * group(), n = 0; n < group(); ++head, ++n) {
      EXPECT(same(lse[head], lse_value)) << context << " lse " << lse[head];
      for (int64_t i = 0; i < p_.value_size; ++i) {
        const double got = Result(attention, head * p_.value_size + i);
        EXPECT(same(got, value)) << context << " attention " << got << ", expected " << value;
      }
    }
  }

  void CheckItem(const std::vector<char>& attention, const std::vector<float>& lse, int64_t b,
                 int64_t row, int64_t h, const std::vector<int64_t>& positions,
                 const std::string& context) const {
    if (positions.empty()) {
      return CheckAll(attention, lse, row, h, 0, -kInfinity, context + " of nothing");
    }
    for (int64_t head = row * p_.heads + h * group(), n = 0; n < group(); ++head, ++n) {
      std::vector<double> scores;
      double peak = -INFINITY, total = 0, size = 0;
      for (int64_t position : positions) {
        double score = 0, absolute = 0;
        const float* const key = &keys_[PoolRow(b, position) * key_row_ + h * p_.head_size];
        for (int64_t i = 0; i < p_.head_size; ++i) {
          const double product = double{queries_[head * p_.head_size + i]} * key[i];
          score += product;
          absolute += std::abs(product);
        }
        scores.push_back(score * double{p_.scale});
        size = std::max(size, absolute * std::abs(p_.scale));
        peak = std::max(peak, scores.back());
      }
      for (double& x : scores) total += x = std::exp(x - peak);
      const double rounding = 4 * size * std::ldexp(1.0, -24), expected = peak + std::log(total);
      EXPECT(std::abs(lse[head] - expected) <= 1e-5 + 1e-6 * std::abs(expected) + rounding)
          << context << " lse " << lse[head] << ", expected " << expected;
      double error = 0, norm = 0;
      for (int64_t i = 0; i < p_.value_size; ++i) {
        double sum = 0, squares = 0;
        for (size_t n = 0; n < positions.size(); ++n) {
          const double term =
              scores[n] / total *
              values_[PoolRow(b, positions[n]) * value_row_ + h * p_.value_size + i];
          sum += term;
          squares += term * term;
        }
        const double off = Result(attention, head * p_.value_size + i) - sum;
        error += off * off;
        norm += std::max(squares, sum * sum);
      }
      const double tolerance = p_.dtype == DataType::kBFloat16  ? 4e-3
                               : p_.dtype == DataType::kFloat16 ? 6e-4
                                                                : 1e-5;
      EXPECT(std::sqrt(error) <= (tolerance + rounding) * std::sqrt(norm))
          << context << " attention off by " << std::sqrt(error) << " of " << std::sqrt(norm);
    }
  }

  Case c_;
  const Problem p_;
  const int64_t size_, key_row_, value_row_;
  std::vector<float> queries_, keys_, values_;
  Pool query_, key_, value_;
};

void CheckThreads(Call& call, const Kernel& kernel, const Results& alone, std::string context) {
  for (int threads = 2; threads <= 8; threads += 3) {
    EXPECT(call.Compute(kernel, threads) == alone) << context << ": other bits, " << threads;
  }
}

// Something wrong in one sequence or item makes its results NaN, and nothing else.
void CheckFaults(Call& call, Drawer& draw, const Kernel& kernel, const std::string& context) {
  Case& c = call.c();
  const Problem& p = c.problem;
  const int64_t b = draw.Of(0, p.sequences - 1), first = c.packed ? c.firsts[b] : b * p.tokens;
  const int64_t packed_end = b + 1 < p.sequences ? c.firsts[b + 1] : p.rows;
  const int64_t end = c.packed ? packed_end : first + p.tokens;
  // Puts a bad value in the place of a good one.
  const auto check = [&](int32_t* value, int32_t bad, const char* what, auto spoilt) {
    const int32_t good = *value;
    *value = bad;
    const Results results = call.Compute(kernel, 1);
    *value = good;
    call.Check(results, context + what, spoilt);
  };
  const auto in_sequence = [&](int64_t, int64_t row, int64_t) { return row >= first && row < end; };
  check(&c.counts[b], draw.Chance(0.5) ? -1 : static_cast<int32_t>(end - first + 1), " bad count",
        in_sequence);
  if (!p.partial) {
    const int32_t length = draw.Chance(0.5) ? -1 : static_cast<int32_t>(p.capacity() + 1);
    check(&c.lengths[b], length, " bad length", in_sequence);
  }
  if (c.counts[b] == 0) return;
  const int64_t row = first + draw.Of(0, c.counts[b] - 1), h = draw.Of(0, p.key_value_heads - 1);
  if (p.select_count > 0 && !p.partial) {
    const int64_t blocks = (c.lengths[b] + p.select_block_size - 1) / p.select_block_size;
    const int64_t id = (row * p.key_value_heads + h) * p.select_count;
    check(&c.ids[id + draw.Of(0, p.select_count - 1)],
          draw.Chance(0.5) ? -2 : static_cast<int32_t>(blocks), " bad id",
          [&](int64_t, int64_t r, int64_t n) { return r == row && n == h; });
  }
  const int64_t page = draw.Of(0, p.pages_per_sequence - 1);
  check(&c.table[b * p.pages_per_sequence + page], static_cast<int32_t>(p.num_pages), " bad page",
        [&](int64_t s, int64_t r, int64_t n) { return s == b && call.Needs(r, n, page); });
}

}  // namespace

void Test(const Kernel& kernel) {
  std::cout << "kernel " << kernel.name << std::endl;
  Drawer draw(3);
  for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
    for (int number = 0; number < 40; ++number) {
      const std::string context = std::string(kernel.name) + " dtype " +
                                  std::to_string(static_cast<int>(dtype)) + " case " +
                                  std::to_string(number);
      Call call(draw.Draw(dtype), draw);
      const Results alone = call.Compute(kernel, 1);
      call.Check(alone, context, [](int64_t, int64_t, int64_t) { return false; });
      CheckThreads(call, kernel, alone, context);
      CheckFaults(call, draw, kernel, context);
      if (testing::failures > 20) return;
    }
  }
}

}  // namespace jax_nsa::cpu::select

int main() {
  std::set<const jax_nsa::cpu::select::Kernel*> kernels;
  for (const jax_nsa::cpu::Kernel* kernel : jax_nsa::cpu::SupportedKernels()) {
    kernels.insert(jax_nsa::cpu::select::FindKernel(kernel->name));
  }
  for (const jax_nsa::cpu::select::Kernel* kernel : kernels) jax_nsa::cpu::select::Test(*kernel);
  return jax_nsa::testing::ExitStatus();
}
