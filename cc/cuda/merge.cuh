// From the warps' rows to results. The warps of a part are merged: to results, if it is all of its
// item, otherwise into its region of the workspace; the thread block that stores an item's last
// part merges the parts, always in their order, whichever came last.

#ifndef JAX_NSA_CUDA_MERGE_CUH_
#define JAX_NSA_CUDA_MERGE_CUH_

#include <cmath>

#include "cuda/attend.cuh"
#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/selection.cuh"
#include "cuda/work.cuh"

namespace jax_nsa::cuda {

constexpr float kLn2 = 0.6931471805599453f;

// Columns that the warps merge at a time; the pitch spreads rows over the banks.
constexpr int kMergedColumns = 64, kMergePitch = kMergedColumns + 8;
struct MergeScratch {
  float sums[kConsumers][kRowTile][kMergePitch];
};

struct ConsumerState {
  uint32_t weights[kWeightPairs];  // Params::weights
  float warp_max[kConsumers][kRowTile], warp_total[kConsumers][kRowTile];
  int warp_faulty[kConsumers];
  RowNorms norms;
  int is_last;
  int faulty;
};

// exp2(a - b), where -inf stands for nothing at all.
__device__ inline float Shrink(float a, float b) { return b == -INFINITY ? 0.0f : Exp2(a - b); }

// Where row `row` of the chunk lies in [rows, heads].
__device__ inline int64_t ResultRow(const Params& params, const Part& part, int row) {
  const int token = part.sequence.first_row + part.first_token + (row >> params.group_log2);
  return int64_t{token} * params.heads + (part.head << params.group_log2) +
         (row & (params.group() - 1));
}

// Writes up to four columns of a row of the result.
template <typename T>
__device__ inline void StoreColumns(T* to, const float (&x)[4], int columns) {
  if (columns >= 4 && reinterpret_cast<uintptr_t>(to) % (4 * sizeof(T)) == 0) {
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
    } else {
      *reinterpret_cast<uint2*>(to) = {Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3])};
    }
  } else {
    for (int c = 0; c < 4; ++c) {
      if (c < columns) to[c] = static_cast<T>(x[c]);
    }
  }
}

// The norm of a row of the merged item, from the largest score and the sum of the exponentials. A
// row that sees nothing has a sum of 0 and a score of -inf.
__device__ inline float Log2Sum(float maximum, float total) {
  return total == 0.0f ? 0.0f : maximum + log2f(total);
}

__device__ inline void StoreNorm(const Params& params, const Part& part, int row, float maximum,
                                 float total, RowNorms& norms) {
  const float log2_sum = Log2Sum(maximum, total);
  norms.log2_sum[row] = log2_sum;
  if (params.arrays.lse) {
    params.arrays.lse[ResultRow(params, part, row)] = total == 0.0f ? -INFINITY : log2_sum * kLn2;
  }
}

// Writes four columns of a row of attention, as far as they exist.
template <typename T>
__device__ inline void StoreAttention(const Params& params, const Part& part, int row, int column,
                                      const float (&x)[4]) {
  const int64_t at = ResultRow(params, part, row) * params.value_size + column;
  const int columns = params.value_size - column;
  if (params.problem.attention_dtype == DataType::kFloat32) {
    StoreColumns(static_cast<float*>(params.arrays.attention) + at, x, columns);
  } else {
    StoreColumns(static_cast<T*>(params.arrays.attention) + at, x, columns);
  }
}

// Adds up the sums of the warps that have the same rows: to the results if the part is the whole
// item, otherwise into its region.
template <typename T, int kHeadSize, int kValueSize>
__device__ void MergeWarps(const Params& params, const Part& part,
                           WarpRows<T, kHeadSize, kValueSize>& rows, bool faulty,
                           ConsumerState& state, MergeScratch& scratch) {
  const int thread = ThreadIndex(), lane = thread % 32, warp = thread / 32;
  const int row_groups = RowGroups(part.rows(params));  // a power of two
  const int region = part.own_region();
  const int g = lane / 4, t = lane % 4;

  for (int r = 0; r < 2; ++r) {
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 1);
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 2);
    if (t == 0) {
      state.warp_max[warp][g + 8 * r] = rows.maxima[r];
      state.warp_total[warp][g + 8 * r] = rows.totals[r];
    }
  }
  if (lane == 0) state.warp_faulty[warp] = faulty;
  SyncConsumers();
#pragma unroll
  for (int w = 0; w < kConsumers; ++w) faulty |= state.warp_faulty[w] != 0;
  if (thread == 0) state.faulty = faulty;
  const auto same_rows = [&](int w) { return ((w ^ warp) & (row_groups - 1)) == 0; };
  float shrink[2];
  for (int r = 0; r < 2; ++r) {
    float maximum = -INFINITY, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      if (same_rows(w)) maximum = fmaxf(maximum, state.warp_max[w][g + 8 * r]);
    }
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      if (same_rows(w)) {
        total += state.warp_total[w][g + 8 * r] * Shrink(state.warp_max[w][g + 8 * r], maximum);
      }
    }
    shrink[r] = Shrink(rows.maxima[r], part.is_cut() ? maximum : Log2Sum(maximum, total));
    const int row = kRowTile * warp + g + 8 * r;
    if (warp < row_groups && t == 0) {
      if (part.is_cut()) {
        params.part_max(region)[row] = maximum;
        params.part_sum(region)[row] = faulty ? -1.0f : total;
      } else if (row < part.rows(params)) {
        StoreNorm(params, part, row, maximum, total, state.norms);
      }
    }
  }

  const int columns = params.value_columns;
  float* attention = params.part_attention(region);
#pragma unroll
  for (int chunk = 0; chunk < kValueSize; chunk += kMergedColumns) {
    if (chunk >= columns) break;
#pragma unroll
    for (int n = 0; n < kMergedColumns / 8; ++n) {
      const float (&sums)[4] = rows.sums[chunk / 8 + n];
      float* to = &scratch.sums[warp][g][8 * n + 2 * t];
      *reinterpret_cast<float2*>(to) = {sums[0] * shrink[0], sums[1] * shrink[0]};
      *reinterpret_cast<float2*>(to + 8 * kMergePitch) = {sums[2] * shrink[1], sums[3] * shrink[1]};
    }
    SyncConsumers();
#pragma unroll 1
    for (int i = thread; i < row_groups * kRowTile * kMergedColumns / 4; i += kComputeThreads) {
      const int row = i / (kMergedColumns / 4), column = chunk + i % (kMergedColumns / 4) * 4;
      float sum[4] = {};
#pragma unroll
      for (int turn = 0; turn < kConsumers; ++turn) {
        const int w = row / kRowTile + turn * row_groups;
        if (w < kConsumers) {
          const float4 own =
              *reinterpret_cast<const float4*>(&scratch.sums[w][row % kRowTile][column - chunk]);
          sum[0] += own.x;
          sum[1] += own.y;
          sum[2] += own.z;
          sum[3] += own.w;
        }
      }
      if (column >= columns) continue;
      if (part.is_cut()) {
        StoreColumns(attention + row * columns + column, sum, 4);
      } else if (row < part.rows(params)) {
        StoreAttention<T>(params, part, row, column, sum);
      }
    }
    SyncConsumers();
  }
}

// The workspace comes uninitialised, so arrival cannot be counted. Each part raises its flag to a
// value that no garbage holds, then looks at all of the item's flags: the last one to arrive sees
// them all raised, as may some that came just before it. Exactly one of them takes the first flag
// down, and it is the one that merges; it leaves no flag raised for the next launch.
constexpr unsigned long long kArrived = 0x6a61785f6e736121ull, kClaimed = ~kArrived;

// Whether this thread block, whose part is stored, is the one that merges the item.
__device__ inline bool Arrive(const Params& params, const Part& part, ConsumerState& state) {
  const int thread = ThreadIndex(), lane = thread % 32, parts = part.parts;
  if (thread < 32) {
    volatile unsigned long long* flags = params.flags();
    __threadfence();
    if (lane == 0) flags[part.own_region()] = kArrived;
    __syncwarp();
    FenceSequentially();  // of those that arrive together, one at least sees all others:
    __syncwarp();         // no lane looks before every lane has passed its fence
    bool all = true;
#pragma unroll 1
    for (int p = lane; p < parts; p += 32) all = all && flags[part.Region(p)] == kArrived;
    all = __all_sync(~0u, all);
    if (lane == 0) {
      unsigned long long* first = params.flags() + part.Region(0);
      state.is_last = all && atomicCAS(first, kArrived, kClaimed) == kArrived;
    }
    if (all) __threadfence();
  }
  SyncConsumers();
  const bool is_last = state.is_last != 0;
  if (is_last) {
#pragma unroll 1
    for (int p = thread; p < parts; p += kComputeThreads) {
      params.flags()[part.Region(p)] = 0;
    }
  }
  return is_last;
}

// Results of tokens [first, end) of the sequence without any attention: NaN and -1 if faulty, 0, -1
// and -inf if there is nothing to attend to.
__device__ inline void FillTokens(const Params& params, const Part& part, int first, int end,
                                  bool faulty) {
  const int group = params.group();
  const float nan = __int_as_float(0x7fffffff), number = faulty ? nan : 0.0f;
#pragma unroll 1
  for (int token = first; token < end; ++token) {
    const int64_t row = part.sequence.first_row + token;
    const int64_t first_head = row * params.heads + part.head * group;
    const auto fill = [&](auto* to, int64_t count, auto with) {
#pragma unroll 1
      for (int64_t i = ThreadIndex(); i < count; i += kComputeThreads) to[i] = with;
    };
    const int64_t at = first_head * params.value_size;
    const int size = group * params.value_size;
    if (params.problem.attention_dtype == DataType::kFloat32) {
      fill(static_cast<float*>(params.arrays.attention) + at, size, number);
    } else {  // zero, and this NaN, have the same bits in both 16-bit types
      fill(static_cast<uint16_t*>(params.arrays.attention) + at, size,
           static_cast<uint16_t>(faulty ? 0x7fff : 0));
    }
    const int count = static_cast<int>(params.problem.select_count);
    fill(params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count, count,
         -1);
    if (params.arrays.lse) fill(params.arrays.lse + first_head, group, faulty ? nan : -INFINITY);
    if (params.arrays.block_scores) {
      fill(params.arrays.block_scores + first_head * params.max_blocks,
           int64_t{group} * params.max_blocks, number);
    }
  }
}

// Merges the parts' maxima and sums: as many lanes for each row as there are parts, if a warp has
// them.
__device__ inline void MergeNorms(const Params& params, const Part& part, ConsumerState& state) {
  const int thread = ThreadIndex(), lane = thread % 32, rows = part.rows(params);
  const int lanes = part.parts >= 32 ? 32 : 1 << (32 - __clz(part.parts - 1));
  const int per_warp = 32 / lanes;
#pragma unroll 1
  for (int first = thread / 32 * per_warp; first < rows; first += kConsumers * per_warp) {
    const int own = first + lane / lanes, row = min(own, rows - 1);
    float maximum = -INFINITY, total = 0.0f;
    bool faulty = false;
#pragma unroll 1
    for (int p = lane & (lanes - 1); p < part.parts; p += lanes) {
      const float part_max = params.part_max(part.Region(p))[row];
      const float part_sum = params.part_sum(part.Region(p))[row];
      const float larger = fmaxf(maximum, part_max);
      total = total * Shrink(maximum, larger) + part_sum * Shrink(part_max, larger);
      maximum = larger;
      faulty |= part_sum < 0.0f;
    }
#pragma unroll 1
    for (int step = lanes / 2; step > 0; step /= 2) {
      const float larger = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
      total *= Shrink(maximum, larger);
      total += __shfl_xor_sync(~0u, total, step);
      maximum = larger;
    }
    faulty = __any_sync(~0u, faulty);
    if ((lane & (lanes - 1)) == 0 && own < rows) {
      StoreNorm(params, part, row, maximum, total, state.norms);
      if (row == 0) state.faulty = faulty;
    }
  }
}

// Merges the parts' attention and writes it out.
template <typename T>
__device__ void MergeAttention(const Params& params, const Part& part, const RowNorms& norms) {
  static_assert(kMaxValueSize <= 4 * 32);  // a lane for four columns
  const int thread = ThreadIndex(), column = thread % 32 * 4, rows = part.rows(params);
  if (column >= params.value_columns) return;
  // A warp takes two rows at a time, to have more loads in flight.
#pragma unroll 1
  for (int first = thread / 32; first < rows; first += 2 * kConsumers) {
    const int row[2] = {first, min(first + kConsumers, rows - 1)};
    float sum[2][4] = {};
#pragma unroll 8
    for (int p = 0; p < part.parts; ++p) {
      const int region = part.Region(p);
      const float* maxima = params.part_max(region);
      const float* attention = params.part_attention(region) + column;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float4 own =
            *reinterpret_cast<const float4*>(attention + row[r] * params.value_columns);
        const float factor = Exp2(maxima[row[r]] - norms.log2_sum[row[r]]);
        sum[r][0] += own.x * factor;
        sum[r][1] += own.y * factor;
        sum[r][2] += own.z * factor;
        sum[r][3] += own.w * factor;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) StoreAttention<T>(params, part, row[r], column, sum[r]);
  }
}

// Writes the results of an item whose parts are all merged or stored.
template <typename T>
__device__ void FinishItem(const Params& params, const Part& part, const Records& records,
                           ConsumerState& state, SelectionScratch& scratch) {
  if (part.is_cut()) {
    MergeNorms(params, part, state);
    SyncConsumers();
  }
  const int padding = part.is_last_chunk() ? part.sequence.owned : 0;
  const int end = part.first_token + part.tokens;
  if (state.faulty) {
    FillTokens(params, part, part.first_token, max(end, padding), true);
  } else {
    if (part.is_cut()) MergeAttention<T>(params, part, state.norms);
    Select(params, part, records, state.norms, scratch);
    FillTokens(params, part, end, padding, false);
  }
  SyncConsumers();  // the region and the scratch are free again
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_MERGE_CUH_
