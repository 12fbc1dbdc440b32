// Keys and values that lie in one pool, of each kv head its key and then its value, give the bits
// that they give in pools of their own: of both branches' CPU kernels, for every instruction set
// that this machine can run.
//
// Problems are drawn over the whole domain. What lies around a pool is not there to be read.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "compress_attention_cpu_kernels.h"
#include "cpu/compress_attention_run.h"
#include "cpu/select_isa.h"
#include "cpu/select_run.h"
#include "elements.h"
#include "expect.h"
#include "select_problems.h"

namespace jax_nsa::cpu {
namespace {

using testing::Buffer;
using testing::Case;
using testing::Drawer;
using testing::Elements;

// The pools of a call: `key` and `value`, and `both` with what is in these.
class Pools {
 public:
  Pools(const PagedProblem& problem, Drawer& draw)
      : key_size_(problem.head_size * testing::SizeOf(problem.dtype)),
        value_size_(problem.value_size * testing::SizeOf(problem.dtype)),
        heads_(problem.num_pages * problem.page_size * problem.key_value_heads),
        key_(problem.dtype, heads_ * problem.head_size),
        value_(problem.dtype, heads_ * problem.value_size),
        both_(heads_ * (key_size_ + value_size_)) {
    for (int64_t i = 0; i < heads_ * problem.head_size; ++i) key_.Set(i, draw.Value());
    for (int64_t i = 0; i < heads_ * problem.value_size; ++i) value_.Set(i, draw.Value());
    char* target = both_.data();
    for (int64_t i = 0; i < heads_; ++i) {
      std::memcpy(target, key_.data() + i * key_size_, key_size_);
      std::memcpy(target + key_size_, value_.data() + i * value_size_, value_size_);
      target += key_size_ + value_size_;
    }
  }

  void Use(bool interleaved, PagedArrays* arrays) const {
    arrays->key = interleaved ? both_.data() : key_.data();
    arrays->value = interleaved ? both_.data() + key_size_ : value_.data();
  }

 private:
  const int64_t key_size_, value_size_, heads_;
  Elements key_, value_;
  Buffer both_;
};

// Results of a call, each exactly as large as it must be.
std::string Attend(compress_attention::Problem problem, compress_attention::Arrays arrays,
                   const Pools& pools, const compressed::Kernel& kernel, bool interleaved) {
  problem.interleaved = interleaved;
  pools.Use(interleaved, &arrays);
  const Buffer attention(problem.rows * problem.heads * problem.value_size *
                         testing::SizeOf(problem.attention_dtype));
  const Buffer indices(4 * problem.rows * problem.key_value_heads * problem.select_count);
  const Buffer lse(4 * problem.rows * problem.heads);
  arrays.attention = attention.data();
  arrays.topk_indices = indices.as<int32_t>();
  arrays.lse = lse.as<float>();
  compressed::Run(problem, arrays, kernel, {}).Work();
  return attention.bytes() + indices.bytes() + lse.bytes();
}

std::string Attend(select_attention::Problem problem, select_attention::Arrays arrays,
                   const Pools& pools, const select::Kernel& kernel, bool interleaved) {
  problem.interleaved = interleaved;
  pools.Use(interleaved, &arrays);
  const int64_t size =
      problem.rows * problem.heads * problem.value_size * testing::SizeOf(problem.attention_dtype);
  const Buffer selected(problem.select_count ? size : 0), window(problem.window_size ? size : 0);
  if (problem.select_count) arrays.attention = selected.data();
  if (problem.window_size) arrays.window_attention = window.data();
  select::Run(problem, arrays, kernel).Work();
  return selected.bytes() + window.bytes();
}

// The same sequences for the compressed branch.
compress_attention::Problem Compressed(const Case& c, Drawer& draw) {
  compress_attention::Problem problem = {};
  static_cast<PagedProblem&>(problem) = c.problem;
  problem.attention_dtype = problem.dtype;
  problem.select_count = draw.Of(1, 20);
  problem.blocks = {32, 16, 64};
  return problem;
}

void Test(DataType dtype, Drawer& draw) {
  Case c = draw.Draw(dtype);
  // Lengths of sequences that are split over devices are not all their own.
  for (int32_t& length : c.lengths) {
    length = std::clamp<int32_t>(length, 0, static_cast<int32_t>(c.problem.capacity()));
  }
  const Pools pools(c.problem, draw);
  Elements query(dtype, c.problem.rows * c.problem.heads * c.problem.head_size);
  for (int64_t i = 0; i < c.problem.rows * c.problem.heads * c.problem.head_size; ++i) {
    query.Set(i, draw.Value());
  }
  select_attention::Arrays arrays = {};
  arrays.query = query.data();
  arrays.block_table = c.table.data();
  arrays.lengths = c.lengths.data();
  arrays.token_counts = c.counts.data();
  arrays.first_rows = c.packed ? c.firsts.data() : nullptr;
  compress_attention::Arrays compressed_arrays = {};
  static_cast<PagedArrays&>(compressed_arrays) = arrays;
  arrays.topk_indices = c.problem.select_count ? c.ids.data() : nullptr;
  const compress_attention::Problem problem = Compressed(c, draw);

  for (const compressed::Kernel* kernel : compressed::Kernels()) {
    EXPECT(Attend(problem, compressed_arrays, pools, *kernel, true) ==
           Attend(problem, compressed_arrays, pools, *kernel, false))
        << kernel->name << ": other bits of the compressed branch, heads of " << problem.head_size
        << " and " << problem.value_size;
    const select::Kernel* const select = select::FindKernel(kernel->name);
    if (select == nullptr) continue;
    EXPECT(Attend(c.problem, arrays, pools, *select, true) ==
           Attend(c.problem, arrays, pools, *select, false))
        << kernel->name << ": other bits of the selected branch, heads of " << problem.head_size
        << " and " << problem.value_size;
  }
}

}  // namespace
}  // namespace jax_nsa::cpu

int main() {
  using jax_nsa::DataType;
  jax_nsa::testing::Drawer draw(5);
  for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16, DataType::kFloat32}) {
    for (int number = 0; number < 30; ++number) jax_nsa::cpu::Test(dtype, draw);
  }
  return jax_nsa::testing::ExitStatus();
}
