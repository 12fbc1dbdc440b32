// Compression's CUDA kernel on the emulated machine (emulated_cuda/machine.h), against plain loops
// in double precision.

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "emulated_cuda/language.h"
#include "emulated_cuda/machine.h"
#include "expect.h"

// Here rather than among the emulated kernels: each launches in its own way.
#include "cuda/compress_kernel.cu"

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  using jax_nsa::cuda::compress::Params;
  if (grid.x == 0) return cudaErrorInvalidConfiguration;
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const Params& params = *static_cast<const Params*>(arguments[0]);
  static char unused[16];  // shared memory
  emulated_cuda::Launch(grid.x, block.x, unused, sizeof unused, false, false,
                        [&] { function(params); });
  return cudaSuccess;
}

namespace jax_nsa::cuda::compress {
namespace {

struct Case {
  std::string name;
  DataType dtype;
  int page_size, size, stride, heads;
  std::vector<int> head_sizes;
  bool bias = true, float_factors = false, counted = false, aligned = true;
  int sequences = 70;
};

// Elements of a floating dtype; where they are not aligned, one element past a multiple of 16
// bytes.
class Elements {
 public:
  Elements(DataType dtype, int64_t count, bool aligned)
      : dtype_(dtype), first_(aligned ? 0 : 1), memory_((count + 1) * 4 / 16 + 1) {}

  void* data() { return reinterpret_cast<char*>(memory_.data()) + first_ * Size(); }
  float Get(int64_t i) {
    if (dtype_ == DataType::kFloat32) return static_cast<float*>(data())[i];
    if (dtype_ == DataType::kFloat16) return float(static_cast<__half*>(data())[i]);
    return float(static_cast<__nv_bfloat16*>(data())[i]);
  }
  void Set(int64_t i, float value) {
    if (dtype_ == DataType::kFloat32) {
      static_cast<float*>(data())[i] = value;
    } else if (dtype_ == DataType::kFloat16) {
      static_cast<__half*>(data())[i] = __half(value);
    } else {
      static_cast<__nv_bfloat16*>(data())[i] = __nv_bfloat16(value);
    }
  }

 private:
  int64_t Size() const { return dtype_ == DataType::kFloat32 ? 4 : 2; }

  DataType dtype_;
  int64_t first_;
  std::vector<float4> memory_;
};

// Sequences of every kind: lengths around the ends of windows, and each fault. One alone is as it
// should be, and writes.
void Test(const Case& c, unsigned seed) {
  constexpr int kRows = 64, kColumns = 20;
  const int sequences = c.sequences;
  std::mt19937 random(seed);
  const auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  Problem problem = {};
  problem.dtype = c.dtype;
  problem.sequences = sequences;
  problem.pages_per_sequence = kColumns;
  problem.num_pages = 30;
  problem.page_size = c.page_size;
  problem.rows = kRows;
  problem.heads = c.heads;
  problem.compress_block_size = c.size;
  problem.compress_stride = c.stride;
  problem.pairs = static_cast<int64_t>(c.head_sizes.size());

  std::vector<int32_t> table(sequences * kColumns), lengths, slots, counts;
  for (int32_t& page : table) page = draw(0, 29);
  for (int b = 0; b < sequences; ++b) {
    lengths.push_back(draw(0, 2) ? c.size + c.stride * draw(0, 2) + draw(-2, 2) : draw(0, 200));
    counts.push_back(draw(0, 3) ? draw(0, c.stride) : 1);
    slots.push_back(b < kRows ? (b * 5 + 3) % kRows : -1 - draw(0, 1));
    if (sequences == 1) lengths[b] = c.size;
    const int fault = sequences == 1 ? -1 : draw(0, 19);
    if (fault == 0) lengths[b] = draw(0, 1) ? -1 : kColumns * c.page_size + 1;
    if (fault == 1) counts[b] = draw(0, 1) ? -1 : c.stride + 1;
    if (fault == 2) slots[b] = kRows + draw(0, 1);
    if (fault == 3) slots[b] = slots[draw(0, b)];
    if (fault == 4) table[b * kColumns + draw(0, c.size / c.page_size)] = draw(0, 1) ? -1 : 30;
  }

  // Which rows are written, from the definition: window by window, token by token.
  std::map<int, int> window_of;  // sequence, its window's end
  std::map<int, int> named;      // row, how many windows name it
  std::set<int> unreadable;
  for (int b = 0; b < sequences; ++b) {
    const int count = c.counted ? counts[b] : 1;
    if (lengths[b] < 0 || lengths[b] > kColumns * c.page_size) continue;
    if (count < 0 || count > c.stride) continue;
    for (int end = c.size; end <= lengths[b]; end += c.stride) {
      if (end <= lengths[b] - count || slots[b] < 0 || slots[b] >= kRows) continue;
      window_of[b] = end;
      ++named[slots[b]];
      for (int t = end - c.size; t < end; ++t) {
        const int page = table[b * kColumns + t / c.page_size];
        if (page < 0 || page >= 30) unreadable.insert(b);
      }
    }
  }

  Arrays arrays = {};
  arrays.block_table = table.data();
  arrays.lengths = lengths.data();
  arrays.slots = slots.data();
  arrays.token_counts = c.counted ? counts.data() : nullptr;
  const DataType factors = c.float_factors ? DataType::kFloat32 : c.dtype;
  std::normal_distribution<float> normal;
  std::vector<Elements> inputs, weights, biases, caches, before;
  for (size_t i = 0; i < c.head_sizes.size(); ++i) {
    const int64_t width = int64_t{c.heads} * c.head_sizes[i];
    const auto drawn = [&](DataType dtype, int64_t count) {
      Elements elements(dtype, count, c.aligned);
      for (int64_t n = 0; n < count; ++n) elements.Set(n, normal(random));
      return elements;
    };
    inputs.push_back(drawn(c.dtype, 30 * c.page_size * width));
    weights.push_back(drawn(factors, c.size * c.heads));
    biases.push_back(drawn(factors, width));
    caches.push_back(drawn(c.dtype, kRows * width));
    before.push_back(caches.back());
    arrays.pairs[i] = {c.head_sizes[i],  factors,           factors,
                       inputs[i].data(), weights[i].data(), c.bias ? biases[i].data() : nullptr,
                       caches[i].data()};
  }

  emulated_cuda::seed = seed;
  EXPECT(Launch(problem, arrays, nullptr) == cudaSuccess) << c.name;
  int written = 0;
  for (size_t i = 0; i < c.head_sizes.size(); ++i) {
    const int64_t width = int64_t{c.heads} * c.head_sizes[i];
    std::set<int> rows;
    for (const auto& [b, end] : window_of) {
      if (named[slots[b]] > 1 || unreadable.count(b)) continue;
      rows.insert(slots[b]);
      ++written;
      for (int64_t column = 0; column < width; ++column) {
        double sum = c.bias ? biases[i].Get(column) : 0, size = std::abs(sum);
        for (int t = 0; t < c.size; ++t) {
          const int token = end - c.size + t;
          const int64_t row = int64_t{table[b * kColumns + token / c.page_size]} * c.page_size +
                              token % c.page_size;
          const double term = double{inputs[i].Get(row * width + column)} *
                              weights[i].Get(t * c.heads + column / c.head_sizes[i]);
          sum += term;
          size += std::abs(term);
        }
        const double rounding = c.dtype == DataType::kFloat32   ? 0x1p-24
                                : c.dtype == DataType::kFloat16 ? 0x1p-11
                                                                : 0x1p-8;
        const double error = std::abs(caches[i].Get(slots[b] * width + column) - sum);
        EXPECT(error <= rounding * std::abs(sum) + 0x1p-21 * size)
            << c.name << ": sequence " << b << ", column " << column;
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int64_t n = row * width; !rows.count(row) && n < (row + 1) * width; ++n) {
        EXPECT(caches[i].Get(n) == before[i].Get(n)) << c.name << ": row " << row << " changed";
      }
    }
  }
  EXPECT((written > 0) == (sequences > 0)) << c.name << " writes " << written << " rows";
}

const Case kCases[] = {
    {"bfloat16 pair", DataType::kBFloat16, 32, 32, 16, 4, {192, 128}},
    {"counted", DataType::kBFloat16, 16, 48, 32, 2, {16, 8}, true, true, true},
    {"float16", DataType::kFloat16, 48, 64, 48, 3, {40}, false, true, true},
    {"float32", DataType::kFloat32, 64, 128, 64, 2, {68, 12}, true, false, true},
    {"odd heads", DataType::kBFloat16, 16, 16, 16, 130, {3, 5}, true, false, true},
    {"one column", DataType::kFloat32, 256, 32, 16, 1, {1}},
    {"unaligned", DataType::kFloat16, 16, 32, 16, 2, {64, 32}, true, false, true, false},
    {"one warp", DataType::kBFloat16, 16, 16, 16, 1, {8}, true, false, false, true, 1},
    {"no warp", DataType::kBFloat16, 16, 16, 16, 1, {8}, true, false, false, true, 0},
};

}  // namespace
}  // namespace jax_nsa::cuda::compress

int main() {
  unsigned seed = 0;
  for (const auto& c : jax_nsa::cuda::compress::kCases) {
    for (int i = 0; i < 3; ++i) jax_nsa::cuda::compress::Test(c, seed++);
  }
  return jax_nsa::testing::ExitStatus();
}
