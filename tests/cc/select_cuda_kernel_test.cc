// The selected branch's CUDA kernel on the emulated machine (emulated_cuda/machine.h), against the
// branch's definition: in two random orders of everything that may come in any order, of which both
// must give the same bits. In the second order blocks are chosen while the kernel already runs.
//
// It needs neither a GPU nor the CUDA toolkit. Arguments: the name of the only case to run, or
// "all"; a number to draw other problems and orders from.

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
#include <vector>

#include "cuda/select_launch.h"
#include "cuda/select_plan.h"
#include "elements.h"
#include "emulated_cuda/machine.h"
#include "expect.h"
#include "select_attention_reference.h"
#include "select_cuda_cases.h"

namespace jax_nsa::cuda::select {
namespace {

using testing::Buffer;
using testing::Elements;
using Reference = testing::SelectAttentionReference;

unsigned first_seed = 0;  // of problems and launches

constexpr int64_t kAlignment = 16;  // bytes, of what XLA allocates at least

class Call {
 public:
  Call(const Case& c, unsigned seed)
      : case_(c),
        random_(first_seed + seed),
        problem_(MakeProblem()),
        query_(Operand(problem_.rows * problem_.heads * c.head_size)),
        key_(Operand(problem_.num_pages * c.page_size * c.key_value_heads * c.head_size)),
        value_(Operand(problem_.num_pages * c.page_size * c.key_value_heads * c.value_size)),
        attention_{Buffer(AttentionSize(kSelected), kAlignment),
                   Buffer(AttentionSize(kWindow), kAlignment)},
        lse_{Buffer(LseSize(kSelected), kAlignment), Buffer(LseSize(kWindow), kAlignment)},
        table_(4 * c.sequences * c.pages, kAlignment),
        ids_(4 * problem_.rows * c.key_value_heads * c.select_count, kAlignment),
        arrays_(MakeArrays()) {
    DrawIds();
    FillPages();
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < problem_.rows * problem_.heads * c.head_size; ++i) {
      query_.Set(i, normal(random_));
    }
    for (int i = 0; i < c.nans; ++i) {
      const int64_t head = Random(static_cast<int>(problem_.rows * problem_.heads));
      query_.Set(head * c.head_size, NAN);
    }
  }

  const Problem& problem() const { return problem_; }
  // Operands, and where results are written.
  const Arrays& arrays() const { return arrays_; }

  // The results' bits from one launch, which may begin before blocks are chosen if it is `early`.
  std::string Run(uint64_t seed, bool early, const std::string& context) {
    emulated_cuda::seed = seed;
    if (early) {
      const std::string chosen = ids_.bytes();
      std::memset(ids_.data(), 0x7e, ids_.size());
      emulated_cuda::kernel_before = [this, chosen] {
        std::memcpy(ids_.data(), chosen.data(), chosen.size());
      };
    }
    const Plan plan = MakePlan(problem_);
    Buffer workspace(WorkspaceBytes(problem_), kAlignment);
    emulated_cuda::FillWithGarbage(workspace.data(), workspace.size());
    for (const Buffer* buffer : Results()) {
      std::memset(buffer->data(), seed % 2 ? 0x77 : 0xee, buffer->size());
    }
    EXPECT(Refuses(problem_) == nullptr) << context;
    const int64_t early_before = emulated_cuda::counts.early_launches;
    EXPECT(Launch(problem_, arrays_, workspace.data(), workspace.size(), early, nullptr) ==
           cudaSuccess)
        << context;
    // Not where the device cannot, nor without chosen blocks, as nobody would wait then.
    const bool can = emulated_cuda::kDevices[emulated_cuda::current_device].major >= 9;
    EXPECT(emulated_cuda::counts.early_launches - early_before ==
           (early && can && case_.select_count > 0 ? 1 : 0))
        << context;
    for (int64_t i = 0; plan.merged && i < plan.items * plan.all_parts(); ++i) {
      EXPECT(workspace.as<uint64_t>()[i] >> 32 != 0x6a61785f) << context << ": a raised flag";
    }
    std::string bits;
    for (const Buffer* buffer : Results()) bits += buffer->bytes();
    return bits;
  }

 private:
  bool Wants(int kind) const {
    return kind == kSelected ? case_.select_count > 0 : case_.window_size > 0;
  }
  int64_t AttentionSize(int kind) const {
    const int64_t size = testing::SizeOf(problem_.attention_dtype);
    return Wants(kind) ? problem_.rows * problem_.heads * case_.value_size * size : 0;
  }
  int64_t LseSize(int kind) const {
    return Wants(kind) && case_.wants_lse ? 4 * problem_.rows * problem_.heads : 0;
  }
  std::vector<const Buffer*> Results() const {
    return {&attention_[0], &attention_[1], &lse_[0], &lse_[1]};
  }

  Elements Operand(int64_t count) const {
    return Elements(case_.dtype, count, kAlignment,
                    case_.aligned ? 0 : testing::SizeOf(case_.dtype));
  }

  Arrays MakeArrays() const {
    Arrays arrays = {};
    arrays.query = query_.data();
    arrays.key = key_.data();
    arrays.value = value_.data();
    arrays.block_table = table_.as<int32_t>();
    arrays.lengths = lengths_.data();
    if (case_.tokens > 1 || case_.packed) arrays.token_counts = counts_.data();
    if (case_.packed) arrays.first_rows = first_rows_.data();
    if (case_.select_count > 0) arrays.topk_indices = ids_.as<int32_t>();
    if (Wants(kSelected)) arrays.attention = attention_[kSelected].data();
    if (Wants(kWindow)) arrays.window_attention = attention_[kWindow].data();
    if (LseSize(kSelected) > 0) arrays.lse = lse_[kSelected].as<float>();
    if (LseSize(kWindow) > 0) arrays.window_lse = lse_[kWindow].as<float>();
    return arrays;
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
          const int64_t row = first_rows_[b] + t, limit = lengths_[b] - (counts_[b] - 1 - t);
          for (Reference::Kind kind : Reference::kKinds) {
            for (int64_t i : Reference::Positions(problem_, arrays_, row, h, limit, kind)) {
              needed.insert(static_cast<int>(i / case_.page_size));
            }
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

  const Case case_;
  std::mt19937 random_;
  std::vector<int32_t> lengths_, counts_, owned_, first_rows_;
  std::vector<bool> faulty_;
  Problem problem_;
  Elements query_, key_, value_;
  Buffer attention_[kKinds], lse_[kKinds];
  Buffer table_, ids_;
  Arrays arrays_;
};

// Devices with different amounts of shared memory: the kernel takes no other notice of them.
constexpr int kDevices[] = {0, 6, 12};

void Test(const Case& c, unsigned number) {
  Call call(c, number);
  Reference reference(call.problem(), call.arrays());
  static uint64_t seed = first_seed;
  for (int id : kDevices) {
    if (id != kDevices[number % 3] && c.dtype != DataType::kFloat32) continue;
    emulated_cuda::current_device = id;
    const std::string context = c.name + ", " +
                                std::to_string(emulated_cuda::kDevices[id].shared_bytes) +
                                " bytes of shared memory";
    const std::string bits = call.Run(++seed, /*early=*/false, context);
    reference.Check(call.arrays(), context);
    EXPECT(bits == call.Run(++seed, /*early=*/true, context))
        << context << ": other bits in another order";
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
  std::cout << counts.launches << " launches, " << counts.early_launches << " early, of "
            << counts.blocks << " thread blocks, " << counts.flags << " parts of attentions, "
            << counts.boxes << " boxes, " << counts.copies << " copies of 16 bytes\n";
  EXPECT(only != "all" || (counts.boxes > 0 && counts.copies > 0)) << "one way to bring tiles only";
  return jax_nsa::testing::ExitStatus();
}
