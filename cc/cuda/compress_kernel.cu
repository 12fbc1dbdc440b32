// Compression's kernel: windows of original tokens become rows of the cache, in one launch for all
// sequences and inputs.
//
// One warp for each chunk of columns of a sequence's window. Most sequences complete no window;
// their warps end once they know.

#include <algorithm>
#include <limits>

#include "cuda/compress_launch.h"
#include "cuda/compress_params.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compress {

using jax_nsa::compress::FindBadPage;
using jax_nsa::compress::FindWindow;
using jax_nsa::compress::kNoWindow;
using jax_nsa::compress::NamesRow;
using jax_nsa::compress::RowOfToken;

constexpr int kLanes = 32, kWarps = 4, kThreads = kWarps * kLanes;

// Neighbouring columns, loaded and stored as one.
template <typename T, int kColumns>
struct alignas(kColumns * sizeof(T)) Columns {
  T elements[kColumns];
};

template <typename T>
constexpr int kAlignedColumns = 16 / sizeof(T);

// The first token of the window that sequence b writes; kNoWindow if it writes none. All lanes of a
// warp ask together.
__device__ int64_t FindWrite(const Params& params, int64_t b) {
  const Problem& problem = params.problem;
  const Arrays& arrays = params.arrays;
  int64_t first;
  FindWindow(problem, arrays, b, &first);
  if (!NamesRow(problem, arrays, b, first)) return kNoWindow;
  bool alone = FindBadPage(problem, arrays, b, first) < 0;
  for (int64_t other = threadIdx.x % kLanes; other < problem.sequences; other += kLanes) {
    if (other == b || arrays.slots[other] != arrays.slots[b]) continue;
    int64_t its_first;
    FindWindow(problem, arrays, other, &its_first);
    alone &= its_first == kNoWindow;
  }
  return __all_sync(~0u, alone) ? first : kNoWindow;
}

template <typename T>
__device__ inline float LoadFactor(const void* array, bool is_float, int64_t i) {
  return is_float ? static_cast<const float*>(array)[i]
                  : static_cast<float>(static_cast<const T*>(array)[i]);
}

// Sums columns of one head over the window, in the order of its tokens.
template <typename T, int kColumns>
__device__ inline void SumColumns(const Params& params, const Pair& pair, int64_t b, int64_t first,
                                  int64_t column) {
  using Loaded = Columns<T, kColumns>;
  const Problem& problem = params.problem;
  const int64_t width = problem.heads * pair.head_size, head = column / pair.head_size;
  if (column >= width) return;
  const bool float_weights = pair.weight_dtype == DataType::kFloat32;
  float sums[kColumns] = {};
  // As windows begin at multiples of kPageGranule, so many tokens lie in one page.
  for (int64_t t = 0; t < problem.compress_block_size; t += kPageGranule) {
    const T* const rows = static_cast<const T*>(pair.input) +
                          RowOfToken(problem, params.arrays, b, first + t) * width + column;
    Loaded tokens[kPageGranule];
    float weights[kPageGranule];
#pragma unroll
    for (int i = 0; i < kPageGranule; ++i) {
      tokens[i] = *reinterpret_cast<const Loaded*>(rows + i * width);
      weights[i] = LoadFactor<T>(pair.weight, float_weights, (t + i) * problem.heads + head);
    }
#pragma unroll
    for (int i = 0; i < kPageGranule; ++i) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sums[c] += weights[i] * static_cast<float>(tokens[i].elements[c]);
      }
    }
  }
  Loaded result;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (pair.bias != nullptr) {
      sums[c] += LoadFactor<T>(pair.bias, pair.bias_dtype == DataType::kFloat32, column + c);
    }
    result.elements[c] = static_cast<T>(sums[c]);
  }
  T* const row = static_cast<T*>(pair.cache) + params.arrays.slots[b] * width;
  *reinterpret_cast<Loaded*>(row + column) = result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) Compress(const __grid_constant__ Params params) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kLanes;
  if (warp >= params.warps) return;
  const int64_t b = warp / params.chunks_per_sequence();
  const int64_t first = FindWrite(params, b);
  if (first == kNoWindow) return;
  const int64_t chunk = warp % params.chunks_per_sequence();
  const int i = chunk < params.chunks[0] ? 0 : 1;
  const Pair& pair = params.arrays.pairs[i];
  const int64_t lane = (i == 0 ? chunk : chunk - params.chunks[0]) * kLanes + threadIdx.x % kLanes;
  if (params.aligned[i]) {
    SumColumns<T, kAlignedColumns<T>>(params, pair, b, first, lane * kAlignedColumns<T>);
  } else {
    SumColumns<T, 1>(params, pair, b, first, lane);
  }
}

template <typename T>
cudaError_t LaunchTyped(Params params, cudaStream_t stream) {
  const Problem& problem = params.problem;
  int64_t chunks = 0;
  for (int64_t i = 0; i < problem.pairs; ++i) {
    const Pair& pair = params.arrays.pairs[i];
    const auto starts_aligned = [](const void* array) {
      return reinterpret_cast<uintptr_t>(array) % 16 == 0;
    };
    params.aligned[i] = pair.head_size % kAlignedColumns<T> == 0 && starts_aligned(pair.input) &&
                        starts_aligned(pair.cache);
    const int64_t columns = kLanes * (params.aligned[i] ? kAlignedColumns<T> : 1);
    params.chunks[i] = (problem.heads * pair.head_size + columns - 1) / columns;
    chunks += params.chunks[i];
  }
  if (problem.sequences > std::numeric_limits<int>::max() / chunks) return cudaErrorInvalidValue;
  params.warps = problem.sequences * chunks;
  if (params.warps == 0) return cudaSuccess;
  void* arguments[] = {&params};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&Compress<T>),
                          dim3(static_cast<unsigned>((params.warps + kWarps - 1) / kWarps)),
                          dim3(kThreads), arguments, 0, stream);
}

cudaError_t Launch(const Problem& problem, const Arrays& arrays, cudaStream_t stream) {
  Params params = {};
  params.problem = problem;
  params.arrays = arrays;
  switch (problem.dtype) {
    case DataType::kBFloat16:
      return LaunchTyped<__nv_bfloat16>(params, stream);
    case DataType::kFloat16:
      return LaunchTyped<__half>(params, stream);
    case DataType::kFloat32:
      return LaunchTyped<float>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_nsa::cuda::compress
