// The CUDA kernel on the emulated machine (emulated_cuda/machine.h), against plain loops in double
// precision: on devices of many sizes, in two random orders of everything that may come in any
// order, of which both must give the same bits.
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
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "emulated_cuda/language.h"
#include "emulated_cuda/machine.h"
#include "expect.h"

namespace jax_nsa::cuda {
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

enum class Lengths { kEqual, kRagged };

struct Case {
  std::string name;
  DataType dtype;
  int sequences, tokens, group, key_value_heads, head_size, value_size, page_size, pages;
  Blocks window;
  int select_count;
  Lengths lengths;
  int shortest;         // of kRagged; equal ones are all the longest that there can be
  bool ragged = false;  // query rows
  float spread = 1.3f;  // of the scores
  // Equal scores of some positions, lower ones of all others. With one position a block, those of
  // three of the groups in which topk.cuh looks for a bound.
  bool peaks = false;
  bool wants_lse = true, wants_scores = false, aligned_rows = true;
  Forced forced = {1, 2};
  bool causal = false;
  int bad_pages = 0;    // sequences that have one
  bool faults = false;  // of lengths and counts
  int nans = 0;         // heads of queries that are NaN
  int devices = 1;      // every so many-th of the emulated ones
};

unsigned first_seed = 0;  // of problems and launches

// How many launches were of each kind: how the plan splits items, where records lie. A share of
// whole items cuts none; of the others there are so many kinds.
std::map<std::string, int> covered;
constexpr size_t kKinds = 13;

class Call {
 public:
  Call(const Case& c, unsigned seed)
      : case_(c),
        random_(first_seed + seed),
        lengths_(MakeLengths()),
        problem_(MakeProblem()),
        query_(c.dtype, problem_.rows * problem_.heads * c.head_size, c.aligned_rows),
        key_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.head_size,
             c.aligned_rows),
        value_(c.dtype, problem_.num_pages * c.page_size * c.key_value_heads * c.value_size,
               c.aligned_rows),
        attention_(problem_.attention_dtype, problem_.rows * problem_.heads * c.value_size),
        indices_(4 * problem_.rows * c.key_value_heads * c.select_count),
        lse_(c.wants_lse ? 4 * problem_.rows * problem_.heads : 0),
        scores_(c.wants_scores ? 4 * problem_.rows * problem_.heads * problem_.max_blocks() : 0),
        table_(4 * c.sequences * c.pages),
        int_operands_{Buffer(4 * c.sequences), Buffer(4 * c.sequences), Buffer(4 * c.sequences),
                      Buffer(4 * c.sequences), Buffer(4 * c.sequences)} {
    FillPages();
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < problem_.rows * problem_.heads * c.head_size; ++i) {
      query_.Set(i, c.peaks ? 1.0f : normal(random_));
    }
    for (int i = 0; i < c.nans; ++i) {
      const int64_t head = Random(static_cast<int>(problem_.rows * problem_.heads));
      query_.Set(head * c.head_size, NAN);
      nan_heads_.insert(head);
    }
    const std::vector<int>* operands[] = {&lengths_, &counts_, &early_, &first_rows_,
                                          &original_lengths_};
    for (int i = 0; i < 5; ++i) {
      std::memcpy(int_operands_[i].data(), operands[i]->data(), 4 * c.sequences);
    }
  }

  // Whether all items are equally long.
  bool IsUniform() const {
    const Plan plan = MakePlan(problem_, 1);
    int64_t items = 0;
    for (int b = 0; b < case_.sequences; ++b) {
      if (faulty_[b] == kBadRows || lengths_[b] != lengths_[0] || lengths_[b] <= 0) return false;
      items += CeilDiv(counts_[b], plan.tokens_per_chunk) * case_.key_value_heads;
    }
    return items == plan.items && counts_[0] > 0;
  }

  // The results' bits from one launch.
  std::string Run(uint64_t seed, const std::string& context) {
    emulated_cuda::seed = seed;
    const auto counts = emulated_cuda::counts;
    const Plan plan =
        MakePlan(problem_, emulated_cuda::kDevices[emulated_cuda::current_device].multiprocessors);
    EXPECT(plan.bytes <= WorkspaceBytes(problem_)) << context;
    Buffer workspace(plan.bytes);
    emulated_cuda::FillWithGarbage(workspace.data(), workspace.size());
    // The flags are those that the last launch left, if it had as many.
    if (static_cast<int64_t>(flags_.size()) == plan.parts_offset) {
      std::memcpy(workspace.data(), flags_.data(), flags_.size());
    }
    for (const Buffer* buffer : Results()) {
      std::memset(buffer->data(), seed % 2 ? 0x77 : 0xee, buffer->size());
    }
    const bool takes_counts = case_.tokens > 1 || case_.ragged;
    Arrays arrays = {};
    arrays.query = query_.buffer().data();
    arrays.key = key_.buffer().data();
    arrays.value = value_.buffer().data();
    arrays.block_table = table_.as<int32_t>();
    arrays.lengths = int_operands_[0].as<int32_t>();
    if (takes_counts) arrays.token_counts = int_operands_[1].as<int32_t>();
    if (takes_counts) arrays.early_counts = int_operands_[2].as<int32_t>();
    if (case_.ragged) arrays.first_rows = int_operands_[3].as<int32_t>();
    if (case_.window.aligned) arrays.select_lengths = int_operands_[4].as<int32_t>();
    arrays.attention = attention_.buffer().data();
    arrays.topk_indices = indices_.as<int32_t>();
    if (case_.wants_lse) arrays.lse = lse_.as<float>();
    if (case_.wants_scores) arrays.block_scores = scores_.as<float>();
    const auto tiles = [&] {
      return std::string(workspace.as<char>() + plan.tiles_offset,
                         plan.selection_offset - plan.tiles_offset);
    };
    const std::string tiles_before = tiles();
    EXPECT(Refuses(problem_) == nullptr) << context;
    EXPECT(Launch(problem_, arrays, workspace.data(), workspace.size(), nullptr) == cudaSuccess)
        << context;

    const bool cut = emulated_cuda::counts.flags > counts.flags;
    const bool spilled = tiles_before != tiles();
    const char* split = !IsUniform()               ? "unequal items"
                        : plan.items_per_share > 0 ? "whole items for each share"
                        : plan.shares_per_item > 0 ? "whole shares for each item"
                                                   : "equal items, cut anywhere";
    ++covered[std::string(split) + (cut ? ", some cut" : ", none cut")];
    ++covered[!spilled ? "records in shared memory alone"
              : cut    ? "records in the workspace, of a cut item at least"
                       : "records in the workspace, all of whole items"];
    const bool whole_items = emulated_cuda::counts.whole_items_lines > counts.whole_items_lines;
    const bool cut_items = emulated_cuda::counts.cut_items_lines > counts.cut_items_lines;
    if (whole_items) ++covered["lines discarded, of whole items"];
    if (cut_items) ++covered["lines discarded, of cut items"];
    if (!whole_items && !cut_items) ++covered["no lines discarded"];
    flags_.assign(workspace.as<char>(), plan.parts_offset);
    std::string bits;
    for (const Buffer* buffer : Results()) bits += buffer->bytes();
    return bits;
  }

  // Compares the last run's results with plain loops.
  void Check(const std::string& context) const {
    for (int b = 0; b < case_.sequences; ++b) {
      for (int t = 0; t < owned_[b]; ++t) {
        for (int h = 0; h < case_.key_value_heads; ++h) {
          CheckHead(b, t, h,
                    context + ", sequence " + std::to_string(b) + " of length " +
                        std::to_string(lengths_[b]) + " token " + std::to_string(t) + " kv head " +
                        std::to_string(h));
        }
      }
    }
  }

 private:
  enum Faulty { kSound, kBadPage, kBadRows };

  std::vector<const Buffer*> Results() const {
    return {&attention_.buffer(), &indices_, &lse_, &scores_};
  }

  int Random(int below) { return static_cast<int>(random_() % below); }

  std::vector<int> MakeLengths() {
    const int capacity = case_.pages * case_.page_size;
    std::vector<int> lengths;
    for (int b = 0; b < case_.sequences; ++b) {
      const bool equal = case_.lengths == Lengths::kEqual;
      lengths.push_back(equal ? capacity - capacity % 7
                              : case_.shortest + Random(capacity - case_.shortest + 1));
    }
    if (case_.lengths == Lengths::kRagged && case_.shortest == 0) lengths[0] = 0;
    return lengths;
  }

  // Draws the rows of each sequence, too.
  Problem MakeProblem() {
    Problem problem = {};
    faulty_.assign(case_.sequences, kSound);
    for (int b = 0; b < case_.sequences; ++b) {
      const int count = case_.lengths == Lengths::kEqual && !case_.ragged
                            ? case_.tokens
                            : (case_.tokens > 1 ? Random(case_.tokens + 1) : 1);
      const int owned = case_.ragged ? count + Random(2) : case_.tokens;
      counts_.push_back(count);
      early_.push_back(case_.tokens > 1 && count > 0 ? Random(count + 1) : 0);
      owned_.push_back(owned);
      first_rows_.push_back(static_cast<int>(problem.rows));
      problem.rows += owned;
      original_lengths_.push_back(DrawOriginalLength(lengths_[b]));
    }
    if (case_.faults) {
      // Each kind once; the sequences in between stay sound.
      const int capacity = case_.pages * case_.page_size;
      lengths_[1] = -1;
      lengths_[3] = capacity + 1;
      counts_[5] = owned_[5] + 1;
      counts_[7] = -1;
      early_[9] = -1;
      for (int b = 1; b < 10; b += 2) faulty_[b] = kBadRows;
      if (case_.window.aligned) {
        const int size = static_cast<int>(case_.window.compress_block_size);
        const int stride = static_cast<int>(case_.window.compress_stride);
        original_lengths_[0] = lengths_[0] > 0 ? (lengths_[0] - 1) * stride + size - 1 : -1;
        original_lengths_[2] = lengths_[2] * stride + size;
        original_lengths_[4] = std::numeric_limits<int>::min();
        for (int b = 0; b < 5; b += 2) faulty_[b] = kBadRows;
      }
    }
    problem.dtype = case_.dtype;
    problem.attention_dtype = case_.wants_scores ? DataType::kFloat32 : case_.dtype;
    problem.sequences = case_.sequences;
    problem.tokens = case_.ragged ? 0 : case_.tokens;
    problem.key_value_heads = case_.key_value_heads;
    problem.heads = case_.group * case_.key_value_heads;
    problem.head_size = case_.head_size;
    problem.value_size = case_.value_size;
    problem.page_size = case_.page_size;
    problem.pages_per_sequence = case_.pages;
    problem.num_pages = int64_t{case_.sequences} * case_.pages + 1;
    problem.select_count = case_.select_count;
    problem.scale = case_.spread / std::sqrt(static_cast<float>(case_.head_size));
    problem.blocks = case_.window;
    problem.forced = case_.forced;
    problem.causal = case_.causal;
    return problem;
  }

  // Original tokens that compress to so many positions.
  int DrawOriginalLength(int length) {
    const int size = static_cast<int>(case_.window.compress_block_size);
    const int stride = static_cast<int>(case_.window.compress_stride);
    return length > 0 ? (length - 1) * stride + size + Random(stride) : Random(size);
  }

  // How many blocks a token chooses from.
  int64_t NumBlocks(int b, int t) const {
    const Blocks& w = case_.window;
    if (!w.aligned) {
      const int64_t covered = (lengths_[b] - 1) * w.compress_stride + w.compress_block_size;
      return lengths_[b] > 0 ? CeilDiv(covered, w.select_block_size) : 0;
    }
    const int later = case_.causal ? counts_[b] - 1 - t : 0;
    return CeilDiv(std::max(0, original_lengths_[b] - later), w.select_block_size);
  }

  // A head's score of a block, eq. 9 of the paper, in the one order of positions or the other.
  double Score(const std::vector<double>& p, int64_t j) const {
    const Blocks& w = case_.window;
    const int64_t m_count = w.select_block_size / w.compress_stride;
    const int64_t n_count = w.compress_block_size / w.compress_stride;
    double score = 0;
    for (int64_t m = 0; m < m_count; ++m) {
      for (int64_t n = 0; n < n_count; ++n) {
        const int64_t i = w.aligned ? m_count * j + m - n : m_count * (j + 1) - m - n;
        if (i >= 0 && i < static_cast<int64_t>(p.size())) score += p[i];
      }
    }
    return score;
  }

  // Pages in random order; what no sequence holds is NaN, and has illegal ids.
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
      const int used = static_cast<int>(CeilDiv(lengths_[b], case_.page_size));
      for (int p = 0; p < case_.pages; ++p) {
        table[b * case_.pages + p] = p < used ? order[b * case_.pages + p] : -12345;
      }
      if (faulty_[b] == kBadRows) continue;
      for (int i = 0; i < lengths_[b]; ++i) {
        const int64_t row = PoolRow(b, i);
        const float peak = (i + 254) % 256 % 36 < 3 ? 0.25f : 0.0f;  // of block i - 1
        for (int64_t d = 0; d < keys; ++d) {
          key_.Set(row * keys + d, case_.peaks ? peak : normal(random_));
        }
        for (int64_t d = 0; d < values; ++d) value_.Set(row * values + d, normal(random_));
      }
      if (used > 0 && counts_[b] > 0 && bad > 0) {
        const int ids[] = {-1, static_cast<int>(problem_.num_pages),
                           std::numeric_limits<int>::min(), std::numeric_limits<int>::max()};
        table[b * case_.pages + Random(used)] = ids[bad-- % 4];
        faulty_[b] = kBadPage;
      }
    }
  }

  int64_t PoolRow(int b, int i) const {
    return int64_t{table_.as<int32_t>()[b * case_.pages + i / case_.page_size]} * case_.page_size +
           i % case_.page_size;
  }

  void CheckHead(int b, int t, int h, const std::string& context) const {
    const int D = case_.head_size, Dv = case_.value_size, group = case_.group;
    const int64_t row = first_rows_[b] + t, heads = problem_.heads;
    const int64_t max_blocks = problem_.max_blocks();
    const bool absent = t >= counts_[b], faulty = faulty_[b] != kSound;
    const int length = lengths_[b];
    const int visible = absent || faulty ? 0 : length - (t < early_[b] && length > 0 ? 1 : 0);
    const int64_t blocks = absent || faulty ? 0 : NumBlocks(b, t);
    const double accuracy = case_.dtype == DataType::kBFloat16  ? 4e-3
                            : case_.dtype == DataType::kFloat16 ? 6e-4
                                                                : 1e-5;
    std::vector<double> importance(blocks);
    bool any_nan = false;
    for (int g = 0; g < group; ++g) {
      const int64_t head = row * heads + h * group + g;
      if (visible == 0) {
        const auto is_filled = [&](float x, float sound) {
          return faulty ? std::isnan(x) : x == sound;
        };
        bool filled = !case_.wants_lse || is_filled(lse_.as<float>()[head], -INFINITY);
        for (int c = 0; c < Dv; ++c) filled &= is_filled(attention_.Get(head * Dv + c), 0.0f);
        for (int64_t j = 0; case_.wants_scores && j < max_blocks; ++j) {
          filled &= is_filled(scores_.as<float>()[head * max_blocks + j], 0.0f);
        }
        EXPECT(filled) << context << ": results of nothing at all";
        continue;
      }
      if (nan_heads_.count(head) > 0) {
        any_nan = true;
        bool all_nan = !case_.wants_lse || std::isnan(lse_.as<float>()[head]);
        for (int c = 0; c < Dv; ++c) all_nan &= std::isnan(attention_.Get(head * Dv + c));
        EXPECT(all_nan) << context << " head " << g << ": results of a query that is NaN";
        continue;
      }
      std::vector<double> p(visible);
      double peak = -INFINITY, total = 0;
      for (int i = 0; i < visible; ++i) {
        const int64_t at = (PoolRow(b, i) * case_.key_value_heads + h) * D;
        double score = 0;
        for (int c = 0; c < D; ++c) score += double{query_.Get(head * D + c)} * key_.Get(at + c);
        peak = std::max(peak, p[i] = score * double{problem_.scale});
      }
      for (double& x : p) total += x = std::exp(x - peak);
      std::vector<double> attention(Dv), squares(Dv);
      for (int i = 0; i < visible; ++i) {
        p[i] /= total;
        const int64_t at = (PoolRow(b, i) * case_.key_value_heads + h) * Dv;
        for (int c = 0; c < Dv; ++c) {
          const double term = p[i] * value_.Get(at + c);
          attention[c] += term;
          squares[c] += term * term;
        }
      }
      double error = 0, norm = 0;
      for (int c = 0; c < Dv; ++c) {
        const double off = attention_.Get(head * Dv + c) - attention[c];
        error += off * off;
        norm += std::max(squares[c], attention[c] * attention[c]);
      }
      EXPECT(std::sqrt(error) <= accuracy * std::sqrt(norm))
          << context << " head " << g << ": attention off by " << std::sqrt(error) << " of "
          << std::sqrt(norm);
      if (case_.wants_lse) {
        const double lse = peak + std::log(total);
        EXPECT(std::abs(lse_.as<float>()[head] - lse) <= 1e-4)
            << context << " head " << g << ": lse is " << lse_.as<float>()[head] << ", expected "
            << lse;
      }
      for (int64_t j = 0; j < max_blocks; ++j) {
        const double score = Score(p, j);
        if (j < blocks) importance[j] += score;
        if (!case_.wants_scores) continue;
        const float got = scores_.as<float>()[head * max_blocks + j];
        EXPECT(std::abs(got - score) <= 1e-4 * score + 1e-30)
            << context << " head " << g << ": score of block " << j << " is " << got
            << ", expected " << score;
      }
    }
    // NaN ranks below every importance.
    if (any_nan) std::fill(importance.begin(), importance.end(), -1.0);
    CheckIndices(row * case_.key_value_heads + h, importance, context);
  }

  void CheckIndices(int64_t row, std::vector<double> importance, const std::string& context) const {
    const int blocks = static_cast<int>(importance.size());
    std::vector<int> order(blocks);
    std::vector<bool> seen(blocks);
    for (int j = 0; j < blocks; ++j) {
      order[j] = j;
      const bool forced = j < case_.forced.first || j >= blocks - case_.forced.last;
      if (forced) importance[j] = std::numeric_limits<double>::max();
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int i, int j) { return importance[i] > importance[j]; });
    for (int n = 0; n < case_.select_count; ++n) {
      const int got = indices_.as<int32_t>()[row * case_.select_count + n];
      const int expected = n < blocks ? order[n] : -1;
      const bool legal = got >= 0 && got < blocks && !seen[got];
      if (legal) seen[got] = true;
      if (got == expected) continue;
      // Importances that are equal by design have an exact order, as those of nothing at all.
      EXPECT(legal && expected >= 0 && case_.spread > 0.0f && !case_.peaks &&
             importance[expected] > 0.0 &&
             std::abs(importance[got] - importance[expected]) <= 1e-4 * importance[expected])
          << context << ": index " << n << " is " << got << ", expected " << expected;
    }
  }

  const Case case_;
  std::mt19937 random_;
  std::vector<int> lengths_, counts_, early_, owned_, first_rows_, original_lengths_;
  std::vector<Faulty> faulty_;
  std::set<int64_t> nan_heads_;
  Problem problem_;
  Elements query_, key_, value_, attention_;
  Buffer indices_, lse_, scores_, table_;
  Buffer int_operands_[5];
  std::string flags_;  // in the workspace
};

// Few blocks, none, and more than there are.
constexpr Forced kForced[] = {{1, 2}, {0, 1}, {0, 0}, {3, 0}, {300, 400}, {int64_t{1} << 40, 9}};

std::vector<Case> Cases() {
  constexpr DataType kBf16 = DataType::kBFloat16, kF16 = DataType::kFloat16,
                     kF32 = DataType::kFloat32;
  constexpr Lengths kEqual = Lengths::kEqual, kRagged = Lengths::kRagged;
  const Blocks usual = {32, 16, 64}, dense = {16, 16, 16};
  std::vector<Case> cases;
  // Each kernel with its own sizes, with smaller ones, and with some that leave nothing aligned.
  const std::pair<int, int> sizes[] = {{64, 64}, {40, 24},   {33, 7},    {128, 128}, {72, 96},
                                       {65, 65}, {192, 128}, {136, 128}, {191, 127}};
  for (DataType dtype : {kBf16, kF16, kF32}) {
    for (const auto& [head, value] : sizes) {
      const std::string name = "dtype " + std::to_string(static_cast<int>(dtype)) + ", " +
                               std::to_string(head) + " and " + std::to_string(value);
      Case c = {name, dtype, 2, 1, 4, 2, head, value, 16, 10, usual, 8, kRagged, 1};
      c.wants_scores = head % 2 != 0;
      cases.push_back(c);
      if (head != 64) continue;
      c.name += ", unaligned";
      c.aligned_rows = c.wants_lse = false;
      cases.push_back(c);
    }
  }
  for (int group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const std::string name = "group " + std::to_string(group);
    cases.push_back({name, kBf16, 2, 1, group, 1, 32, 16, 16, 9, usual, 9, kRagged, 70});
    if (group > 2) continue;
    cases.push_back(
        {name + ", tokens", kBf16, 2, 7, group, 1, 32, 16, 16, 9, usual, 9, kRagged, 1});
  }
  // Several tokens: some early, some absent, some in chunks.
  Case tokens = {"tokens", kBf16, 4, 4, 8, 2, 64, 32, 64, 4, usual, 70, kRagged, 0};
  tokens.wants_scores = true;
  cases.push_back(tokens);
  cases.push_back({"tokens, equal", kBf16, 4, 4, 4, 2, 64, 32, 64, 4, usual, 20, kEqual, 0});
  tokens = {"tokens, ragged", kF16, 5, 5, 8, 2, 72, 40, 48, 6, {48, 16, 96}, 5, kRagged, 0};
  tokens.ragged = true;
  cases.push_back(tokens);
  tokens = {"chunks", kBf16, 2, 3, 128, 1, 64, 32, 16, 9, dense, 12, kRagged, 1};
  tokens.wants_scores = true;
  cases.push_back(tokens);
  cases.push_back({"chunks, equal", kBf16, 2, 5, 64, 1, 32, 16, 16, 9, usual, 12, kEqual, 0});
  // Pages of more than 128 rows, that tiles of the kernel divide or straddle.
  for (int page : {144, 240, 256}) {
    Case pages = {
        "page " + std::to_string(page), kBf16, 3, 2, 4, 2, 40, 24, page, 4, usual, 9, kRagged, 1};
    pages.wants_scores = true;
    pages.devices = 2;
    cases.push_back(pages);
    pages.name += ", bad pages";
    pages.dtype = kF32;
    pages.bad_pages = 2;
    cases.push_back(pages);
  }
  // Faults.
  Case faulty = {"bad pages", kBf16, 6, 2, 4, 2, 64, 64, 64, 12, usual, 9, kRagged, 0};
  faulty.wants_scores = true;
  faulty.bad_pages = 3;
  cases.push_back(faulty);
  faulty = {"bad rows", kBf16, 12, 3, 4, 1, 32, 32, 16, 6, usual, 9, kRagged, 0};
  faulty.faults = true;
  cases.push_back(faulty);
  faulty.name = "bad rows, ragged";
  faulty.ragged = true;
  faulty.bad_pages = 2;
  cases.push_back(faulty);
  // Items of several parts, records beyond shared memory, blocks beyond it.
  cases.push_back({"long", kBf16, 1, 1, 4, 2, 64, 64, 128, 20, usual, 16, kEqual, 0});
  cases.push_back({"long, three", kBf16, 3, 1, 2, 1, 32, 32, 128, 12, usual, 16, kEqual, 0});
  cases.push_back({"long, unequal", kBf16, 3, 1, 2, 2, 32, 32, 128, 12, usual, 16, kRagged, 30});
  cases.push_back({"long, tokens", kF16, 2, 3, 8, 1, 32, 32, 128, 8, dense, 40, kRagged, 500});
  cases.push_back({"wide", kBf16, 1, 1, 128, 1, 32, 16, 128, 8, usual, 16, kEqual, 0});
  Case scores = {"wide, scores", kBf16, 2, 2, 32, 1, 32, 16, 128, 7, dense, 16, kRagged, 600};
  scores.wants_scores = true;
  cases.push_back(scores);
  scores = {"few chosen, scores", kBf16, 1, 2, 4, 1, 32, 16, 128, 8, usual, 3, kEqual, 0};
  scores.wants_scores = true;
  cases.push_back(scores);
  cases.push_back({"wide, several", kBf16, 3, 1, 64, 1, 136, 64, 128, 3, dense, 16, kRagged, 300});
  // Records of whole and of cut items side by side, none at the start of a cache line.
  cases.push_back({"wide, cut anywhere", kBf16, 5, 23, 4, 1, 72, 32, 16, 30, dense, 9, kEqual, 0});
  cases.push_back({"five items", kBf16, 5, 1, 4, 1, 32, 32, 128, 6, usual, 16, kEqual, 0});
  cases.push_back({"seven items", kBf16, 7, 1, 4, 1, 32, 32, 128, 5, usual, 16, kEqual, 0});
  cases.push_back({"ten items", kBf16, 5, 1, 16, 2, 32, 32, 128, 5, usual, 16, kEqual, 0});
  Case many = {"2300 blocks", kBf16, 1, 1, 2, 1, 32, 16, 128, 18, dense, 16, kEqual, 0};
  cases.push_back(many);
  many.name = "ties";
  many.spread = 0.0f;
  many.devices = 3;
  cases.push_back(many);
  many = {"fewer ties", kBf16, 2, 1, 2, 1, 16, 16, 128, 9, dense, 16, kRagged, 300};
  many.spread = 0.0f;
  cases.push_back(many);
  many = {"peaks", kBf16, 1, 1, 2, 1, 16, 16, 128, 18, dense, 16, kEqual, 0};
  many.peaks = true;
  many.devices = 3;
  cases.push_back(many);
  many.name = "peaks, 150 chosen";
  many.select_count = 150;
  cases.push_back(many);
  many = {"1500 chosen", kBf16, 2, 1, 1, 1, 16, 16, 128, 18, dense, 1500, kRagged, 1200};
  many.devices = 5;
  cases.push_back(many);
  many = {"400 sequences", kBf16, 400, 1, 2, 1, 16, 16, 16, 3, usual, 6, kRagged, 0};
  many.devices = 7;
  cases.push_back(many);
  Case nans = {"NaN queries", kBf16, 5, 3, 8, 2, 64, 32, 16, 40, usual, 12, kRagged, 1};
  nans.nans = 9;
  nans.devices = 2;
  cases.push_back(nans);
  Case records = {
      "many records of cut items", kBf16, 3, 3, 128, 1, 16, 16, 16, 64, dense, 12, kRagged, 400};
  records.wants_scores = true;
  records.bad_pages = 1;
  records.devices = 4;
  cases.push_back(records);
  // Other blocks forced, in every way of choosing the rest.
  const Blocks dense_aligned = {16, 16, 16, true};
  for (const Forced& forced : kForced) {
    const std::string name =
        "forced " + std::to_string(forced.first) + " and " + std::to_string(forced.last);
    for (const auto& [pages, count] : {std::pair(1, 4), {3, 20}, {9, 16}, {9, 100}, {18, 16}}) {
      Case c = {name + ", pages " + std::to_string(pages) + ", choosing " + std::to_string(count),
                kBf16,
                1,
                1,
                2,
                1,
                16,
                16,
                128,
                pages,
                dense_aligned,
                count,
                kRagged,
                100 * pages};
      c.forced = forced;
      c.devices = 7;
      cases.push_back(c);
      c.name += ", cann";
      c.window.aligned = false;
      cases.push_back(c);
    }
    // Sequences that end anywhere in a tile, all of whose blocks are chosen.
    for (const Blocks& window : {usual, {128, 16, 128}, {48, 16, 96, true}}) {
      Case c = {name + ", " + std::to_string(window.num_taps()) + " positions",
                kBf16,
                40,
                1,
                4,
                1,
                16,
                16,
                16,
                8,
                window,
                40,
                kRagged,
                1};
      c.forced = forced;
      c.devices = 9;
      cases.push_back(c);
    }
  }
  for (const Case& c : std::vector<Case>(cases)) {
    const bool wide = c.name == "wide, cut anywhere", tokens = c.name == "tokens, ragged";
    if (!wide && !tokens && c.name != "bad rows" && c.name != "bad rows, ragged" &&
        c.name != "long, unequal" && c.name != "1500 chosen" && c.name != "peaks" &&
        c.name != "fewer ties" && c.name != "NaN queries") {
      continue;
    }
    Case other = c;
    other.name += ", aligned";
    other.window.aligned = true;
    other.causal = tokens || wide;
    other.forced = {0, 1};
    other.devices = 3;
    cases.push_back(other);
  }
  // Ties of blocks in one tile and in two, in one batch of records and in two.
  for (const Blocks& window : {usual, {48, 16, 96}, {128, 16, 128}, {48, 16, 96, true}}) {
    for (int group : {2, 32, 128}) {
      Case c = {"ties of " + std::to_string(window.num_taps()) + " positions, group " +
                    std::to_string(group) + (window.aligned ? ", aligned" : ""),
                kBf16,
                2,
                1,
                group,
                1,
                16,
                16,
                128,
                group > 2 ? 12 : 70,
                window,
                300,
                kRagged,
                100};
      c.spread = 0.0f;
      c.devices = 5;
      cases.push_back(c);
    }
  }
  cases.push_back(
      {"wide, few in a batch", kBf16, 1, 1, 128, 1, 16, 16, 128, 8, {32, 16, 32}, 16, kEqual, 0});
  // All windows.
  int windows = 0;
  for (int stride : {16, 32, 48, 64}) {
    for (int size = stride; size <= kMaxBlockSize; size += 16) {
      for (int select = size; select <= kMaxBlockSize; select += 16) {
        const Blocks window = {size, stride, select};
        if (!window.IsLegal()) continue;
        const std::string name = "window " + std::to_string(size) + "/" + std::to_string(stride) +
                                 "/" + std::to_string(select);
        Case c = {name, kBf16, 2, 1, 4, 1, 32, 16, 16, 12, window, 6, kRagged, 1};
        c.wants_scores = true;
        c.devices = 11;
        cases.push_back(c);
        // Blocks counted by original tokens, of tokens that see fewer and fewer of them.
        c.name += ", aligned";
        c.sequences = 5;
        c.tokens = 40;
        c.shortest = 0;
        c.select_count = 70;
        c.window.aligned = true;
        c.causal = windows % 4 != 3;
        c.forced = kForced[windows++ % 6];
        cases.push_back(c);
      }
    }
  }
  return cases;
}

void Test(const Case& c, unsigned number) {
  Call call(c, number);
  static uint64_t seed = first_seed;
  for (int id = static_cast<int>(number) % c.devices; id < emulated_cuda::kNumDevices;
       id += c.devices) {
    emulated_cuda::current_device = id;
    const emulated_cuda::Device& device = emulated_cuda::kDevices[id];
    const std::string context = c.name + ", " + std::to_string(device.multiprocessors) +
                                " multiprocessors with " + std::to_string(device.shared_bytes) +
                                " bytes";
    const std::string bits = call.Run(++seed, context);
    call.Check(context);
    EXPECT(bits == call.Run(++seed, context)) << context << ": other bits in another order";
  }
}

}  // namespace
}  // namespace jax_nsa::cuda

int main(int argc, char** argv) {
  if (argc > 2) jax_nsa::cuda::first_seed = static_cast<unsigned>(std::stoul(argv[2]));
  const std::string only = argc > 1 ? argv[1] : "all";
  unsigned number = 0;
  for (const auto& c : jax_nsa::cuda::Cases()) {
    ++number;
    if (only != "all" && c.name != only) continue;
    jax_nsa::cuda::Test(c, number);
    if (jax_nsa::testing::failures > 0) return jax_nsa::testing::ExitStatus();
  }
  for (const auto& [what, times] : jax_nsa::cuda::covered) {
    std::cout << times << " launches: " << what << "\n";
  }
  const auto& counts = emulated_cuda::counts;
  std::cout << counts.launches << " launches of " << counts.blocks << " thread blocks, "
            << counts.flags << " parts of items\n";
  EXPECT(only != "all" || jax_nsa::cuda::covered.size() == jax_nsa::cuda::kKinds)
      << jax_nsa::cuda::covered.size() << " kinds of launches, expected " << jax_nsa::cuda::kKinds;
  return jax_nsa::testing::ExitStatus();
}
