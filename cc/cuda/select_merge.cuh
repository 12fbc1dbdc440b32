// From the warps' rows to results. The warps of a thread block are merged: to results, if its part
// is all of an attention, otherwise into the workspace, where one of the thread blocks that have
// its parts merges them.

#ifndef JAX_NSA_CUDA_SELECT_MERGE_CUH_
#define JAX_NSA_CUDA_SELECT_MERGE_CUH_

#include <cmath>

#include "cuda/ptx.cuh"
#include "cuda/results.cuh"
#include "cuda/select_attend.cuh"
#include "cuda/select_item.cuh"
#include "cuda/select_params.cuh"
#include "cuda/select_ptx.cuh"

namespace jax_nsa::cuda::select {

// Shared memory, before the rings.
struct alignas(kSwizzle) Shared {
  // Of each row, what the warps that have it found.
  float maxima[kWarps][kRowTile];
  float totals[kWarps][kRowTile];
  int faulty[kWarps];
  int finishes;                        // whether this thread block merges the parts
  uint64_t full[kWarps * kMaxStages];  // of each team's stages, for boxes
};

// What takes the place of the rings when all tiles are through: the warps' sums,
template <int kValueSize>
struct WarpSums {
  static constexpr int kPitch = kValueSize + 8;  // spreads rows over the banks
  float sums[kWarps][kRowTile][kPitch];
};
// and then what each part counts.
struct PartFactors {
  float factors[kMaxParts][kMaxRows];
};

// Where a row of the item lies in [rows, heads].
__device__ inline int64_t ResultRow(const Params& params, const Item& item, int row) {
  return int64_t{item.row} * params.heads + item.first_head + row;
}
__device__ inline void* Attention(const Params& params, int kind) {
  return kind == kSelected ? params.arrays.attention : params.arrays.window_attention;
}
__device__ inline float* Lse(const Params& params, int kind) {
  return kind == kSelected ? params.arrays.lse : params.arrays.window_lse;
}

// Writes four columns of a row of attention, as far as they exist.
template <typename T>
__device__ inline void StoreAttention(const Params& params, const Item& item, int kind, int row,
                                      int column, const float (&x)[4]) {
  StoreAttentionRow<T>(Attention(params, kind), params.problem.attention_dtype,
                       ResultRow(params, item, row), params.value_size, column, x);
}

// Results without any attention, of the item's rows: NaN if faulty, otherwise 0 and -inf. Of all
// the thread blocks of an item, the one with the first part of each result writes them.
template <typename T>
__device__ inline void FillResults(const Params& params, const Item& item, bool faulty) {
  if (item.part != 0) return;
  const float nan = __int_as_float(0x7fffffff), number = faulty ? nan : 0.0f;
  const float numbers[4] = {number, number, number, number};
  const int quads = params.value_columns / 4;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < params.plan.rows; row += kWarps) {
    if (const int quad = threadIdx.x % 32; quad < quads) {
      StoreAttention<T>(params, item, item.kind, row, 4 * quad, numbers);
    }
  }
  float* lse = Lse(params, item.kind);
  if (const int row = threadIdx.x; lse != nullptr && row < params.plan.rows) {
    lse[ResultRow(params, item, row)] = faulty ? nan : -INFINITY;
  }
}

// The workspace comes uninitialised, so arrivals cannot be counted. Each part raises a flag to a
// value that hardly any garbage holds, and then looks at those of all parts: who comes last sees
// all of them raised, whoever else does, too. Merging twice gives the same bits twice. Whoever
// merges lowers the flags first: who finds some of them lowered leaves it to that one. So no
// thread block waits for another, and all flags are down when a launch ends.
constexpr uint64_t kArrived = 0x6a61785f73656c21ull;

// Raises the flag of the thread block's part when all of its threads have stored it, and tells
// whether all of `parts` from `first` on are there. By all threads.
__device__ inline bool Arrive(const Params& params, int64_t own, int64_t first, int parts,
                              Shared& shared) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    if (lane == 0) StoreRelease(params.flag(own), kArrived);
    __syncwarp();
    FenceStoresAndLoads();
    bool all = true;
#pragma unroll 1
    for (int p = lane; p < parts; p += 32) all &= LoadAcquire(params.flag(first + p)) == kArrived;
    all = __all_sync(~0u, all);
    if (all) {
#pragma unroll 1
      for (int p = lane; p < parts; p += 32) *params.flag(first + p) = 0;
    }
    if (lane == 0) shared.finishes = all;
  }
  __syncthreads();
  return shared.finishes;
}

// The first part of an attention of the item.
__device__ inline int64_t FirstPart(const Params& params, const Item& item, int kind) {
  return params.PartIndex(item.index, kind == kWindow ? params.plan.parts[kSelected] : 0);
}

// Finds by what each part of an attention is multiplied, row by row: as many lanes for each row as
// there are parts, or somewhat more. Writes lse.
__device__ inline void FindFactors(const Params& params, const Item& item, int kind, int64_t first,
                                   float (&factors)[kMaxParts][kMaxRows]) {
  static_assert(kMaxParts <= 32);
  constexpr int kAhead = 2;  // rows that a lane has in hand
  const int lane = threadIdx.x % 32, parts = params.plan.parts[kind], rows = params.plan.rows;
  const int lanes_log2 = parts == 1 ? 0 : 32 - __clz(parts - 1), lanes = 1 << lanes_log2;
  const int part = lane & (lanes - 1), rows_each = 32 >> lanes_log2;
  const int own_row = threadIdx.x / 32 * rows_each + (lane >> lanes_log2);
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += kAhead * kWarps * rows_each) {
    float maxima[kAhead], totals[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int row = begin + i * kWarps * rows_each + own_row;
      maxima[i] = -INFINITY;
      totals[i] = 0.0f;
      if (part < parts && row < rows) {
        maxima[i] = LoadShared(params.part_maxima(first + part) + row);
        totals[i] = LoadShared(params.part_totals(first + part) + row);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int row = begin + i * kWarps * rows_each + own_row;
      float maximum = maxima[i], total = totals[i];
#pragma unroll 1
      for (int step = 1; step < lanes; step *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, step));
      }
      const float shrink = Shrink(maxima[i], maximum);
      total *= shrink;
#pragma unroll 1
      for (int step = 1; step < lanes; step *= 2) total += __shfl_xor_sync(~0u, total, step);
      if (part >= parts || row >= rows) continue;
      factors[part][row] = shrink * InverseOf(total);
      if (float* lse = Lse(params, kind); part == 0 && lse != nullptr) {
        lse[ResultRow(params, item, row)] =
            LogSumExp(maximum, total, Headroom(params.problem.dtype));
      }
    }
  }
}

// Adds up the parts of attention `kind`, kRows rows and kParts parts in hand. `find_factors` is
// called, once, while the first ones are on their way.
template <typename T, int kRows, int kParts, typename Function>
__device__ inline void AddParts(const Params& params, const Item& item, int kind,
                                const PartFactors& scratch, Function find_factors) {
  const int lane = threadIdx.x % 32, rows = params.plan.rows, parts = params.plan.parts[kind];
  const bool exists = 4 * lane < params.value_columns;
  const int column = exists ? 4 * lane : 0;
  const float* from = params.part_sums(FirstPart(params, item, kind)) + column;
  bool found = false;
#pragma unroll 1
  for (int begin = 0; begin < rows; begin += kWarps * kRows) {
    int own_rows[kRows];  // the last one again where there are no more
    float sums[kRows][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      own_rows[r] = min(begin + static_cast<int>(threadIdx.x) / 32 + r * kWarps, rows - 1);
#pragma unroll
      for (float& sum : sums[r]) sum = 0.0f;
    }
#pragma unroll 1
    for (int first = 0; first < parts; first += kParts) {
      float4 x[kRows][kParts];
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        const float* part = from + min(first + p, parts - 1) * params.plan.part_floats;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          x[r][p] = LoadShared(
              reinterpret_cast<const float4*>(part + own_rows[r] * params.value_columns));
        }
      }
      if (!found) find_factors();
      found = true;
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (first + p >= parts) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float factor = scratch.factors[first + p][own_rows[r]];
          sums[r][0] += x[r][p].x * factor;
          sums[r][1] += x[r][p].y * factor;
          sums[r][2] += x[r][p].z * factor;
          sums[r][3] += x[r][p].w * factor;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!exists || begin + static_cast<int>(threadIdx.x) / 32 + r * kWarps >= rows) continue;
      StoreAttention<T>(params, item, kind, own_rows[r], column, sums[r]);
    }
  }
}

// Merges the parts of attention `kind`.
template <typename T>
__device__ inline void MergeParts(const Params& params, const Item& item, int kind,
                                  PartFactors& scratch) {
  const auto find_factors = [&] {
    FindFactors(params, item, kind, FirstPart(params, item, kind), scratch.factors);
    __syncthreads();
  };
  if (params.plan.rows <= kWarps) {
    AddParts<T, 1, 8>(params, item, kind, scratch, find_factors);
  } else {
    AddParts<T, 4, 4>(params, item, kind, scratch, find_factors);
  }
}

// Merges what the warps of the thread block found, and does with it what has to be done. By all
// threads; `memory` is the rings'.
template <typename T, int kHeadSize, int kValueSize>
__device__ inline void Finish(const Params& params, const Item& item, const Team& team,
                              WarpRows<T, kHeadSize, kValueSize>& rows, bool faulty, Shared& shared,
                              char* memory) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 1);
    rows.totals[r] += __shfl_xor_sync(~0u, rows.totals[r], 2);
    if (t == 0) shared.maxima[warp][lane / 4 + 8 * r] = rows.maxima[r];
  }
  faulty = __any_sync(~0u, faulty);
  if (lane == 0) shared.faulty[warp] = faulty;
  __syncthreads();
  faulty = false;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) faulty |= shared.faulty[w] != 0;
  if (faulty) {
    FillResults<T>(params, item, true);
    return;
  }

  // Of row `row` of the item, the warps that have it are one of each team. (Loops over warps are
  // unrolled: a step of this is waited for by all.)
  const int team_mask = (1 << team.warps_log2) - 1;
  const auto greatest = [&](int member, int row) {
    float maximum = -INFINITY;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float x = shared.maxima[w][row];
      if ((w & team_mask) == member) maximum = fmaxf(maximum, x);
    }
    return maximum;
  };
  const auto total_of = [&](int row) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float x = shared.totals[w][row % kRowTile];
      if ((w & team_mask) == row / kRowTile) total += x;
    }
    return total;
  };
  auto& scratch = *reinterpret_cast<WarpSums<kValueSize>*>(memory);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    if (8 * r >= params.plan.rows) break;
    const float shrink = Shrink(rows.maxima[r], greatest(team.member, row));
    if (t == 0) shared.totals[warp][row] = rows.totals[r] * shrink;
    float* to = &scratch.sums[warp][row][2 * t];
#pragma unroll
    for (int n = 0; n < kValueSize / 8; ++n) {
      *reinterpret_cast<float2*>(to + 8 * n) = {rows.sums[n][2 * r] * shrink,
                                                rows.sums[n][2 * r + 1] * shrink};
    }
  }
  __syncthreads();

  const int parts = params.plan.parts[item.kind];
  const bool direct = parts == 1;
  const int64_t first = FirstPart(params, item, item.kind), own = first + item.part;
  const int column = 4 * lane;
#pragma unroll 2
  for (int row = warp; row < params.plan.rows; row += kWarps) {
    if (column >= params.value_columns) break;
    float4 x[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      x[w] = *reinterpret_cast<const float4*>(&scratch.sums[w][row % kRowTile][column]);
    }
    float sum[4] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if ((w & team_mask) != row / kRowTile) continue;
      sum[0] += x[w].x;
      sum[1] += x[w].y;
      sum[2] += x[w].z;
      sum[3] += x[w].w;
    }
    if (direct) {
      const float inverse = InverseOf(total_of(row));
#pragma unroll
      for (float& x : sum) x *= inverse;
      StoreAttention<T>(params, item, item.kind, row, column, sum);
    } else {
      *reinterpret_cast<float4*>(params.part_sums(own) + row * params.value_columns + column) = {
          sum[0], sum[1], sum[2], sum[3]};
    }
  }
  if (const int row = thread; row < params.plan.rows) {
    const float maximum = greatest(row / kRowTile, row % kRowTile), total = total_of(row);
    if (!direct) {
      params.part_maxima(own)[row] = maximum;
      params.part_totals(own)[row] = total;
    } else if (float* lse = Lse(params, item.kind); lse != nullptr) {
      lse[ResultRow(params, item, row)] = LogSumExp(maximum, total, Headroom(params.problem.dtype));
    }
  }
  if (direct) return;
  if (Arrive(params, own, first, parts, shared)) {
    MergeParts<T>(params, item, item.kind, *reinterpret_cast<PartFactors*>(memory));
  }
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_MERGE_CUH_
