// Which blocks are chosen: importances from an item's window sums, for topk.cuh to compare.

#ifndef JAX_NSA_CUDA_SELECTION_CUH_
#define JAX_NSA_CUDA_SELECTION_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/records.cuh"
#include "cuda/topk.cuh"
#include "cuda/work.cuh"
#include "selection.h"

namespace jax_nsa::cuda {

// Where a tile's record lies, and the block of its slot 0.
struct TilePlace {
  const float* record;
  int first_block;
};
// Tiles and heads whose window sums are added up at a time, and how many of them, each of one slot,
// by one thread.
constexpr int kPlaces = 128, kHeads = 16, kSumsEach = 3;
static_assert(kPlaces <= kComputeThreads);

struct SelectionScratch {
  float importances[2 * kSharedBlocks];
  TilePlace places[kPlaces];
  alignas(16) float factors[kPlaces * kHeads];
  TopkScratch topk;
};

// What makes an item's exponentials probabilities, in shared memory: the logarithm of each row's
// sum; 0 where a row sees no position.
struct alignas(16) RowNorms {
  float log2_sum[kMaxRows];
};

// Consecutive rows of one token.
template <int kRows>
struct alignas(4 * kRows) Rows {
  float x[kRows];
};
template <int kRows>
__device__ inline Rows<kRows> LoadRows(const float* from) {
  return *reinterpret_cast<const Rows<kRows>*>(from);
}

// The sums over the heads of a token's scores of every block, in two terms: those of even tiles at
// importances[j], those of odd ones at importances[num_blocks + j]. (A block has positions in two
// neighbouring tiles at most.) Takes kRows heads at a time, the most that divide the group up to 4.
//
// Every thread first fetches all that it will add up, so that it waits for memory once.
template <int kRows>
__device__ inline void SumImportances(const Params& params, const Part& part,
                                      const Records& records, int token, int num_blocks,
                                      const RowNorms& norms, SelectionScratch& scratch,
                                      float* importances) {
  constexpr int kRowsLog2 = kRows == 4 ? 2 : kRows == 2 ? 1 : 0;
  constexpr int kSteps = kRows == 4 ? kHeads / kRows : 1;
  const int thread = ThreadIndex(), slots = params.plan.slots, m = params.block_positions;
  const int group = params.group(), first_row = token * group, length = part.sequence.length;
  const int heads = min(group, kHeads), steps_log2 = min(params.group_log2, 4) - kRowsLog2;
  const int steps = 1 << steps_log2, record_rows = RecordRows(part.rows(params));
  const int most = min(kPlaces, Quotient(kSumsEach * kComputeThreads, slots));
  TilePlace(&places)[kPlaces] = scratch.places;

#pragma unroll 1
  for (int batch = 0; batch < part.sequence.tiles; batch += most) {
    const int tiles = min(part.sequence.tiles - batch, most), count = tiles * slots;
    SyncConsumers();
    if (thread < tiles) {
      const int tile = batch + thread;
      places[thread] = {records.Of(tile) + first_row,
                        params.by_block_positions(tile * kTile + m - 1) - 1};
    }
    SyncConsumers();
    float importance[kSumsEach] = {};
#pragma unroll 1
    for (int head = 0; head < group; head += kHeads) {
      Rows<kRows> sums[kSumsEach][kSteps];
      // Neighbouring threads begin with different heads, whose sums lie in different banks.
      const auto row = [&](int i, int step) { return ((step + i / 2) & (steps - 1)) * kRows; };
#pragma unroll
      for (int u = 0; u < kSumsEach; ++u) {
        if (u * kComputeThreads >= count) break;
        const int i = min(thread + u * kComputeThreads, count - 1);
        const int tile = params.by_slots(i), slot = i - tile * slots;
        const float* record = places[tile].record + (1 + slot) * record_rows + head;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (step < steps) sums[u][step] = LoadRows<kRows>(record + row(i, step));
        }
      }
      if (head > 0) SyncConsumers();
#pragma unroll 1
      for (int i = thread; i < tiles << steps_log2; i += kComputeThreads) {
        const int tile = i >> steps_log2, at = (i & (steps - 1)) * kRows;
        const auto maxima = LoadRows<kRows>(places[tile].record + head + at);
        const auto log2_sums = LoadRows<kRows>(norms.log2_sum + first_row + head + at);
        Rows<kRows> factors;
#pragma unroll
        for (int r = 0; r < kRows; ++r) factors.x[r] = Exp2(maxima.x[r] - log2_sums.x[r]);
        *reinterpret_cast<Rows<kRows>*>(&scratch.factors[tile * heads + at]) = factors;
      }
      SyncConsumers();
#pragma unroll
      for (int u = 0; u < kSumsEach; ++u) {
        if (u * kComputeThreads >= count) break;
        const int i = min(thread + u * kComputeThreads, count - 1);
        const float* factors = &scratch.factors[params.by_slots(i) * heads];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (step >= steps) break;
          const auto factor = LoadRows<kRows>(factors + row(i, step));
#pragma unroll
          for (int r = 0; r < kRows; ++r) importance[u] += sums[u][step].x[r] * factor.x[r];
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kSumsEach; ++u) {
      const int i = thread + u * kComputeThreads;
      if (i >= count) break;
      const int in_batch = params.by_slots(i), tile = batch + in_batch;
      const int block = places[in_batch].first_block + i - in_batch * slots;
      if (block < 0 || block >= num_blocks) continue;
      const int odd = tile & 1;
      importances[odd * num_blocks + block] = importance[u];
      // Where no other tile adds to the block, the other term is 0.
      const int first = max(m * (block + 1) - (params.taps - 1), 0);
      const int last = min(m * (block + 1), length - 1);
      if (first >= tile * kTile && last < (tile + 1) * kTile) {
        importances[(odd ^ 1) * num_blocks + block] = 0.0f;
      }
    }
  }
  SyncConsumers();
}

// Writes each head's own scores of every block. Slow, and not often wanted.
__device__ inline void StoreBlockScores(const Params& params, const Part& part,
                                        const Records& records, int token, int num_blocks,
                                        const RowNorms& norms) {
  const int m = params.block_positions, group = params.group();
  const int record_rows = RecordRows(part.rows(params));
  const int64_t row = part.sequence.first_row + part.first_token + token;
  float* scores =
      params.arrays.block_scores + (row * params.heads + part.head * group) * params.max_blocks;
#pragma unroll 1
  for (int j = ThreadIndex(); j < params.max_blocks; j += kComputeThreads) {
    const int first = max(0, m * (j + 1) - (params.taps - 1));
    const int last = min(part.sequence.length - 1, m * (j + 1));
#pragma unroll 1
    for (int g = 0; g < group; ++g) {
      float score = 0.0f;
      if (j < num_blocks) {
#pragma unroll 1
        for (int tile = first / kTile; first <= last && tile <= last / kTile; ++tile) {
          const float* record = records.Of(tile) + token * group + g;
          const int slot = j + 1 - params.by_block_positions(tile * kTile + m - 1);
          score += record[(1 + slot) * record_rows] *
                   Exp2(record[0] - norms.log2_sum[token * group + g]);
        }
      }
      scores[int64_t{g} * params.max_blocks + j] = score;
    }
  }
}

// Selects the blocks of each token of an item that is through.
__device__ inline void Select(const Params& params, const Part& part, const Records& records,
                              const RowNorms& norms, SelectionScratch& scratch) {
  const int num_blocks = static_cast<int>(params.problem.window.NumBlocks(part.sequence.length));
  const int count = static_cast<int>(params.problem.select_count);
  uint64_t* spill = reinterpret_cast<uint64_t*>(params.selection());
  float* importances = params.plan.importances > 0
                           ? reinterpret_cast<float*>(spill + params.plan.sorted)
                           : scratch.importances;
#pragma unroll 1
  for (int token = 0; token < part.tokens; ++token) {
    const int64_t row = part.sequence.first_row + part.first_token + token;
    const auto sum = [&](auto rows) {
      SumImportances<rows()>(params, part, records, token, num_blocks, norms, scratch, importances);
    };
    switch (min(params.group_log2, 2)) {
      case 0:
        sum(std::integral_constant<int, 1>());
        break;
      case 1:
        sum(std::integral_constant<int, 2>());
        break;
      default:
        sum(std::integral_constant<int, 4>());
        break;
    }
    if (params.arrays.block_scores) {
      StoreBlockScores(params, part, records, token, num_blocks, norms);
    }
    SelectBlocks(importances, num_blocks, count, spill, scratch.topk,
                 params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count);
    SyncConsumers();
  }
  records.Discard();
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECTION_CUH_
