// The compressed branch's CUDA kernel on the emulated machine (emulated_cuda/machine.h), against
// the branch's definition: on devices of many sizes, in two random orders of everything that may
// come in any order, of which both must give the same bits.
//
// It needs neither a GPU nor the CUDA toolkit. Arguments: the name of the only case to run, or
// "all"; a number to draw other problems and orders from.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "compress_attention_cuda_cases.h"
#include "compress_attention_reference.h"
#include "cuda/compress_attention_launch.h"
#include "cuda/compress_attention_plan.h"
#include "elements.h"
#include "emulated_cuda/machine.h"
#include "expect.h"

namespace jax_nsa::cuda::compressed {
namespace {

using testing::Buffer;
using testing::Elements;
using testing::SizeOf;

constexpr int64_t kAlignment = 16;  // bytes, of what XLA allocates at least

unsigned first_seed = 0;  // of problems and launches

// How many launches were of each kind: how the plan splits items, where records lie, how tiles
// come. A share of whole items cuts none; of the others there are so many kinds.
std::map<std::string, int> covered;
constexpr size_t kKinds = 19;

class Call {
 public:
  Call(const Case& c, unsigned seed)
      : case_(c),
        random_(first_seed + seed),
        lengths_(MakeLengths()),
        problem_(MakeProblem()),
        query_(Operand(problem_.rows * problem_.heads * c.head_size)),
        key_(Operand(problem_.num_pages * c.page_size * c.key_value_heads * c.head_size)),
        value_(Operand(problem_.num_pages * c.page_size * c.key_value_heads * c.value_size)),
        attention_(problem_.attention_dtype, problem_.rows * problem_.heads * c.value_size,
                   kAlignment),
        indices_(4 * problem_.rows * c.key_value_heads * c.select_count, kAlignment),
        lse_(c.wants_lse ? 4 * problem_.rows * problem_.heads : 0, kAlignment),
        scores_(c.wants_scores ? 4 * problem_.rows * problem_.heads * problem_.max_blocks() : 0,
                kAlignment),
        table_(4 * c.sequences * c.pages, kAlignment),
        arrays_(MakeArrays()) {
    FillPages();
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < problem_.rows * problem_.heads * c.head_size; ++i) {
      query_.Set(i, c.peaks ? 1.0f : normal(random_));
    }
    for (int i = 0; i < c.nans; ++i) {
      const int64_t head = Random(static_cast<int>(problem_.rows * problem_.heads));
      query_.Set(head * c.head_size, NAN);
    }
  }

  const Problem& problem() const { return problem_; }
  // Operands, and where results are written.
  const Arrays& arrays() const { return arrays_; }

  // Whether all items are equally long.
  bool IsUniform() const {
    const Plan plan = MakePlan(problem_, 1);
    int64_t items = 0;
    for (int b = 0; b < case_.sequences; ++b) {
      if (bad_rows_[b] || lengths_[b] != lengths_[0] || lengths_[b] <= 0) return false;
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
    Buffer workspace(plan.bytes, kAlignment);
    emulated_cuda::FillWithGarbage(workspace.data(), workspace.size());
    // The flags are those that the last launch left, if it had as many.
    if (static_cast<int64_t>(flags_.size()) == plan.parts_offset) {
      std::memcpy(workspace.data(), flags_.data(), flags_.size());
    }
    for (const Buffer* buffer : Results()) {
      std::memset(buffer->data(), seed % 2 ? 0x77 : 0xee, buffer->size());
    }
    const auto tiles = [&] {
      return std::string(workspace.as<char>() + plan.tiles_offset,
                         plan.selection_offset - plan.tiles_offset);
    };
    const std::string tiles_before = tiles();
    EXPECT(Refuses(problem_) == nullptr) << context;
    EXPECT(Launch(problem_, arrays_, workspace.data(), workspace.size(), nullptr) == cudaSuccess)
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
    const bool boxed = emulated_cuda::counts.boxes > counts.boxes;
    const auto whole = [&](int64_t size) { return size * SizeOf(problem_.dtype) % 128 == 0; };
    const bool whole_rows =
        problem_.page_size % kTile == 0 && whole(problem_.head_size) && whole(problem_.value_size);
    ++covered[!boxed       ? "tiles by the lanes of warps"
              : whole_rows ? "tiles in boxes of whole rows"
                           : "tiles in boxes of some columns"];
    if (emulated_cuda::counts.second_boxes > counts.second_boxes) {
      ++covered["boxes that two threads ask for"];
    }
    if (whole_items) ++covered["lines discarded, of whole items"];
    if (cut_items) ++covered["lines discarded, of cut items"];
    if (!whole_items && !cut_items) ++covered["no lines discarded"];
    if (cut && (plan.joint || plan.importances > 0)) {
      ++covered[plan.joint ? "joint items" : "more blocks than fit shared memory, of cut items"];
    }
    flags_.assign(workspace.as<char>(), plan.parts_offset);
    std::string bits;
    for (const Buffer* buffer : Results()) bits += buffer->bytes();
    return bits;
  }

 private:
  std::vector<const Buffer*> Results() const {
    return {&attention_.buffer(), &indices_, &lse_, &scores_};
  }

  Elements Operand(int64_t count) const {
    return Elements(case_.dtype, count, kAlignment, case_.aligned_rows ? 0 : SizeOf(case_.dtype));
  }

  Arrays MakeArrays() const {
    const bool takes_counts = case_.tokens > 1 || case_.ragged;
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = table_.as<int32_t>();
    arrays.lengths = lengths_.data();
    if (takes_counts) arrays.token_counts = counts_.data();
    if (takes_counts) arrays.early_counts = early_.data();
    if (case_.ragged) arrays.first_rows = first_rows_.data();
    if (case_.window.aligned) arrays.select_lengths = original_lengths_.data();
    arrays.attention = attention_.data();
    arrays.topk_indices = indices_.as<int32_t>();
    if (case_.wants_lse) arrays.lse = lse_.as<float>();
    if (case_.wants_scores) arrays.block_scores = scores_.as<float>();
    return arrays;
  }

  int Random(int below) { return static_cast<int>(random_() % below); }

  std::vector<int32_t> MakeLengths() {
    const int capacity = case_.pages * case_.page_size;
    std::vector<int32_t> lengths;
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
    bad_rows_.assign(case_.sequences, false);
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
      for (int b = 1; b < 10; b += 2) bad_rows_[b] = true;
      if (case_.window.aligned) {
        const int size = static_cast<int>(case_.window.compress_block_size);
        const int stride = static_cast<int>(case_.window.compress_stride);
        original_lengths_[0] = lengths_[0] > 0 ? (lengths_[0] - 1) * stride + size - 1 : -1;
        original_lengths_[2] = lengths_[2] * stride + size;
        original_lengths_[4] = std::numeric_limits<int>::min();
        for (int b = 0; b < 5; b += 2) bad_rows_[b] = true;
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

  // Pages in random order; what no sequence holds is NaN, and has illegal ids.
  void FillPages() {
    const int64_t keys = case_.key_value_heads * case_.head_size;
    const int64_t values = case_.key_value_heads * case_.value_size;
    const int64_t rows = problem_.num_pages * case_.page_size;
    for (int64_t i = 0; i < rows * keys; ++i) key_.Set(i, NAN);
    for (int64_t i = 0; i < rows * values; ++i) value_.Set(i, NAN);
    std::vector<int32_t> order(problem_.num_pages);
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
      if (bad_rows_[b]) continue;
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
      }
    }
  }

  int64_t PoolRow(int b, int i) const {
    return int64_t{table_.as<int32_t>()[b * case_.pages + i / case_.page_size]} * case_.page_size +
           i % case_.page_size;
  }

  const Case case_;
  std::mt19937 random_;
  std::vector<int32_t> lengths_, counts_, early_, owned_, first_rows_, original_lengths_;
  std::vector<bool> bad_rows_;  // sequences with faulty lengths or counts
  Problem problem_;
  Elements query_, key_, value_, attention_;
  Buffer indices_, lse_, scores_, table_;
  Arrays arrays_;
  std::string flags_;  // in the workspace
};

void Test(const Case& c, unsigned number) {
  Call call(c, number);
  // Blocks whose importances are equal by design have an exact order.
  testing::CompressAttentionReference reference(call.problem(), call.arrays(),
                                                c.spread == 0.0f || c.peaks);
  static uint64_t seed = first_seed;
  for (int id = static_cast<int>(number) % c.devices; id < emulated_cuda::kNumDevices;
       id += c.devices) {
    emulated_cuda::current_device = id;
    const emulated_cuda::Device& device = emulated_cuda::kDevices[id];
    const std::string context = c.name + ", " + std::to_string(device.multiprocessors) +
                                " multiprocessors with " + std::to_string(device.shared_bytes) +
                                " bytes";
    const std::string bits = call.Run(++seed, context);
    reference.Check(call.arrays(), context);
    EXPECT(bits == call.Run(++seed, context)) << context << ": other bits in another order";
  }
}

}  // namespace
}  // namespace jax_nsa::cuda::compressed

int main(int argc, char** argv) {
  if (argc > 2) jax_nsa::cuda::compressed::first_seed = static_cast<unsigned>(std::stoul(argv[2]));
  const std::string only = argc > 1 ? argv[1] : "all";
  unsigned number = 0;
  for (const auto& c : jax_nsa::cuda::compressed::Cases()) {
    ++number;
    if (only != "all" && c.name != only) continue;
    jax_nsa::cuda::compressed::Test(c, number);
    if (jax_nsa::testing::failures > 0) return jax_nsa::testing::ExitStatus();
  }
  for (const auto& [what, times] : jax_nsa::cuda::compressed::covered) {
    std::cout << times << " launches: " << what << "\n";
  }
  const auto& counts = emulated_cuda::counts;
  std::cout << counts.launches << " launches of " << counts.blocks << " thread blocks, "
            << counts.flags << " parts of items\n";
  EXPECT(only != "all" ||
         jax_nsa::cuda::compressed::covered.size() == jax_nsa::cuda::compressed::kKinds)
      << jax_nsa::cuda::compressed::covered.size() << " kinds of launches, expected "
      << jax_nsa::cuda::compressed::kKinds;
  return jax_nsa::testing::ExitStatus();
}
