// Of which steps the second CUDA kernel begins early: the shapes that docs/performance.md names, as
// an H100 has them, and where the limit lies.

#include <cstdint>

#include "cuda/step_plan.h"
#include "expect.h"

namespace jax_nsa::cuda {
namespace {

// The compressed cache of so many sequences, D 192 and Dv 128.
PagedProblem Compressed(int64_t sequences, int64_t pages, int64_t page_size, int64_t heads) {
  PagedProblem problem = {};
  problem.dtype = DataType::kBFloat16;
  problem.sequences = sequences;
  problem.pages_per_sequence = pages;
  problem.page_size = page_size;
  problem.key_value_heads = heads;
  problem.head_size = 192;
  problem.value_size = 128;
  return problem;
}

void TestShapes() {
  constexpr int kH100 = 132;
  constexpr struct {
    int64_t sequences, pages, heads;
    bool early;
  } kShapes[] = {{1, 64, 4, false}, {20, 8, 2, false}, {8, 16, 4, true},
                 {32, 4, 4, true},  {20, 32, 4, true}, {64, 16, 4, true}};
  for (const auto& [sequences, pages, heads, early] : kShapes) {
    EXPECT(BeginsEarly(Compressed(sequences, pages, 128, heads), kH100) == early)
        << sequences << " sequences of " << pages << " pages";
  }
}

// 256 KiB for each of 5 multiprocessors are 1024 positions of 2 heads, 640 bytes each.
void TestLimit() {
  EXPECT(BeginsEarly(Compressed(4, 16, 16, 2), 5));
  EXPECT(!BeginsEarly(Compressed(4, 16, 16, 2), 6)) << "another multiprocessor";
  EXPECT(!BeginsEarly(Compressed(1, 63, 16, 2), 5)) << "a page less";
  PagedProblem wide = Compressed(2, 16, 16, 2);
  EXPECT(!BeginsEarly(wide, 5));
  wide.dtype = DataType::kFloat32;
  EXPECT(BeginsEarly(wide, 5)) << "elements of twice the size";
}

}  // namespace
}  // namespace jax_nsa::cuda

int main() {
  jax_nsa::cuda::TestShapes();
  jax_nsa::cuda::TestLimit();
  return jax_nsa::testing::ExitStatus();
}
