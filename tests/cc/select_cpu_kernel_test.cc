// The CPU kernel of the selected branch against its definition, for every instruction set that this
// machine can run, and its bits against themselves on several threads.
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
#include <string_view>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/select_isa.h"
#include "cpu/select_run.h"
#include "elements.h"
#include "expect.h"
#include "select_attention_reference.h"
#include "select_problems.h"

namespace jax_nsa::cpu::select {
namespace {

using testing::Buffer;
using testing::Case;
using testing::Drawer;
using testing::Elements;
using Reference = testing::SelectAttentionReference;

class Call {
 public:
  Call(const Case& c, Drawer& draw)
      : c_(c),
        p_(c_.problem),
        query_(p_.dtype, p_.rows * p_.heads * p_.head_size),
        key_(p_.dtype, p_.num_pages * p_.page_size * p_.key_value_heads * p_.head_size),
        value_(p_.dtype, p_.num_pages * p_.page_size * p_.key_value_heads * p_.value_size) {
    for (Elements* elements : {&query_, &key_, &value_}) elements->Fill(NAN);
    const Arrays operands = Operands();
    std::set<int64_t> pages;
    ForItems([&](int64_t b, int64_t row, int64_t h, int64_t limit) {
      const int64_t group = p_.heads / p_.key_value_heads;
      for (int64_t i = 0; i < group * p_.head_size; ++i) {
        query_.Set((row * p_.heads + h * group) * p_.head_size + i, draw.Value());
      }
      for (Reference::Kind kind : Reference::kKinds) {
        for (int64_t position : Reference::Positions(p_, operands, row, h, limit, kind)) {
          pages.insert(b * p_.pages_per_sequence + position / p_.page_size);
          const int64_t at = PoolRow(b, position) * p_.key_value_heads + h;
          if (!std::isnan(key_.Get(at * p_.head_size))) continue;
          for (int64_t i = 0; i < p_.head_size; ++i) {
            key_.Set(at * p_.head_size + i, draw.Value());
          }
          for (int64_t i = 0; i < p_.value_size; ++i) {
            value_.Set(at * p_.value_size + i, draw.Value());
          }
        }
      }
    });
    // Pages that nobody needs are not even named.
    for (int64_t i = 0; i < static_cast<int64_t>(c_.table.size()); ++i) {
      if (pages.count(i) == 0) c_.table[i] = draw.Chance(0.5) ? -1 : 1 << 30;
    }
  }

  Case& c() { return c_; }

  Arrays Operands() {
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = c_.table.data();
    arrays.lengths = c_.lengths.data();
    arrays.token_counts = c_.counts.data();
    arrays.first_rows = c_.packed ? c_.firsts.data() : nullptr;
    arrays.topk_indices = p_.select_count ? c_.ids.data() : nullptr;
    return arrays;
  }

 private:
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

  int64_t PoolRow(int64_t b, int64_t position) const {
    return int64_t{c_.table[b * p_.pages_per_sequence + position / p_.page_size]} * p_.page_size +
           position % p_.page_size;
  }

  Case c_;
  const Problem p_;
  Elements query_, key_, value_;
};

// One run of a kernel, and its results.
class Results {
 public:
  Results(Call& call, const Kernel& kernel, int threads)
      : arrays_(call.Operands()),
        selected_(Size(call, call.c().problem.select_count)),
        window_(Size(call, call.c().problem.window_size)),
        lse_(LseSize(call, call.c().problem.select_count)),
        window_lse_(LseSize(call, call.c().problem.window_size)) {
    const auto wanted = [](const Buffer& buffer) {
      std::memset(buffer.data(), 77, buffer.size());
      return buffer.size() > 0 ? buffer.data() : nullptr;
    };
    arrays_.attention = wanted(selected_);
    arrays_.window_attention = wanted(window_);
    arrays_.lse = reinterpret_cast<float*>(wanted(lse_));
    arrays_.window_lse = reinterpret_cast<float*>(wanted(window_lse_));
    Run run(call.c().problem, arrays_, kernel);
    std::vector<std::thread> helpers;
    std::atomic<int> last{0};
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&] { last += run.Work(); });
    last += run.Work();
    for (std::thread& helper : helpers) helper.join();
    EXPECT(last == 1) << last << " threads finished the last unit";
  }

  const Arrays& arrays() const { return arrays_; }
  std::string bytes() const {
    return selected_.bytes() + window_.bytes() + lse_.bytes() + window_lse_.bytes();
  }

 private:
  static int64_t LseSize(Call& call, int64_t wanted) {
    return wanted ? 4 * call.c().problem.rows * call.c().problem.heads : 0;
  }
  static int64_t Size(Call& call, int64_t wanted) {
    const Problem& p = call.c().problem;
    return wanted ? p.rows * p.heads * p.value_size * testing::SizeOf(p.attention_dtype) : 0;
  }

  Arrays arrays_;
  Buffer selected_, window_, lse_, window_lse_;
};

void CheckThreads(Call& call, const Kernel& kernel, const Results& alone,
                  const std::string& context) {
  for (int threads = 2; threads <= 8; threads += 3) {
    EXPECT(Results(call, kernel, threads).bytes() == alone.bytes())
        << context << ": other bits, " << threads << " threads";
  }
}

// Something wrong in one sequence or item makes its results NaN, and nothing else.
void CheckFaults(Call& call, Reference& reference, Drawer& draw, const Kernel& kernel,
                 const std::string& context) {
  Case& c = call.c();
  const Problem& p = c.problem;
  const int64_t b = draw.Of(0, p.sequences - 1), first = c.packed ? c.firsts[b] : b * p.tokens;
  const int64_t packed_end = b + 1 < p.sequences ? c.firsts[b + 1] : p.rows;
  const int64_t end = c.packed ? packed_end : first + p.tokens;
  // Puts a bad value in the place of a good one.
  const auto check = [&](int32_t* value, int64_t bad, const char* what) {
    const int32_t good = *value;
    *value = static_cast<int32_t>(bad);
    reference.Check(Results(call, kernel, 1).arrays(), context + what);
    *value = good;
  };
  check(&c.counts[b], draw.Chance(0.5) ? -1 : end - first + 1, " bad count");
  if (!p.partial) check(&c.lengths[b], draw.Chance(0.5) ? -1 : p.capacity() + 1, " bad length");
  if (c.counts[b] == 0) return;
  const int64_t row = first + draw.Of(0, c.counts[b] - 1), h = draw.Of(0, p.key_value_heads - 1);
  if (p.select_count > 0 && !p.partial) {
    const int64_t blocks = (c.lengths[b] + p.select_block_size - 1) / p.select_block_size;
    const int64_t id = (row * p.key_value_heads + h) * p.select_count;
    check(&c.ids[id + draw.Of(0, p.select_count - 1)], draw.Chance(0.5) ? -2 : blocks, " bad id");
  }
  const int64_t page = draw.Of(0, p.pages_per_sequence - 1);
  check(&c.table[b * p.pages_per_sequence + page], p.num_pages, " bad page");
}

// The thread sanitizer looks at how threads meet, not at numbers.
#if defined(__SANITIZE_THREAD__)
constexpr int kProblems = 10;
#else
constexpr int kProblems = 40;
#endif

void Test(const std::set<const Kernel*>& kernels) {
  Drawer draw(3);
  for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
    for (int number = 0; number < kProblems; ++number) {
      Call call(draw.Draw(dtype), draw);
      Reference reference(call.c().problem, call.Operands());
      for (const Kernel* kernel : kernels) {
        const std::string context = std::string(kernel->name) + " dtype " +
                                    std::to_string(static_cast<int>(dtype)) + " case " +
                                    std::to_string(number);
        const Results alone(call, *kernel, 1);
        reference.Check(alone.arrays(), context);
        CheckThreads(call, *kernel, alone, context);
        CheckFaults(call, reference, draw, *kernel, context);
        if (testing::failures > 20) return;
      }
    }
  }
}

}  // namespace
}  // namespace jax_nsa::cpu::select

int main() {
  std::set<const jax_nsa::cpu::select::Kernel*> kernels;
  for (const std::string_view isa : jax_nsa::cpu::SupportedIsas()) {
    kernels.insert(jax_nsa::cpu::select::FindKernel(isa));
  }
  for (const jax_nsa::cpu::select::Kernel* kernel : kernels) {
    std::cout << "kernel " << kernel->name << std::endl;
  }
  jax_nsa::cpu::select::Test(kernels);
  return jax_nsa::testing::ExitStatus();
}
