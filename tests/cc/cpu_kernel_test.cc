// Each CPU kernel that this machine can run against plain loops in double precision, and its bits
// against themselves with several threads.
//
// Bazel runs it. It needs neither XLA nor Python, so that it also tests the kernels of another
// architecture, under an emulator: tests/test_cpu.py does.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/run.h"
#include "expect.h"

namespace jax_nsa::cpu {

// kernel.cc with the tiles of emulated_amx_instructions.h, where the machine has AVX-512 BF16 for
// the rest.
#if defined(JAX_NSA_EMULATED_AMX)
namespace emulated_amx {
extern const Kernel kKernel;
}
#endif

namespace {

std::vector<const Kernel*> Kernels() {
  std::vector<const Kernel*> kernels = SupportedKernels();
#if defined(JAX_NSA_EMULATED_AMX)
  if (FindKernel("avx512") != nullptr) kernels.push_back(&emulated_amx::kKernel);
#endif
  return kernels;
}

struct Case {
  DataType dtype;
  int64_t group, key_value_heads, head_size, value_size, page_size, tokens, select_count;
  Blocks window;
  float scale;
  std::vector<int32_t> lengths, token_counts, early_counts;
  Forced forced = {1, 2};
};

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Elements of a floating dtype, as bytes.
class Elements {
 public:
  Elements(DataType dtype, int64_t count)
      : dtype_(dtype), bytes_(count * (dtype == DataType::kFloat32 ? 4 : 2)) {}

  void* data() { return bytes_.data(); }
  const std::vector<char>& bytes() const { return bytes_; }

  float Get(int64_t i) const {
    if (dtype_ == DataType::kFloat32) {
      float value;
      std::memcpy(&value, &bytes_[4 * i], sizeof value);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, &bytes_[2 * i], sizeof bits);
    if (dtype_ == DataType::kBFloat16) return FromBits(uint32_t{bits} << 16);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double magnitude = exponent == 31 ? (mantissa ? std::nan("") : INFINITY)
                             : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                            : std::ldexp(mantissa, -24);
    return static_cast<float>(bits >> 15 ? -magnitude : magnitude);
  }

  // Keeps the leading bits of a value; NaN, or one whose exponent all dtypes have.
  void Set(int64_t i, float value) {
    const uint32_t bits = ToBits(value);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype_ == DataType::kFloat32) {
      std::memcpy(&bytes_[4 * i], &bits, sizeof bits);
      return;
    }
    if (dtype_ == DataType::kFloat16) {
      const uint32_t exponent = (bits >> 23 & 255) - 112;
      half =
          std::isnan(value)
              ? 0x7e00
              : static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
    }
    std::memcpy(&bytes_[2 * i], &half, sizeof half);
  }

 private:
  DataType dtype_;
  std::vector<char> bytes_;
};

struct Results {
  Elements attention;
  std::vector<int32_t> indices;
  std::vector<float> lse, scores;
};

class Call {
 public:
  explicit Call(const Case& c)
      : problem_(MakeProblem(c)),
        case_(c),
        query_(c.dtype, problem_.rows * problem_.heads * c.head_size),
        key_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.head_size),
        value_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.value_size) {
    for (int32_t length : c.lengths) {
      // One token past the last window where there is one; not enough for a window otherwise.
      original_lengths_.push_back(static_cast<int32_t>(
          length > 0 ? c.window.OriginalLength(length) + 1 : c.window.compress_block_size - 1));
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
          for (int64_t i = 0; i < size; ++i) {
            pool.Set(at * size + i, valid ? draw() : std::nanf(""));
          }
        };
        fill(key_, c.key_value_heads * c.head_size);
        fill(value_, c.key_value_heads * c.value_size);
      }
    }
  }

  const Problem& problem() const { return problem_; }

  Results Compute(const Kernel& kernel, int threads) {
    const int64_t rows = problem_.rows;
    Results results = {Elements(problem_.dtype, rows * problem_.heads * problem_.value_size),
                       std::vector<int32_t>(rows * problem_.key_value_heads * case_.select_count),
                       std::vector<float>(rows * problem_.heads),
                       std::vector<float>(rows * problem_.heads * problem_.max_blocks())};
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = table_.data();
    arrays.lengths = case_.lengths.data();
    arrays.token_counts = case_.token_counts.data();
    arrays.early_counts = case_.early_counts.data();
    arrays.select_lengths = original_lengths_.data();
    arrays.attention = results.attention.data();
    arrays.topk_indices = results.indices.data();
    arrays.lse = results.lse.data();
    arrays.block_scores = results.scores.data();
    Run run(problem_, arrays, kernel);
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&] { run.Work(); });
    run.Work();
    for (std::thread& helper : helpers) helper.join();
    return results;
  }

  void Check(const Results& results, const std::string& context) const {
    for (int64_t b = 0; b < problem_.sequences; ++b) {
      for (int64_t t = 0; t < case_.tokens; ++t) {
        const int64_t row = b * case_.tokens + t;
        const bool no_token = t >= case_.token_counts[b];
        const bool absent = no_token || case_.lengths[b] == 0;
        const int64_t visible = absent ? 0 : case_.lengths[b] - (t < case_.early_counts[b] ? 1 : 0);
        for (int64_t h = 0; h < problem_.key_value_heads; ++h) {
          CheckPanel(results, b, row, h, visible, no_token ? 0 : CountBlocks(b, t),
                     context + " row " + std::to_string(row) + " kv head " + std::to_string(h));
        }
      }
    }
  }

 private:
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
    problem.blocks = c.window;
    problem.forced = c.forced;
    problem.causal = c.window.aligned;
    return problem;
  }

  // The blocks that a token chooses from, by their definitions.
  int64_t CountBlocks(int64_t b, int64_t t) const {
    const Blocks& blocks = problem_.blocks;
    const int64_t length = case_.lengths[b];
    int64_t tokens =
        length > 0 ? (length - 1) * blocks.compress_stride + blocks.compress_block_size : 0;
    if (blocks.aligned) tokens = original_lengths_[b] - (case_.token_counts[b] - 1 - t);
    return tokens <= 0 ? 0 : (tokens - 1) / blocks.select_block_size + 1;
  }

  void CheckPanel(const Results& results, int64_t b, int64_t row, int64_t h, int64_t visible,
                  int64_t blocks, const std::string& context) const {
    const int64_t D = problem_.head_size, Dv = problem_.value_size, group = case_.group;
    std::vector<double> importance(blocks), doubt(blocks);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = row * problem_.heads + h * group + g;
      std::vector<double> p(visible);
      double peak = -INFINITY, total = 0, size = 0;
      const auto pool_row = [&](int64_t i) {
        return table_[b * problem_.pages_per_sequence + i / problem_.page_size] *
                   problem_.page_size +
               i % problem_.page_size;
      };
      for (int64_t i = 0; i < visible; ++i) {
        double score = 0, absolute = 0;
        for (int64_t c = 0; c < D; ++c) {
          const double product = double{query_.Get(head * D + c)} *
                                 key_.Get((pool_row(i) * problem_.key_value_heads + h) * D + c);
          score += product;
          absolute += std::abs(product);
        }
        p[i] = score * double{problem_.scale};
        size = std::max(size, absolute * std::abs(problem_.scale));
        peak = std::max(peak, p[i]);
      }
      for (double& x : p) total += x = std::exp(x - peak);
      const double rounding = size * std::ldexp(1.0, -24);  // of a score in float32
      const double lse = visible ? peak + std::log(total) : -INFINITY;
      EXPECT(lse == results.lse[head] ||
             std::abs(results.lse[head] - lse) <= 1e-5 + 1e-6 * std::abs(lse) + 4 * rounding)
          << context << " lse " << results.lse[head] << ", expected " << lse;

      double error = 0, norm = 0;
      for (int64_t c = 0; c < Dv; ++c) {
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < visible; ++i) {
          const double term =
              p[i] / total * value_.Get((pool_row(i) * problem_.key_value_heads + h) * Dv + c);
          sum += term;
          squares += term * term;
        }
        const double off = results.attention.Get(head * Dv + c) - sum;
        error += off * off;
        norm += std::max(squares, sum * sum);
      }
      const double tolerance = problem_.dtype == DataType::kBFloat16  ? 4e-3
                               : problem_.dtype == DataType::kFloat16 ? 6e-4
                                                                      : 1e-5;
      EXPECT(std::sqrt(error) <= (tolerance + rounding) * std::sqrt(norm))
          << context << " attention off by " << std::sqrt(error) << " of " << std::sqrt(norm);

      for (int64_t j = 0; j < problem_.max_blocks(); ++j) {
        double score = 0;
        // By the definition of a block's score: position M * (j + 1) - m - n, or M * j + m - n.
        const Blocks& geometry = problem_.blocks;
        const int64_t m_count = geometry.select_block_size / geometry.compress_stride;
        const int64_t n_count = geometry.compress_block_size / geometry.compress_stride;
        for (int64_t m = 0; j < CountBlocks(b, case_.token_counts[b] - 1) && m < m_count; ++m) {
          for (int64_t n = 0; n < n_count; ++n) {
            const int64_t i = geometry.aligned ? m_count * j + m - n : m_count * (j + 1) - m - n;
            if (i >= 0 && i < visible) score += p[i] / total;
          }
        }
        const float got = results.scores[head * problem_.max_blocks() + j];
        const double legal = (1e-4 + rounding) * score + 1e-30;
        EXPECT(std::abs(got - score) <= legal)
            << context << " score of block " << j << " is " << got << ", expected " << score;
        if (j < blocks) {
          importance[j] += score;
          doubt[j] += legal;
        }
      }
    }
    std::vector<int32_t> order(blocks);
    for (int64_t j = 0; j < blocks; ++j) {
      order[j] = static_cast<int32_t>(j);
      if ((j < case_.forced.first || j >= blocks - case_.forced.last))
        importance[j] = std::numeric_limits<double>::max();
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t i, int32_t j) { return importance[i] > importance[j]; });
    for (int64_t n = 0; n < case_.select_count; ++n) {
      const int32_t got =
          results.indices[(row * problem_.key_value_heads + h) * case_.select_count + n];
      const int32_t expected = n < blocks ? order[n] : -1;
      if (got == expected) continue;
      EXPECT(got >= 0 && got < blocks && expected >= 0 &&
             std::abs(importance[got] - importance[expected]) <= doubt[got] + doubt[expected])
          << context << " index " << n << " is " << got << ", expected " << expected;
    }
  }

  Problem problem_;
  Case case_;
  Elements query_, key_, value_;
  std::vector<int32_t> table_, original_lengths_;
};

std::vector<Case> Cases(DataType dtype) {
  std::vector<Case> cases;
  const Blocks usual = {32, 16, 64};
  for (int64_t group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    cases.push_back({dtype, group, 2, 192, 128, 128, 1, 16, usual, 0.0722f, {150}, {1}, {0}});
  }
  // Several tokens, some early, some absent; odd sizes; windows of all kinds.
  cases.push_back({dtype, 4, 2, 7, 5, 16, 3, 9, usual, 0.5f, {100, 0, 1}, {3, 2, 1}, {1, 1, 1}});
  cases.push_back(
      {dtype, 2, 3, 33, 31, 48, 3, 5, {128, 16, 128}, 0.2f, {200, 97, 47}, {2, 0, 3}, {1, 0, 2}});
  cases.push_back(
      {dtype, 16, 2, 96, 64, 112, 4, 40, {96, 48, 96}, 0.1f, {230, 47}, {4, 1}, {1, 0}});
  cases.push_back({dtype, 64, 1, 64, 32, 64, 5, 70, {16, 16, 16}, -1.0f, {300}, {5}, {3}});
  cases.push_back({dtype, 1, 1, 1, 1, 16, 1, 1, {64, 64, 64}, 1.0f, {17}, {1}, {0}});
  // Pages of more than 128 rows: in one tile, in tiles that do not divide them, as splits.
  cases.push_back({dtype,
                   8,
                   2,
                   72,
                   40,
                   256,
                   2,
                   16,
                   usual,
                   0.1f,
                   {700, 256, 257, 0},
                   {2, 1, 2, 1},
                   {1, 0, 2, 0}});
  cases.push_back({dtype, 128, 1, 24, 16, 240, 1, 9, {16, 16, 32}, 0.3f, {481}, {1}, {0}});
  cases.push_back({dtype, 1, 9, 128, 128, 208, 1, 9, usual, 0.1f, {417, 208}, {1, 1}, {0, 0}});
  cases.push_back({dtype, 4, 8, 192, 128, 256, 2, 16, usual, 1.0f, {1100, 255}, {2, 2}, {1, 0}});
  // Blocks as open training codes choose them, some sequences too short for a position.
  const auto aligned = [](Blocks blocks) {
    blocks.aligned = true;
    return blocks;
  };
  cases.push_back({dtype,
                   4,
                   2,
                   32,
                   16,
                   16,
                   3,
                   9,
                   aligned(usual),
                   0.5f,
                   {100, 0, 1},
                   {3, 2, 1},
                   {2, 0, 0},
                   {1, 2}});
  cases.push_back({dtype,
                   2,
                   3,
                   33,
                   31,
                   256,
                   3,
                   5,
                   aligned({128, 16, 128}),
                   0.2f,
                   {300, 97, 47},
                   {2, 0, 3},
                   {1, 0, 2},
                   {0, 1}});
  cases.push_back({dtype,
                   16,
                   2,
                   64,
                   64,
                   16,
                   1,
                   300,
                   aligned({16, 16, 16}),
                   0.1f,
                   {230, 47},
                   {1, 1},
                   {0, 0},
                   {0, 0}});
  cases.push_back(
      {dtype, 4, 8, 192, 128, 128, 2, 16, aligned(usual), 0.1f, {1100}, {2}, {1}, {3, 9}});
  cases.push_back({dtype, 8, 1, 64, 64, 256, 1, 16, usual, 0.1f, {700}, {1}, {0}, {0, 5}});
  // Long enough to be split; scores nearly one-hot.
  cases.push_back({dtype, 4, 8, 192, 128, 128, 2, 16, usual, 1.0f, {1100}, {2}, {1}});
  return cases;
}

// Of equal keys all positions are as probable, and all blocks with as many positions as important:
// whatever is summed by whom, they come in ascending order.
void CheckTies(const Kernel& kernel) {
  for (const Blocks& blocks :
       {Blocks{32, 16, 64}, Blocks{48, 16, 96}, Blocks{128, 16, 128}, Blocks{32, 16, 64, true}}) {
    for (int64_t group : {1, 16, 128}) {
      for (int32_t length : {401, 2104, 5000}) {
        Case c = {
            DataType::kBFloat16, group, 1, 32, 32, 16, 1, 400, blocks, 0.0f, {length}, {1}, {0}};
        const Results results = Call(c).Compute(kernel, 2);
        const int64_t count = blocks.aligned ? blocks.Universe(blocks.OriginalLength(length) + 1)
                                             : blocks.NumBlocks(length);
        const int64_t free = std::min<int64_t>(c.select_count, count) - 3;
        // The first is forced; so is every one that a missing position makes less important.
        for (int64_t n = 0; n < std::min<int64_t>(free, count - 6); ++n) {
          EXPECT(results.indices[3 + n] == 1 + n)
              << kernel.name << " group " << group << " length " << length
              << " l'=" << blocks.select_block_size << ": rank " << n << " is "
              << results.indices[3 + n];
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
}

template <class T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace
}  // namespace jax_nsa::cpu

int main() {
  using jax_nsa::DataType;
  namespace cpu = jax_nsa::cpu;
  cpu::CheckMemory();
  for (const cpu::Kernel* kernel : cpu::Kernels()) {
    std::cout << "kernel " << kernel->name << std::endl;
    cpu::CheckTies(*kernel);
    for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
      int number = 0;
      for (const cpu::Case& c : cpu::Cases(dtype)) {
        const std::string context = std::string(kernel->name) + " dtype " +
                                    std::to_string(static_cast<int>(dtype)) + " case " +
                                    std::to_string(number++);
        cpu::Call call(c);
        const cpu::Results alone = call.Compute(*kernel, 1), together = call.Compute(*kernel, 3);
        call.Check(alone, context);
        EXPECT(cpu::SameBits(alone.attention.bytes(), together.attention.bytes()) &&
               cpu::SameBits(alone.scores, together.scores) &&
               cpu::SameBits(alone.lse, together.lse) &&
               cpu::SameBits(alone.indices, together.indices))
            << context << ": other bits with other threads";
      }
    }
  }
  return jax_nsa::testing::ExitStatus();
}
