// The selected branch's CUDA kernel on the emulated machine (emulated_cuda/machine.h), against
// plain loops in double precision: in two random orders of everything that may come in any order,
// of which both must give the same bits.
//
// Bazel runs it. It needs neither a GPU nor the CUDA toolkit. Arguments: the name of the only case
// to run, or "all"; a number to draw other problems and orders from.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/select_launch.h"
#include "cuda/select_plan.h"
#include "emulated_cuda/language.h"
#include "emulated_cuda/machine.h"
#include "expect.h"

namespace jax_nsa::cuda::select {
namespace {

// Memory of exactly so many bytes: what follows, or nearly, cannot be touched.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t offset = 0) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t used = (bytes + offset + 15) / 16 * 16, pages = (used + page - 1) / page * page;
    mapped_ = pages + page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + pages, page, PROT_NONE) != 0) std::abort();
    data_ = base_ + pages - used + offset;
    size_ = bytes;
  }
  ~Buffer() { munmap(base_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::string bytes() const { return std::string(data_, size_); }

 private:
  char* base_;
  char* data_;
  size_t mapped_, size_;
};

// Elements of a floating dtype.
class Elements {
 public:
  Elements(DataType dtype, int64_t count, bool aligned = true)
      : dtype_(dtype), buffer_(count * Size(dtype), aligned ? 0 : Size(dtype)) {}

  const Buffer& buffer() const { return buffer_; }
  float Get(int64_t i) const {
    switch (dtype_) {
      case DataType::kBFloat16:
        return static_cast<float>(buffer_.as<__nv_bfloat16>()[i]);
      case DataType::kFloat16:
        return static_cast<float>(buffer_.as<__half>()[i]);
      default:
        return buffer_.as<float>()[i];
    }
  }
  void Set(int64_t i, float value) {
    switch (dtype_) {
      case DataType::kBFloat16:
        buffer_.as<__nv_bfloat16>()[i] = __nv_bfloat16(value);
        break;
      case DataType::kFloat16:
        buffer_.as<__half>()[i] = __half(value);
        break;
      default:
        buffer_.as<float>()[i] = value;
    }
  }

 private:
  static size_t Size(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

  DataType dtype_;
  Buffer buffer_;
};

struct Case {
  std::string name;
  DataType dtype;
  int sequences, tokens, group, key_value_heads, head_size, value_size, page_size, pages;
  int block_size, select_count, window_size;
  int shortest;  // of the sequences
  bool packed = false, partial = false, gated = false;
  bool wants_lse = true, aligned = true, float_results = false, float_gates = false;
  int bad_ids = 0, bad_pages = 0;  // sequences that have one
  bool faults = false;             // of lengths and counts
  int nans = 0;                    // heads of queries that are NaN
};

unsigned first_seed = 0;  // of problems and launches

class Call {
 public:
  Call(const Case& c, unsigned seed)
      : case_(c),
        random_(first_seed + seed),
        problem_(MakeProblem()),
        query_(c.dtype, problem_.rows * problem_.heads * c.head_size, c.aligned),
        key_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.head_size,
             c.aligned),
        value_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.value_size,
               c.aligned),
        compressed_(c.dtype, c.gated ? problem_.rows * problem_.heads * c.value_size : 0),
        gates_(problem_.gates_dtype, c.gated ? problem_.rows * problem_.heads * 3 : 0),
        attention_{{problem_.attention_dtype, AttentionSize(kSelected)},
                   {problem_.attention_dtype, AttentionSize(kWindow)}},
        lse_{Buffer(LseSize(kSelected)), Buffer(LseSize(kWindow))},
        table_(4 * c.sequences * c.pages),
        ids_(4 * problem_.rows * c.key_value_heads * c.select_count),
        int_operands_{Buffer(4 * c.sequences), Buffer(4 * c.sequences), Buffer(4 * c.sequences)} {
    DrawIds();
    FillPages();
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < problem_.rows * problem_.heads * c.head_size; ++i) {
      query_.Set(i, normal(random_));
    }
    for (int i = 0; i < c.nans; ++i) {
      const int64_t head = Random(static_cast<int>(problem_.rows * problem_.heads));
      query_.Set(head * c.head_size, NAN);
      nan_heads_.insert(head);
    }
    if (c.gated) {
      for (int64_t i = 0; i < problem_.rows * problem_.heads * c.value_size; ++i) {
        compressed_.Set(i, normal(random_));
      }
      std::uniform_real_distribution<float> gate(0.1f, 1.0f);
      for (int64_t i = 0; i < problem_.rows * problem_.heads * 3; ++i) gates_.Set(i, gate(random_));
    }
    const std::vector<int>* operands[] = {&lengths_, &counts_, &first_rows_};
    for (int i = 0; i < 3; ++i) {
      std::memcpy(int_operands_[i].data(), operands[i]->data(), 4 * c.sequences);
    }
  }

  // The results' bits from one launch.
  std::string Run(uint64_t seed, const std::string& context) {
    emulated_cuda::seed = seed;
    const Plan plan = MakePlan(problem_);
    Buffer workspace(WorkspaceBytes(problem_));
    emulated_cuda::FillWithGarbage(workspace.data(), workspace.size());
    for (const Buffer* buffer : Results()) {
      std::memset(buffer->data(), seed % 2 ? 0x77 : 0xee, buffer->size());
    }
    Arrays arrays = {};
    arrays.query = query_.buffer().data();
    arrays.key = key_.buffer().data();
    arrays.value = value_.buffer().data();
    arrays.block_table = table_.as<int32_t>();
    arrays.lengths = int_operands_[0].as<int32_t>();
    if (case_.tokens > 1 || case_.packed) arrays.token_counts = int_operands_[1].as<int32_t>();
    if (case_.packed) arrays.first_rows = int_operands_[2].as<int32_t>();
    if (case_.select_count > 0) arrays.topk_indices = ids_.as<int32_t>();
    if (Wants(kSelected)) arrays.attention = attention_[kSelected].buffer().data();
    if (Wants(kWindow)) arrays.window_attention = attention_[kWindow].buffer().data();
    if (LseSize(kSelected) > 0) arrays.lse = lse_[kSelected].as<float>();
    if (LseSize(kWindow) > 0) arrays.window_lse = lse_[kWindow].as<float>();
    if (case_.gated) {
      arrays.compressed = compressed_.buffer().data();
      arrays.gates = gates_.buffer().data();
    }
    EXPECT(Refuses(problem_) == nullptr) << context;
    EXPECT(Launch(problem_, arrays, workspace.data(), workspace.size(), nullptr) == cudaSuccess)
        << context;
    for (int64_t i = 0; plan.merged && i < plan.items * plan.all_parts(); ++i) {
      EXPECT(workspace.as<uint64_t>()[i] >> 32 != 0x6a61785f) << context << ": a raised flag";
    }
    std::string bits;
    for (const Buffer* buffer : Results()) bits += buffer->bytes();
    return bits;
  }

  // Compares the last run's results with plain loops.
  void Check(const std::string& context) const {
    std::vector<bool> owned(problem_.rows);
    for (int b = 0; b < case_.sequences; ++b) {
      for (int t = 0; t < owned_[b]; ++t) {
        owned[first_rows_[b] + t] = true;
        for (int h = 0; h < case_.key_value_heads; ++h) {
          CheckHead(b, t, h,
                    context + ", sequence " + std::to_string(b) + " of length " +
                        std::to_string(lengths_[b]) + " token " + std::to_string(t) + " kv head " +
                        std::to_string(h));
        }
      }
    }
    for (int64_t row = 0; row < problem_.rows; ++row) {
      for (int64_t n = 0; !owned[row] && n < problem_.heads; ++n) {
        CheckFilled(row * problem_.heads + n, false, context + ", row of no sequence");
      }
    }
  }

 private:
  bool Wants(int kind) const {
    return kind == kSelected ? case_.select_count > 0 : case_.window_size > 0 && !case_.gated;
  }
  int64_t AttentionSize(int kind) const {
    return Wants(kind) ? problem_.rows * problem_.heads * case_.value_size : 0;
  }
  int64_t LseSize(int kind) const {
    return Wants(kind) && case_.wants_lse && !case_.gated ? 4 * problem_.rows * problem_.heads : 0;
  }
  std::vector<const Buffer*> Results() const {
    return {&attention_[0].buffer(), &attention_[1].buffer(), &lse_[0], &lse_[1]};
  }

  int Random(int below) { return static_cast<int>(random_() % below); }
  int capacity() const { return case_.pages * case_.page_size; }

  // Draws the rows of each sequence, too.
  Problem MakeProblem() {
    Problem problem = {};
    if (case_.packed) problem.rows = 1;  // no sequence's
    faulty_.assign(case_.sequences, false);
    for (int b = 0; b < case_.sequences; ++b) {
      lengths_.push_back(case_.partial ? Random(capacity() + 200) - 60
                                       : case_.shortest + Random(capacity() - case_.shortest + 1));
      const int count = case_.tokens > 1 ? Random(case_.tokens + 1) : 1;
      const int owned = case_.packed ? count + Random(2) : case_.tokens;
      counts_.push_back(count);
      owned_.push_back(owned);
      first_rows_.push_back(static_cast<int>(problem.rows));
      problem.rows += owned;
    }
    if (case_.faults) {
      // Each kind once; the sequences in between stay sound.
      lengths_[1] = -1;
      lengths_[3] = capacity() + 1;
      counts_[5] = owned_[5] + 1;
      counts_[7] = -1;
      for (int b = 1; b < 8; b += 2) faulty_[b] = true;
    }
    problem.dtype = case_.dtype;
    problem.attention_dtype = case_.float_results ? DataType::kFloat32 : case_.dtype;
    problem.gates_dtype = case_.float_gates ? DataType::kFloat32 : case_.dtype;
    problem.gated = case_.gated;
    problem.partial = case_.partial;
    problem.sequences = case_.sequences;
    problem.tokens = case_.packed ? 0 : case_.tokens;
    problem.key_value_heads = case_.key_value_heads;
    problem.heads = case_.group * case_.key_value_heads;
    problem.head_size = case_.head_size;
    problem.value_size = case_.value_size;
    problem.page_size = case_.page_size;
    problem.pages_per_sequence = case_.pages;
    problem.num_pages = int64_t{case_.sequences} * case_.pages + 1;
    problem.select_block_size = case_.select_count > 0 ? case_.block_size : 0;
    problem.select_count = case_.select_count;
    problem.window_size = case_.window_size;
    problem.scale = 1.3f / std::sqrt(static_cast<float>(case_.head_size));
    return problem;
  }

  // Blocks that ids may name.
  int NumBlocks(int b) const {
    return static_cast<int>(CeilDiv(case_.partial ? capacity() : lengths_[b], case_.block_size));
  }
  int32_t* Ids(int b, int t, int h) const {
    return ids_.as<int32_t>() +
           (int64_t{first_rows_[b] + t} * case_.key_value_heads + h) * case_.select_count;
  }

  void DrawIds() {
    for (int64_t i = 0; i < static_cast<int64_t>(ids_.size()) / 4; ++i) {
      ids_.as<int32_t>()[i] = 0x7ffffff0;  // of rows without a token
    }
    int bad = case_.bad_ids;
    for (int b = 0; b < case_.sequences && case_.select_count > 0; ++b) {
      if (faulty_[b]) continue;
      for (int t = 0; t < counts_[b]; ++t) {
        for (int h = 0; h < case_.key_value_heads; ++h) {
          for (int i = 0; i < case_.select_count; ++i) {
            const int blocks = NumBlocks(b);
            int id = blocks == 0 || Random(5) == 0 ? -1 : Random(blocks);
            if (case_.partial && Random(4) == 0) {
              const int far[] = {-7, blocks, std::numeric_limits<int>::min(),
                                 std::numeric_limits<int>::max()};
              id = far[Random(4)];
            }
            Ids(b, t, h)[i] = id;
          }
        }
      }
      if (bad > 0 && counts_[b] > 0) {
        const int ids[] = {-2, NumBlocks(b), std::numeric_limits<int>::min(),
                           std::numeric_limits<int>::max()};
        Ids(b, Random(counts_[b]), Random(case_.key_value_heads))[Random(case_.select_count)] =
            ids[bad-- % 4];
      }
    }
  }

  int64_t Limit(int b, int t) const { return int64_t{lengths_[b]} - (counts_[b] - 1 - t); }

  // Positions that a row and head attends to, here, some of them twice.
  std::vector<int> Positions(int b, int t, int h, int kind) const {
    const int64_t limit = Limit(b, t);
    std::vector<int> positions;
    const auto add = [&](int64_t first, int64_t end) {
      const int64_t last = std::min({end, limit, int64_t{capacity()}});
      for (int64_t i = std::max<int64_t>(first, 0); i < last; ++i) {
        positions.push_back(static_cast<int>(i));
      }
    };
    if (kind == kWindow) {
      if (case_.window_size > 0) add(limit - case_.window_size, limit);
    } else {
      for (int i = 0; i < case_.select_count; ++i) {
        const int64_t id = Ids(b, t, h)[i];
        if (id >= 0 && id < NumBlocks(b)) add(id * case_.block_size, (id + 1) * case_.block_size);
      }
    }
    return positions;
  }

  bool IsFaulty(int b, int t, int h) const {
    if (faulty_[b]) return true;
    if (t >= counts_[b]) return false;
    for (int i = 0; i < case_.select_count && !case_.partial; ++i) {
      const int id = Ids(b, t, h)[i];
      if (id < -1 || id >= NumBlocks(b)) return true;
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int i : Positions(b, t, h, kind)) {
        const int page = table_.as<int32_t>()[b * case_.pages + i / case_.page_size];
        if (page < 0 || page >= problem_.num_pages) return true;
      }
    }
    return false;
  }

  // Pages in random order; what no row needs is NaN, and has illegal ids.
  void FillPages() {
    const int64_t keys = case_.key_value_heads * case_.head_size;
    const int64_t values = case_.key_value_heads * case_.value_size;
    const int64_t rows = problem_.num_pages * case_.page_size;
    for (int64_t i = 0; i < rows * keys; ++i) key_.Set(i, NAN);
    for (int64_t i = 0; i < rows * values; ++i) value_.Set(i, NAN);
    std::vector<int> order(problem_.num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    int32_t* const table = table_.as<int32_t>();
    std::normal_distribution<float> normal;
    int bad = case_.bad_pages;
    for (int b = 0; b < case_.sequences; ++b) {
      std::set<int> needed;
      for (int t = 0; t < counts_[b] && !faulty_[b]; ++t) {
        for (int h = 0; h < case_.key_value_heads; ++h) {
          for (int kind = 0; kind < kKinds; ++kind) {
            for (int i : Positions(b, t, h, kind)) needed.insert(i / case_.page_size);
          }
        }
      }
      for (int p = 0; p < case_.pages; ++p) {
        table[b * case_.pages + p] = needed.count(p) > 0 ? order[b * case_.pages + p] : -12345;
      }
      for (int i = 0; i < std::min(lengths_[b], capacity()); ++i) {
        if (needed.count(i / case_.page_size) == 0) continue;
        const int64_t row = PoolRow(b, i);
        for (int64_t d = 0; d < keys; ++d) key_.Set(row * keys + d, normal(random_));
        for (int64_t d = 0; d < values; ++d) value_.Set(row * values + d, normal(random_));
      }
      if (!needed.empty() && bad > 0) {
        const int ids[] = {-1, static_cast<int>(problem_.num_pages),
                           std::numeric_limits<int>::min(), std::numeric_limits<int>::max()};
        auto page = needed.begin();
        std::advance(page, Random(static_cast<int>(needed.size())));
        table[b * case_.pages + *page] = ids[bad-- % 4];
      }
    }
  }

  int64_t PoolRow(int b, int i) const {
    return int64_t{table_.as<int32_t>()[b * case_.pages + i / case_.page_size]} * case_.page_size +
           i % case_.page_size;
  }

  // Results of nothing at all.
  void CheckFilled(int64_t head, bool faulty, const std::string& context) const {
    const auto is_filled = [&](float x, float sound) {
      return faulty ? std::isnan(x) : x == sound;
    };
    bool filled = true;
    for (int kind = 0; kind < kKinds; ++kind) {
      if (LseSize(kind) > 0) filled &= is_filled(lse_[kind].as<float>()[head], -INFINITY);
      for (int c = 0; Wants(kind) && c < case_.value_size; ++c) {
        filled &= is_filled(attention_[kind].Get(head * case_.value_size + c), 0.0f);
      }
    }
    EXPECT(filled) << context << ": results of nothing at all";
  }

  void CheckHead(int b, int t, int h, const std::string& context) const {
    const int D = case_.head_size, Dv = case_.value_size, group = case_.group;
    const int64_t row = first_rows_[b] + t, heads = problem_.heads;
    const bool faulty = IsFaulty(b, t, h);
    for (int g = 0; g < group; ++g) {
      const int64_t head = row * heads + h * group + g;
      if (faulty || t >= counts_[b]) {
        CheckFilled(head, faulty, context);
        continue;
      }
      // The gated sum, and what rounding may have cost it.
      std::vector<double> sum(Dv), scale(Dv);
      bool any_nan = false;
      for (int kind = 0; kind < kKinds; ++kind) {
        if (!Wants(kind) && !case_.gated) continue;
        const std::vector<int> positions = Positions(b, t, h, kind);
        const bool nan = nan_heads_.count(head) > 0 && !positions.empty();
        any_nan |= nan;
        std::vector<double> p;
        for (int i : positions) {
          const int64_t at = (PoolRow(b, i) * case_.key_value_heads + h) * D;
          double score = 0;
          for (int c = 0; c < D; ++c) score += double{query_.Get(head * D + c)} * key_.Get(at + c);
          p.push_back(score * double{problem_.scale});
        }
        const double peak = p.empty() ? 0 : *std::max_element(p.begin(), p.end());
        double total = 0;
        for (double& x : p) total += x = std::exp(x - peak);
        std::vector<double> attention(Dv), squares(Dv);
        for (size_t n = 0; n < positions.size(); ++n) {
          const int64_t at = (PoolRow(b, positions[n]) * case_.key_value_heads + h) * Dv;
          for (int c = 0; c < Dv; ++c) {
            const double term = p[n] / total * value_.Get(at + c);
            attention[c] += term;
            squares[c] += term * term;
          }
        }
        for (int c = 0; c < Dv; ++c) squares[c] = std::max(squares[c], attention[c] * attention[c]);
        const std::string what =
            context + " head " + std::to_string(g) + (kind == kWindow ? " window" : " selected");
        if (!case_.gated) {
          CompareAttention(kind, head, nan, attention, squares, what);
          if (LseSize(kind) == 0) continue;
          const float got = lse_[kind].as<float>()[head];
          const double lse = positions.empty() ? -INFINITY : peak + std::log(total);
          EXPECT(nan                 ? std::isnan(got)
                 : positions.empty() ? got == -INFINITY
                                     : std::abs(got - lse) <= 1e-4)
              << what << ": lse is " << got << ", expected " << lse;
          continue;
        }
        const double gate = gates_.Get(3 * head + 1 + kind);
        for (int c = 0; c < Dv; ++c) {
          sum[c] += gate * attention[c];
          scale[c] += gate * gate * squares[c];
        }
      }
      if (!case_.gated) continue;
      for (int c = 0; c < Dv; ++c) {
        const double term = double{gates_.Get(3 * head)} * compressed_.Get(head * Dv + c);
        sum[c] += term;
        scale[c] += term * term;
      }
      CompareAttention(kSelected, head, any_nan, sum, scale,
                       context + " head " + std::to_string(g));
    }
  }

  void CompareAttention(int kind, int64_t head, bool nan, const std::vector<double>& expected,
                        const std::vector<double>& squares, const std::string& context) const {
    const double accuracy = case_.dtype == DataType::kBFloat16  ? 4e-3
                            : case_.dtype == DataType::kFloat16 ? 6e-4
                                                                : 1e-5;
    double error = 0, norm = 0;
    bool all_nan = true;
    for (int c = 0; c < case_.value_size; ++c) {
      const float got = attention_[kind].Get(head * case_.value_size + c);
      all_nan &= std::isnan(got);
      error += (got - expected[c]) * (got - expected[c]);
      norm += squares[c];
    }
    if (nan) {
      EXPECT(all_nan) << context << ": results of a query that is NaN";
    } else {
      EXPECT(std::sqrt(error) <= accuracy * std::sqrt(norm))
          << context << ": attention off by " << std::sqrt(error) << " of " << std::sqrt(norm);
    }
  }

  const Case case_;
  std::mt19937 random_;
  std::vector<int> lengths_, counts_, owned_, first_rows_;
  std::vector<bool> faulty_;
  std::set<int64_t> nan_heads_;
  Problem problem_;
  Elements query_, key_, value_, compressed_, gates_;
  Elements attention_[kKinds];
  Buffer lse_[kKinds];
  Buffer table_, ids_;
  Buffer int_operands_[3];
};

std::vector<Case> Cases() {
  constexpr DataType kBf16 = DataType::kBFloat16, kF16 = DataType::kFloat16,
                     kF32 = DataType::kFloat32;
  std::vector<Case> cases;
  // Each kernel with its own sizes, with smaller ones, and with some that leave nothing aligned.
  const std::pair<int, int> sizes[] = {{64, 64}, {40, 24},   {33, 7},    {128, 128}, {72, 96},
                                       {65, 65}, {192, 128}, {136, 128}, {191, 127}};
  for (DataType dtype : {kBf16, kF16, kF32}) {
    for (const auto& [head, value] : sizes) {
      const std::string name = "dtype " + std::to_string(static_cast<int>(dtype)) + ", " +
                               std::to_string(head) + " and " + std::to_string(value);
      Case c = {name, dtype, 2, 1, 4, 2, head, value, 32, 20, 64, 5, 100, 1};
      cases.push_back(c);
      if (head != 64) continue;
      c.name += ", unaligned";
      c.aligned = c.wants_lse = false;
      cases.push_back(c);
    }
  }
  for (int group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const std::string name = "group " + std::to_string(group);
    Case c = {name, kBf16, 2, 2, group, 2, 32, 16, 16, 19, 32, 9, 130, 70};
    cases.push_back(c);
    c.name += ", gated";
    c.gated = true;
    c.dtype = kF16;
    c.float_gates = group % 3 == 1;
    cases.push_back(c);
    if (group < 32) continue;
    c = {name + ", float32", kF32, 1, 1, group, 1, 32, 16, 16, 19, 32, 9, 130, 70};
    cases.push_back(c);
  }
  // Few columns, over which errors do not average out.
  cases.push_back({"one column", kBf16, 3, 2, 128, 2, 1, 1, 16, 8, 32, 3, 20, 60});
  cases.push_back({"two columns", kF16, 3, 2, 128, 2, 4, 2, 16, 8, 32, 3, 20, 60});
  // Pages and blocks of all proportions.
  for (int page : {16, 48, 64, 112, 128, 256}) {
    for (int block = 16; block <= 128; block += 16) {
      const std::string name = "page " + std::to_string(page) + ", block " + std::to_string(block);
      Case c = {name, kBf16, 3, 2, 2, 1, 16, 16, page, 700 / page, block, 4, 77, 0};
      c.packed = block % 32 == 0;
      c.partial = block % 48 == 0;
      cases.push_back(c);
    }
  }
  // One attention alone; of no size at all, and larger than the sequence.
  Case alone = {"selected alone", kBf16, 3, 2, 4, 2, 32, 32, 64, 6, 64, 7, 0, 0};
  cases.push_back(alone);
  alone = {"window alone", kBf16, 5, 3, 4, 2, 32, 32, 64, 6, 0, 0, 100, 0};
  cases.push_back(alone);
  alone.name = "window of one";
  alone.window_size = 1;
  cases.push_back(alone);
  alone.name = "window without end";
  alone.window_size = std::numeric_limits<int>::max();
  cases.push_back(alone);
  // Whole attentions, and parts of several tiles for each warp.
  cases.push_back({"many rows", kBf16, 150, 1, 1, 2, 16, 16, 64, 8, 64, 6, 160, 0});
  cases.push_back({"longer parts", kBf16, 9, 4, 2, 1, 16, 16, 128, 30, 128, 40, 2000, 3000});
  cases.push_back({"longest parts", kBf16, 1, 1, 2, 1, 16, 16, 256, 80, 128, 90, 20000, 19000});
  // Packed rows of many sequences.
  for (int sequences : {1, 31, 33, 70, 1100}) {
    Case c = {"packed, " + std::to_string(sequences),
              kBf16,
              sequences,
              2,
              1,
              1,
              16,
              16,
              16,
              3,
              16,
              2,
              20,
              0};
    c.packed = true;
    cases.push_back(c);
  }
  Case tokens = {"tokens", kF16, 5, 5, 8, 2, 72, 40, 48, 6, 48, 5, 64, 0};
  tokens.packed = true;
  cases.push_back(tokens);
  tokens.name = "tokens, gated";
  tokens.gated = true;
  cases.push_back(tokens);
  Case partial = {"partial", kBf16, 8, 3, 4, 2, 32, 32, 64, 6, 32, 12, 200, 0};
  partial.partial = partial.float_results = true;
  cases.push_back(partial);
  // Faults.
  Case faulty = {"bad ids", kBf16, 9, 2, 4, 2, 32, 32, 64, 8, 64, 9, 200, 0};
  faulty.bad_ids = 6;
  cases.push_back(faulty);
  faulty.name = "bad ids, gated";
  faulty.gated = true;
  cases.push_back(faulty);
  faulty = {"bad pages", kBf16, 9, 2, 4, 2, 32, 32, 64, 8, 64, 9, 200, 0};
  faulty.bad_pages = 6;
  cases.push_back(faulty);
  faulty.name = "bad pages, window alone";
  faulty.select_count = 0;
  cases.push_back(faulty);
  for (bool packed : {false, true}) {
    faulty = {"faults", kBf16, 9, 3, 4, 2, 32, 32, 64, 8, 64, 9, 200, 0};
    faulty.faults = true;
    faulty.packed = packed;
    if (packed) faulty.name += ", packed";
    // Of packed rows, a count too large takes another sequence's; it is seen all the same.
    cases.push_back(faulty);
    faulty.name += ", gated";
    faulty.gated = true;
    cases.push_back(faulty);
  }
  Case nans = {"NaN queries", kBf16, 5, 3, 8, 2, 64, 32, 16, 40, 64, 12, 100, 1};
  nans.nans = 9;
  cases.push_back(nans);
  return cases;
}

// Devices with different amounts of shared memory: the kernel takes no other notice of them.
constexpr int kDevices[] = {0, 6, 12};

void Test(const Case& c, unsigned number) {
  Call call(c, number);
  static uint64_t seed = first_seed;
  for (int id : kDevices) {
    if (id != kDevices[number % 3] && c.dtype != DataType::kFloat32) continue;
    emulated_cuda::current_device = id;
    const std::string context = c.name + ", " +
                                std::to_string(emulated_cuda::kDevices[id].shared_bytes) +
                                " bytes of shared memory";
    const std::string bits = call.Run(++seed, context);
    call.Check(context);
    EXPECT(bits == call.Run(++seed, context)) << context << ": other bits in another order";
  }
}

}  // namespace
}  // namespace jax_nsa::cuda::select

int main(int argc, char** argv) {
  using namespace jax_nsa::cuda::select;
  if (argc > 2) first_seed = static_cast<unsigned>(std::stoul(argv[2]));
  const std::string only = argc > 1 ? argv[1] : "all";
  unsigned number = 0;
  for (const Case& c : Cases()) {
    ++number;
    if (only != "all" && c.name != only) continue;
    Test(c, number);
    if (jax_nsa::testing::failures > 0) return jax_nsa::testing::ExitStatus();
  }
  const auto& counts = emulated_cuda::counts;
  std::cout << counts.launches << " launches of " << counts.blocks << " thread blocks, "
            << counts.flags << " parts of attentions\n";
  return jax_nsa::testing::ExitStatus();
}
