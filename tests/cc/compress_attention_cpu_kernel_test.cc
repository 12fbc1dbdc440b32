// Each CPU kernel of the compressed branch that this machine can run against the branch's
// definition, and its bits against themselves with several threads.
//
// It needs neither XLA nor Python, so that it also tests the kernels of another architecture, under
// an emulator: tests/test_cpu.py does.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "compress_attention_cpu_kernels.h"
#include "compress_attention_reference.h"
#include "cpu/compress_attention_run.h"
#include "elements.h"
#include "expect.h"

namespace jax_nsa::cpu::compressed {
namespace {

using testing::Buffer;
using testing::Elements;

using Integers = std::vector<int32_t>;

struct Case {
  DataType dtype = DataType::kBFloat16;
  int64_t group = 4, key_value_heads = 2, head_size = 192, value_size = 128, page_size = 128;
  int64_t select_count = 16;
  Blocks blocks = {32, 16, 64};
  Forced forced = {1, 2};
  float scale = 0.1f;
  Integers lengths;
  int64_t tokens = 1;     // rows of each sequence
  Integers token_counts;  // all of them where none are given
  Integers early_counts;  // none early where none are given
};

class Call {
 public:
  explicit Call(const Case& c)
      : case_(WithCounts(c)),
        problem_(MakeProblem(c)),
        query_(c.dtype, problem_.rows * problem_.heads * c.head_size),
        key_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.head_size),
        value_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.value_size) {
    for (int32_t length : c.lengths) {
      // One token past the last window where there is one; not enough for a window otherwise.
      original_lengths_.push_back(static_cast<int32_t>(
          length > 0 ? c.blocks.OriginalLength(length) + 1 : c.blocks.compress_block_size - 1));
    }
    std::mt19937 random(7);
    std::uniform_real_distribution<float> uniform(0.01f, 2.0f);
    const auto draw = [&] { return (random() & 1 ? -1 : 1) * uniform(random); };
    for (int64_t i = 0; i < problem_.rows * problem_.heads * c.head_size; ++i) {
      query_.Set(i, draw());
    }
    // Pages in reverse order, rows past the end of a sequence full of NaN.
    for (int64_t entry = 0; entry < problem_.num_pages; ++entry) {
      table_.push_back(static_cast<int32_t>(problem_.num_pages - 1 - entry));
      const int64_t b = entry / problem_.pages_per_sequence;
      for (int64_t row = 0; row < c.page_size; ++row) {
        const int64_t position = entry % problem_.pages_per_sequence * c.page_size + row;
        const bool valid = position < c.lengths[b];
        const int64_t at = table_.back() * c.page_size + row;
        const auto fill = [&](Elements& pool, int64_t size) {
          for (int64_t i = 0; i < size; ++i) pool.Set(at * size + i, valid ? draw() : NAN);
        };
        fill(key_, c.key_value_heads * c.head_size);
        fill(value_, c.key_value_heads * c.value_size);
      }
    }
  }

  const Problem& problem() const { return problem_; }

  Arrays Operands() const {
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = table_.data();
    arrays.lengths = case_.lengths.data();
    arrays.token_counts = case_.token_counts.data();
    arrays.early_counts = case_.early_counts.data();
    arrays.select_lengths = original_lengths_.data();
    return arrays;
  }

 private:
  static Case WithCounts(Case c) {
    if (c.token_counts.empty()) c.token_counts.assign(c.lengths.size(), c.tokens);
    if (c.early_counts.empty()) c.early_counts.assign(c.lengths.size(), 0);
    return c;
  }

  static Problem MakeProblem(const Case& c) {
    Problem problem = {};
    problem.dtype = problem.attention_dtype = c.dtype;
    problem.sequences = static_cast<int64_t>(c.lengths.size());
    problem.tokens = c.tokens;
    problem.rows = problem.sequences * c.tokens;
    problem.heads = c.group * c.key_value_heads;
    problem.key_value_heads = c.key_value_heads;
    problem.head_size = c.head_size;
    problem.value_size = c.value_size;
    problem.page_size = c.page_size;
    const int64_t longest = *std::max_element(c.lengths.begin(), c.lengths.end());
    problem.pages_per_sequence = longest / c.page_size + 1;
    problem.num_pages = problem.sequences * problem.pages_per_sequence;
    problem.select_count = c.select_count;
    problem.scale = c.scale;
    problem.blocks = c.blocks;
    problem.forced = c.forced;
    problem.causal = c.blocks.aligned;
    return problem;
  }

  Case case_;
  Problem problem_;
  Elements query_, key_, value_;
  std::vector<int32_t> table_, original_lengths_;
};

// One run of a kernel, and its results.
class Results {
 public:
  Results(const Call& call, const Kernel& kernel, int threads) : Results(call.problem()) {
    arrays_ = call.Operands();
    arrays_.attention = attention_.data();
    arrays_.topk_indices = indices_.as<int32_t>();
    arrays_.lse = lse_.as<float>();
    arrays_.block_scores = scores_.as<float>();
    Run run(call.problem(), arrays_, kernel);
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&] { run.Work(); });
    run.Work();
    for (std::thread& helper : helpers) helper.join();
  }

  const Arrays& arrays() const { return arrays_; }
  std::string bytes() const {
    return attention_.bytes() + indices_.bytes() + lse_.bytes() + scores_.bytes();
  }

 private:
  explicit Results(const Problem& p)
      : attention_(p.rows * p.heads * p.value_size * testing::SizeOf(p.attention_dtype)),
        indices_(4 * p.rows * p.key_value_heads * p.select_count),
        lse_(4 * p.rows * p.heads),
        scores_(4 * p.rows * p.heads * p.max_blocks()) {}

  Arrays arrays_;
  Buffer attention_, indices_, lse_, scores_;
};

std::vector<Case> Cases(DataType dtype) {
  std::vector<Case> cases;
  const auto add = [&](auto set) {
    Case c;
    c.dtype = dtype;
    set(c);
    cases.push_back(c);
  };
  for (int64_t group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    add([=](Case& c) {
      c.group = group;
      c.scale = 0.0722f;
      c.lengths = Integers{150};
    });
  }
  // Several tokens, some early, some absent; odd sizes; windows of all kinds.
  add([](Case& c) {
    c.head_size = 7, c.value_size = 5, c.page_size = 16;
    c.select_count = 9;
    c.scale = 0.5f;
    c.lengths = Integers{100, 0, 1};
    c.tokens = 3;
    c.token_counts = Integers{3, 2, 1}, c.early_counts = Integers{1, 1, 1};
  });
  add([](Case& c) {
    c.group = 2, c.key_value_heads = 3;
    c.head_size = 33, c.value_size = 31, c.page_size = 48;
    c.select_count = 5;
    c.blocks = {128, 16, 128};
    c.scale = 0.2f;
    c.lengths = Integers{200, 97, 47};
    c.tokens = 3;
    c.token_counts = Integers{2, 0, 3}, c.early_counts = Integers{1, 0, 2};
  });
  add([](Case& c) {
    c.group = 16;
    c.head_size = 96, c.value_size = 64, c.page_size = 112;
    c.select_count = 40;
    c.blocks = {96, 48, 96};
    c.lengths = Integers{230, 47};
    c.tokens = 4;
    c.token_counts = Integers{4, 1}, c.early_counts = Integers{1, 0};
  });
  add([](Case& c) {
    c.group = 64, c.key_value_heads = 1;
    c.head_size = 64, c.value_size = 32, c.page_size = 64;
    c.select_count = 70;
    c.blocks = {16, 16, 16};
    c.scale = -1.0f;
    c.lengths = Integers{300};
    c.tokens = 5;
    c.early_counts = Integers{3};
  });
  add([](Case& c) {
    c.group = c.key_value_heads = 1;
    c.head_size = c.value_size = 1, c.page_size = 16;
    c.select_count = 1;
    c.blocks = {64, 64, 64};
    c.scale = 1.0f;
    c.lengths = Integers{17};
  });
  // Pages of more than 128 rows: in one tile, in tiles that do not divide them, as splits.
  add([](Case& c) {
    c.group = 8;
    c.head_size = 72, c.value_size = 40, c.page_size = 256;
    c.lengths = Integers{700, 256, 257, 0};
    c.tokens = 2;
    c.token_counts = Integers{2, 1, 2, 1}, c.early_counts = Integers{1, 0, 2, 0};
  });
  add([](Case& c) {
    c.group = 128, c.key_value_heads = 1;
    c.head_size = 24, c.value_size = 16, c.page_size = 240;
    c.select_count = 9;
    c.blocks = {16, 16, 32};
    c.scale = 0.3f;
    c.lengths = Integers{481};
  });
  add([](Case& c) {
    c.group = 1, c.key_value_heads = 9;
    c.head_size = 128, c.page_size = 208;
    c.select_count = 9;
    c.lengths = Integers{417, 208};
  });
  add([](Case& c) {
    c.key_value_heads = 8, c.page_size = 256;
    c.scale = 1.0f;
    c.lengths = Integers{1100, 255};
    c.tokens = 2;
    c.early_counts = Integers{1, 0};
  });
  // Blocks as open training codes choose them, some sequences too short for a position.
  add([](Case& c) {
    c.head_size = 32, c.value_size = 16, c.page_size = 16;
    c.select_count = 9;
    c.blocks.aligned = true;
    c.forced = {1, 2};
    c.scale = 0.5f;
    c.lengths = Integers{100, 0, 1};
    c.tokens = 3;
    c.token_counts = Integers{3, 2, 1}, c.early_counts = Integers{2, 0, 0};
  });
  add([](Case& c) {
    c.group = 2, c.key_value_heads = 3;
    c.head_size = 33, c.value_size = 31, c.page_size = 256;
    c.select_count = 5;
    c.blocks = {128, 16, 128, /*aligned=*/true};
    c.forced = {0, 1};
    c.scale = 0.2f;
    c.lengths = Integers{300, 97, 47};
    c.tokens = 3;
    c.token_counts = Integers{2, 0, 3}, c.early_counts = Integers{1, 0, 2};
  });
  add([](Case& c) {
    c.group = 16;
    c.head_size = 64, c.value_size = 64, c.page_size = 16;
    c.select_count = 300;
    c.blocks = {16, 16, 16, /*aligned=*/true};
    c.forced = {0, 0};
    c.lengths = Integers{230, 47};
  });
  add([](Case& c) {
    c.key_value_heads = 8;
    c.blocks.aligned = true;
    c.forced = {3, 9};
    c.lengths = Integers{1100};
    c.tokens = 2;
    c.early_counts = Integers{1};
  });
  add([](Case& c) {
    c.group = 8, c.key_value_heads = 1;
    c.head_size = 64, c.value_size = 64, c.page_size = 256;
    c.forced = {0, 5};
    c.lengths = Integers{700};
  });
  // Long enough to be split; scores nearly one-hot.
  add([](Case& c) {
    c.key_value_heads = 8;
    c.scale = 1.0f;
    c.lengths = Integers{1100};
    c.tokens = 2;
    c.early_counts = Integers{1};
  });
  return cases;
}

// Of equal keys all positions are as probable, and all blocks with as many positions as important:
// whatever is summed by whom, they come in ascending order.
void CheckTies(const Kernel& kernel) {
  for (const Blocks& blocks :
       {Blocks{32, 16, 64}, Blocks{48, 16, 96}, Blocks{128, 16, 128}, Blocks{32, 16, 64, true}}) {
    for (int64_t group : {1, 16, 128}) {
      for (int32_t length : {401, 2104, 5000}) {
        Case c;
        c.group = group, c.key_value_heads = 1;
        c.head_size = 32, c.value_size = 32, c.page_size = 16;
        c.select_count = 400;
        c.blocks = blocks;
        c.scale = 0.0f;
        c.lengths = Integers{length};
        const Results results(Call(c), kernel, 2);
        const int64_t count = blocks.aligned ? blocks.Universe(blocks.OriginalLength(length) + 1)
                                             : blocks.NumBlocks(length);
        const int64_t free = std::min<int64_t>(c.select_count, count) - 3;
        // The first is forced; so is every one that a missing position makes less important.
        for (int64_t n = 0; n < std::min<int64_t>(free, count - 6); ++n) {
          const int32_t got = results.arrays().topk_indices[3 + n];
          EXPECT(got == 1 + n) << kernel.name << " group " << group << " length " << length
                               << " l'=" << blocks.select_block_size << ": rank " << n << " is "
                               << got;
        }
      }
    }
  }
}

// Memory is used again, unless it is much too large.
void CheckMemory() {
  const char* first = nullptr;
  {
    const Memory memory = Allocate(4096);
    first = memory.get();
  }
  EXPECT(Allocate(1024).get() != first) << "a quarter of a block was wanted, all of it given";
  const Memory memory = Allocate(2048), other = Allocate(2048);
  EXPECT(memory.get() == first) << "fresh memory in spite of some kept";
  EXPECT(other.get() != first) << "one block given twice";
  // What is handed out does not count, at once or in turn: as much is kept as before.
  constexpr int64_t kSize = 1 << 20, kCount = 2 * kKeptBytes / kSize;
  {
    std::vector<Memory> all(kCount);
    for (Memory& each : all) each = Allocate(kSize);
  }
  const char* last = nullptr;
  for (int64_t i = 0; i < kCount; ++i) {
    const Memory again = Allocate(kSize);
    EXPECT(i == 0 || again.get() == last) << "fresh memory the " << i << "th time";
    last = again.get();
  }
}

void Test(DataType dtype) {
  int number = 0;
  for (const Case& c : Cases(dtype)) {
    const Call call(c);
    testing::CompressAttentionReference reference(call.problem(), call.Operands());
    for (const Kernel* kernel : Kernels()) {
      const std::string context = std::string(kernel->name) + " dtype " +
                                  std::to_string(static_cast<int>(dtype)) + " case " +
                                  std::to_string(number);
      const Results alone(call, *kernel, 1), together(call, *kernel, 3);
      reference.Check(alone.arrays(), context);
      EXPECT(alone.bytes() == together.bytes()) << context << ": other bits with other threads";
    }
    ++number;
  }
}

}  // namespace
}  // namespace jax_nsa::cpu::compressed

int main() {
  using jax_nsa::DataType;
  namespace cpu = jax_nsa::cpu::compressed;
  cpu::CheckMemory();
  for (const cpu::Kernel* kernel : cpu::Kernels()) {
    std::cout << "kernel " << kernel->name << std::endl;
    cpu::CheckTies(*kernel);
  }
  for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
    cpu::Test(dtype);
  }
  return jax_nsa::testing::ExitStatus();
}
