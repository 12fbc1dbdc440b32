// From the warps' rows to results. When a part is through, its warps' sums are merged: to results,
// if the part is a whole item, otherwise into its region of the workspace. A cut item is finished
// by the thread block that has its last part, once that one's share is through. It waits for the
// other parts; then its loading warps merge the attention while its consumer warps select. Of a
// joint item all thread blocks do what they can of this.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_MERGE_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_MERGE_CUH_

#include <cmath>

#include "cuda/compress_attention_attend.cuh"
#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_selection.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"
#include "cuda/results.cuh"

namespace jax_nsa::cuda::compressed {

// Columns that the warps merge at a time; the pitch spreads rows over the banks.
constexpr int kMergedColumns = 64, kMergePitch = kMergedColumns + 8;
struct MergeScratch {
  float sums[kConsumers][kRowTile][kMergePitch];
};

struct ConsumerState {
  uint32_t weights[kWeightPairs];  // WeightPair of each entry
  // Of each row, what the warps that have it found.
  alignas(16) float warp_max[kMaxRows][kConsumers];
  alignas(16) float warp_total[kMaxRows][kConsumers];
  alignas(16) int warp_faulty[kConsumers];
  RowNorms norms;
  int faulty;
};

// Where row `row` of the chunk lies in [rows, heads].
__device__ inline int64_t ResultRow(const Params& params, const Part& part, int row) {
  const int token = part.sequence.first_row + part.first_token + (row >> params.group_log2);
  return int64_t{token} * params.heads + (part.head << params.group_log2) +
         (row & (params.group() - 1));
}

// Stores the norm of a row of the merged item: its greatest score and one over the sum of its
// exponentials, and the log-sum-exp where it is asked for. A row that sees nothing has a score of
// -inf and a sum of 0.
__device__ inline void StoreNorm(const Params& params, const Part& part, int row, float maximum,
                                 float total, RowNorms& norms) {
  norms.maxima[row] = total == 0.0f ? 0.0f : maximum;
  norms.inverses[row] = InverseOf(total);
  if (params.arrays.lse && part.finishes()) {
    params.arrays.lse[ResultRow(params, part, row)] =
        LogSumExp(maximum, total, Headroom(params.problem.dtype));
  }
}

// Writes four columns of a row of attention, as far as they exist.
template <typename T>
__device__ inline void StoreAttention(const Params& params, const Part& part, int row, int column,
                                      const float (&x)[4]) {
  StoreAttentionRow<T>(params.arrays.attention, params.problem.attention_dtype,
                       ResultRow(params, part, row), params.value_size, column, x);
}

// What the first `members` of a row's warps found.
struct alignas(16) FromWarps {
  float x[kConsumers];

  __device__ float Max(int members) const {
    float maximum = x[0];
#pragma unroll
    for (int w = 1; w < kConsumers; ++w) maximum = w < members ? fmaxf(maximum, x[w]) : maximum;
    return maximum;
  }
  __device__ float Sum(int members) const {
    float sum = x[0];
#pragma unroll
    for (int w = 1; w < kConsumers; ++w) sum += w < members ? x[w] : 0.0f;
    return sum;
  }
};
__device__ inline FromWarps LoadFromWarps(const float (&row)[kConsumers]) {
  return *reinterpret_cast<const FromWarps*>(row);
}

__device__ inline bool AnyFaulty(const ConsumerState& state) {
  const int4* of_warps = reinterpret_cast<const int4*>(state.warp_faulty);
  const int4 a = of_warps[0], b = of_warps[1];
  return (a.x | a.y | a.z | a.w | b.x | b.y | b.z | b.w) != 0;
}

// Adds up the sums of the warps that have the same rows: to the results if the part is the whole
// item, otherwise into its region. All warps wait for each other here, so it is kept short.
template <typename T, int kHeadSize, int kValueSize>
__device__ void MergeWarps(const Params& params, const Part& part,
                           WarpRows<T, kHeadSize, kValueSize>& rows, bool faulty,
                           ConsumerState& state, MergeScratch& scratch) {
  const int thread = ThreadIndex(), lane = thread % 32, warp = thread / 32;
  const int num_rows = part.rows(params);
  const int row_groups = RowGroups(num_rows), members = kConsumers / row_groups;
  const int member = warp / row_groups;  // of the warps that have these rows
  const int first_row = (warp & (row_groups - 1)) * kRowTile + lane / 4, t = lane % 4;
  const int region = part.own_region();

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 1);
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 2);
    if (t == 0) state.warp_max[first_row + 8 * r][member] = rows.maxima[r];
  }
  if (lane == 0) state.warp_faulty[warp] = faulty;
  SyncConsumers();
  float shrink[2] = {0.0f, 0.0f};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (8 * r >= num_rows) break;
    const int row = first_row + 8 * r;
    shrink[r] = Shrink(rows.maxima[r], LoadFromWarps(state.warp_max[row]).Max(members));
    if (t == 0) state.warp_total[row][member] = rows.totals[r] * shrink[r];
  }

  const int columns = params.value_columns;
  float* attention = params.part_attention(region);
#pragma unroll
  for (int chunk = 0; chunk < kValueSize; chunk += kMergedColumns) {
    if (chunk >= columns) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (8 * r >= num_rows) break;
      float* to = &scratch.sums[warp][lane / 4 + 8 * r][2 * t];
#pragma unroll
      for (int n = 0; n < kMergedColumns / 8; ++n) {
        const float (&sums)[4] = rows.sums[chunk / 8 + n];
        *reinterpret_cast<float2*>(to + 8 * n) = {sums[2 * r] * shrink[r],
                                                  sums[2 * r + 1] * shrink[r]};
      }
    }
    SyncConsumers();
#pragma unroll 1
    for (int i = thread; i < num_rows * kMergedColumns / 4; i += kComputeThreads) {
      const int row = i / (kMergedColumns / 4), column = i % (kMergedColumns / 4) * 4;
      const float* own = &scratch.sums[row / kRowTile][row % kRowTile][column];
      float sum[4] = {};
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        if (w >= members) break;
        const float4 x = *reinterpret_cast<const float4*>(own);
        sum[0] += x.x;
        sum[1] += x.y;
        sum[2] += x.z;
        sum[3] += x.w;
        own += row_groups * (kRowTile * kMergePitch);
      }
      if (chunk + column >= columns) continue;
      if (part.is_cut()) {
        *reinterpret_cast<float4*>(attention + row * columns + chunk + column) = {sum[0], sum[1],
                                                                                  sum[2], sum[3]};
      } else {
        const float total = LoadFromWarps(state.warp_total[row]).Sum(members);
        const float inverse = InverseOf(total);
#pragma unroll
        for (float& x : sum) x *= inverse;
        StoreAttention<T>(params, part, row, chunk + column, sum);
      }
    }
    if (chunk == 0 && thread < num_rows) {
      const bool any_faulty = AnyFaulty(state);
      const float maximum = LoadFromWarps(state.warp_max[thread]).Max(members);
      const float total = LoadFromWarps(state.warp_total[thread]).Sum(members);
      if (part.is_cut()) {
        params.part_max(region)[thread] = maximum;
        params.part_sum(region)[thread] = any_faulty ? -1.0f : total;
      } else {
        StoreNorm(params, part, thread, maximum, total, state.norms);
        if (thread == 0) state.faulty = any_faulty;
      }
    }
    SyncConsumers();
  }
}

// Results of tokens [first, end) of the sequence without any attention: NaN and -1 if faulty, 0 and
// -inf if there is nothing to attend to.
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
    // With aligned blocks a token before the first compressed position has block 0, and no other.
    const bool holds_token = !faulty && token < part.sequence.count;
    const int num_blocks = holds_token ? part.sequence.NumBlocks(params, token) : 0;
    const int count = static_cast<int>(params.problem.select_count);
    int32_t* indices =
        params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count;
#pragma unroll 1
    for (int i = ThreadIndex(); i < count; i += kComputeThreads) {
      indices[i] = i < num_blocks ? i : -1;
    }
    if (params.arrays.lse) fill(params.arrays.lse + first_head, group, faulty ? nan : -INFINITY);
    if (params.arrays.block_scores) {
      fill(params.arrays.block_scores + first_head * params.max_blocks,
           int64_t{group} * params.max_blocks, number);
    }
  }
}

// Merges the parts' maxima and sums: a thread has one row of some of the parts, as neighbouring
// rows lie side by side. Calls `meanwhile` while it waits for memory.
template <typename Function>
__device__ inline void MergeNorms(const Params& params, const Part& part, ConsumerState& state,
                                  Function meanwhile) {
  const int thread = ThreadIndex(), lane = thread % 32, warp = thread / 32;
  const int rows = part.rows(params);
  const int rows_log2 = 32 - __clz(rows - 1), row = thread & ((1 << rows_log2) - 1);
  const int step = kComputeThreads >> rows_log2;
  // What a part found; nothing if there is no such part.
  struct Found {
    float maximum, sum;
  };
  const auto load = [&](int p) -> Found {
    const int region = part.Region(min(p, part.parts - 1)), at = min(row, rows - 1);
    const Found found = {params.part_max(region)[at], params.part_sum(region)[at]};
    return p < part.parts ? found : Found{-INFINITY, 0.0f};
  };
  int p = thread >> rows_log2;
  Found next = load(p);
  meanwhile();
  float maximum = -INFINITY, total = 0.0f;
  bool faulty = false;
#pragma unroll 1
  do {
    const Found found = next;
    next = load(p + step);
    const float larger = fmaxf(maximum, found.maximum);
    total = total * Shrink(maximum, larger) + found.sum * Shrink(found.maximum, larger);
    maximum = larger;
    faulty |= found.sum < 0.0f;
    p += step;
  } while (p < part.parts);
  // Lanes of the warp that have the same row.
  float largest = maximum;
#pragma unroll 1
  for (int other = 1 << rows_log2; other < 32; other *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, other));
  }
  total *= Shrink(maximum, largest);
#pragma unroll 1
  for (int other = 1 << rows_log2; other < 32; other *= 2) {
    total += __shfl_xor_sync(~0u, total, other);
  }
  // Warps that have the same rows.
  const int row_warps_log2 = max(rows_log2 - 5, 0), members = kConsumers >> row_warps_log2;
  if (lane >> rows_log2 == 0) {
    state.warp_max[row][warp >> row_warps_log2] = largest;
    state.warp_total[row][warp >> row_warps_log2] = total;
  }
  faulty = __any_sync(~0u, faulty);
  if (lane == 0) state.warp_faulty[warp] = faulty;
  SyncConsumers();
  if (thread < rows) {
    const FromWarps maxima = LoadFromWarps(state.warp_max[thread]);
    FromWarps totals = LoadFromWarps(state.warp_total[thread]);
    largest = maxima.Max(members);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) totals.x[w] *= Shrink(maxima.x[w], largest);
    StoreNorm(params, part, thread, largest, totals.Sum(members), state.norms);
    if (thread == 0) state.faulty = AnyFaulty(state);
  }
}

// Merges the parts' attention and writes it out: rows `row`, `row` + step and so on, kRows
// neighbours at a time, by one warp. It loads kParts parts of them at a time, so that it does not
// wait for each alone.
template <typename T, int kRows, int kParts>
__device__ void MergeAttention(const Params& params, const Part& part, const RowNorms& norms,
                               int row, int step) {
  static_assert(kMaxValueSize <= 4 * 32 && kRows * kParts <= 32);  // a lane for four columns
  const int lane = threadIdx.x % 32;
  const int column = min(4 * lane, params.value_columns - 4), rows = part.rows(params);
#pragma unroll 1
  for (; row < rows; row += step) {
    // Each of the first lanes works out for one row and part where its sums lie and what they are
    // multiplied by; the other lanes get both from it by shuffles.
    const int own_row = min(row + lane / kParts % kRows, rows - 1), own_part = lane % kParts;
    const float maximum = norms.maxima[own_row], inverse = norms.inverses[own_row];
    float4 sums[kRows] = {};
#pragma unroll 1
    for (int first = 0; first < part.parts; first += kParts) {
      const int region = part.Region(min(first + own_part, part.parts - 1));
      const int place =
          region * static_cast<int>(params.plan.part_floats) + own_row * params.value_columns;
      const float* attention = params.part_attention(0) + column;
      float4 found[kRows][kParts];
#pragma unroll
      for (int i = 0; i < kRows * kParts; ++i) {
        found[i / kParts][i % kParts] =
            *reinterpret_cast<const float4*>(attention + __shfl_sync(~0u, place, i));
      }
      const bool exists = first + own_part < part.parts;
      const float factor =
          exists ? Exp2(params.part_max(region)[own_row] - maximum) * inverse : 0.0f;
#pragma unroll
      for (int i = 0; i < kRows * kParts; ++i) {
        const float of_part = __shfl_sync(~0u, factor, i);
        const float4& x = found[i / kParts][i % kParts];
        float4& sum = sums[i / kParts];
        sum = {sum.x + x.x * of_part, sum.y + x.y * of_part, sum.z + x.z * of_part,
               sum.w + x.w * of_part};
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= rows || 4 * lane >= params.value_columns) continue;
      StoreAttention<T>(params, part, row + r, column,
                        {sums[r].x, sums[r].y, sums[r].z, sums[r].w});
    }
  }
}

// Writes what is left of an item's results when its norms are known: the choice of blocks, and the
// rows without a token. If it is cut, arrives at `records_read` when that is so. Of a joint item,
// does what is the part's.
template <typename T, bool kJoint>
__device__ inline void FinishItem(const Params& params, const Part& part, const Records& records,
                                  ConsumerState& state, SelectionScratch& scratch,
                                  uint64_t* records_read) {
  const int padding = part.is_last_chunk() ? part.sequence.owned : 0;
  const int end = part.first_token + part.tokens;
  if (state.faulty) {
    WaitForCopies<0>();
    if (kJoint && part.IsJoint()) ShareImportances(params, part);
    if (part.is_last()) BarrierArrive(records_read);
    if (!kJoint || part.finishes())
      FillTokens(params, part, part.first_token, max(end, padding), true);
  } else {
    Select<kJoint>(params, part, records, state.norms, scratch, records_read);
    if (!kJoint || part.finishes()) {
      FillTokens(params, part, end, padding, false);
    } else {
      // Rows in turn, to the parts but the last, which has the blocks to choose.
      const int others = part.parts - 1, warp = ThreadIndex() / 32;
      MergeAttention<T, 1, 16>(params, part, state.norms, part.own_number() + warp * others,
                               kConsumers * others);
    }
  }
  if (!part.is_cut()) records.Discard(ThreadIndex(), kComputeThreads);
  SyncConsumers();  // the scratch, and the records' memory, are free again
}

// The loading warps' part in finishing an item that is cut: its attention, unless the item is
// joint.
template <typename T>
__device__ inline void FinishAttention(const Params& params, const Part& part, bool is_joint,
                                       const ConsumerState& state, uint64_t* records_read) {
  const int thread = ThreadIndex() - kComputeThreads;
  if (!state.faulty && !is_joint) {
    constexpr int kRows = 2;
    MergeAttention<T, kRows, 4>(params, part, state.norms, thread / 32 * kRows, kLoaders * kRows);
  }
  if (params.discards) {
    BarrierWait(records_read, 0);
    const Records records(params, part, is_joint, nullptr, 0);
    records.Discard(thread, kThreads - kComputeThreads);
  }
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_MERGE_CUH_
