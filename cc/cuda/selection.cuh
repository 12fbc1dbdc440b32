// Which blocks are chosen: importances from a merged item's window sums, and the top k of them.

#ifndef JAX_NSA_CUDA_SELECTION_CUH_
#define JAX_NSA_CUDA_SELECTION_CUH_

#include <cmath>

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/work.cuh"
#include "selection.h"

namespace jax_nsa::cuda {

constexpr int kComputeThreads = 32 * kConsumers;
constexpr int kHistogramBits = 11;
constexpr int kHistogramBins = 1 << kHistogramBits;
// So few candidates are ranked by comparing each with every other.
constexpr int kFewCandidates = 128;

struct SelectionScratch {
  uint32_t keys[kSharedBlocks];
  uint32_t histogram[kHistogramBins];
  uint64_t chosen[kSharedChosen];
  uint64_t warp_least[kConsumers], warp_most[kConsumers];
  int warp_counts[kConsumers];
  uint64_t least, most;  // orders that bracket the last candidate to be chosen
  int above;             // candidates above the bracket
  int within;            // and in it
  int listed;
};

// An integer that sorts like the importance, NaN lowest. Importances are sums of probabilities.
__device__ inline uint32_t ImportanceKey(float importance) {
  return isnan(importance) ? 0 : __float_as_uint(importance) + 1;
}

// GoesBefore of selection.h as a number, larger for what goes before and different for each block.
__device__ inline uint64_t Order(uint32_t key, int block) {
  return uint64_t{key} << 32 | (0xffffffffu - block);
}
__device__ inline int BlockOf(uint64_t order) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(order));
}

// Narrows [least, most] until the candidates in and above it are few, or just `needed`. Candidates
// are the blocks [1, 1 + candidates). Returns the lowest order to keep; scratch says how many.
__device__ inline uint64_t FindThreshold(const uint32_t* keys, int candidates, int needed,
                                         SelectionScratch& scratch) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int enough = max(kFewCandidates, needed + needed / 8);
  if (candidates <= enough) return 0;

  uint64_t least = ~uint64_t{0}, most = 0;
#pragma unroll 1
  for (int i = thread; i < candidates; i += kComputeThreads) {
    const uint64_t order = Order(keys[1 + i], 1 + i);
    least = min(least, order);
    most = max(most, order);
  }
  for (int step = 16; step > 0; step /= 2) {
    least = min(least, __shfl_xor_sync(~0u, least, step));
    most = max(most, __shfl_xor_sync(~0u, most, step));
  }
  if (lane == 0) {
    scratch.warp_least[warp] = least;
    scratch.warp_most[warp] = most;
  }
  SyncConsumers();
  for (int w = 0; w < kConsumers; ++w) {
    least = min(least, scratch.warp_least[w]);
    most = max(most, scratch.warp_most[w]);
  }

  int above = 0;
#pragma unroll 1
  while (true) {
    // A histogram of the bracket, its highest orders in bin 0.
    const int bits = 64 - __clzll(static_cast<long long>(most - least));
    const int shift = max(0, bits - kHistogramBits);
#pragma unroll 1
    for (int bin = thread; bin < kHistogramBins; bin += kComputeThreads) {
      scratch.histogram[bin] = 0;
    }
    SyncConsumers();
#pragma unroll 1
    for (int i = thread; i < candidates; i += kComputeThreads) {
      const uint64_t order = Order(keys[1 + i], 1 + i);
      if (least <= order && order <= most) {
        atomicAdd(&scratch.histogram[(most - order) >> shift], 1);
      }
    }
    SyncConsumers();
    // The bin of the last one needed.
    constexpr int kEach = kHistogramBins / kComputeThreads;
    int own = 0;
#pragma unroll 1
    for (int i = 0; i < kEach; ++i) own += scratch.histogram[thread * kEach + i];
    int up_to = own;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, up_to, step);
      if (lane >= step) up_to += before;
    }
    if (lane == 31) scratch.warp_counts[warp] = up_to;
    SyncConsumers();
    up_to += above;
#pragma unroll 1
    for (int w = 0; w < warp; ++w) up_to += scratch.warp_counts[w];
    int before = up_to - own;
    if (before < needed && needed <= up_to) {
#pragma unroll 1
      for (int i = 0; i < kEach; ++i) {
        const int bin = thread * kEach + i;
        const int count = scratch.histogram[bin];
        if (needed <= before + count) {
          const uint64_t first = most - (static_cast<uint64_t>(bin) << shift);
          const uint64_t width = (uint64_t{1} << shift) - 1;
          scratch.most = first;
          scratch.least = first - least > width ? first - width : least;
          scratch.above = before;
          scratch.within = count;
          break;
        }
        before += count;
      }
    }
    SyncConsumers();
    least = scratch.least;
    most = scratch.most;
    above = scratch.above;
    // With a shift of 0 a bin is one block.
    if (above + scratch.within <= enough || shift == 0) return least;
  }
}

// Sorts `size` orders, a power of two, descending.
__device__ inline void SortDescending(uint64_t* orders, int size) {
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int step = run / 2; step > 0; step /= 2) {
#pragma unroll 1
      for (int i = threadIdx.x; i < size / 2; i += kComputeThreads) {
        const int low = 2 * step * (i / step) + i % step, high = low + step;
        const bool descending = (low & run) == 0;
        const uint64_t a = orders[low], b = orders[high];
        if (descending ? a < b : a > b) {
          orders[low] = b;
          orders[high] = a;
        }
      }
      SyncConsumers();
    }
  }
}

// Writes the `count` most important of num_blocks blocks, by all consumer warps. `spill` has room
// for the candidates that shared memory has none for.
__device__ inline void SelectBlocks(const uint32_t* keys, int num_blocks, int count,
                                    uint64_t* spill, SelectionScratch& scratch, int32_t* indices) {
  const int thread = threadIdx.x;
  // The blocks always chosen come first: their importance is infinite, that of no other is.
  const int always = min(num_blocks, 3);
  if (thread < min(always, count)) {
    indices[thread] = thread == 0 ? 0 : num_blocks - always + thread;
  }
#pragma unroll 1
  for (int i = min(num_blocks, count) + thread; i < count; i += kComputeThreads) indices[i] = -1;
  const int needed = min(num_blocks, count) - always;
  if (needed <= 0) return;

  const int candidates = num_blocks - 3;
  if (thread == 0) scratch.listed = 0;
  const uint64_t least = FindThreshold(keys, candidates, needed, scratch);
  SyncConsumers();
  const int room = max(kFewCandidates, needed + needed / 8);
  uint64_t* chosen = room <= kSharedChosen ? scratch.chosen : spill;
#pragma unroll 1
  for (int i = thread; i < candidates; i += kComputeThreads) {
    const uint64_t order = Order(keys[1 + i], 1 + i);
    if (order >= least) chosen[atomicAdd(&scratch.listed, 1)] = order;
  }
  SyncConsumers();
  const int listed = scratch.listed;

  if (chosen == scratch.chosen) {
    // A candidate's place is the number of those that go before it; four lanes count for each.
    const int quarter = thread % 4;
#pragma unroll 1
    for (int i = thread / 4; i < (listed + 63) / 64 * 64; i += kComputeThreads / 4) {
      const uint64_t own = i < listed ? chosen[i] : 0;
      int place = 0;
#pragma unroll 1
      for (int other = quarter; other < listed; other += 4) place += chosen[other] > own;
      place += __shfl_xor_sync(~0u, place, 1);
      place += __shfl_xor_sync(~0u, place, 2);
      if (quarter == 0 && i < listed && place < needed) indices[always + place] = BlockOf(own);
    }
  } else {
    int size = kSharedChosen;
    while (size < listed) size *= 2;
#pragma unroll 1
    for (int i = listed + thread; i < size; i += kComputeThreads) chosen[i] = 0;
    SyncConsumers();
    SortDescending(chosen, size);
#pragma unroll 1
    for (int i = thread; i < needed; i += kComputeThreads) {
      indices[always + i] = BlockOf(chosen[i]);
    }
  }
  SyncConsumers();
}

// What normalises an item's rows, in shared memory: exponentials are relative to `maximum`, and
// `inverse` is one over their sum; 0 where a row sees no position.
struct RowNorms {
  float maximum[kMaxRows], inverse[kMaxRows];
};

// Four rows of one token, or as many as it has.
struct Quad {
  float x[4];
};
__device__ inline Quad LoadQuad(const float* rows, int group) {
  if (group >= 4) {
    const float4 all = *reinterpret_cast<const float4*>(rows);
    return {all.x, all.y, all.z, all.w};
  }
  return {rows[0], group > 1 ? rows[1] : 0.0f, 0.0f, 0.0f};
}

// The sum over the heads of a token's scores of every block, as keys; block_scores if wanted.
__device__ inline void SumImportances(const Params& params, const Part& part, int token,
                                      int num_blocks, const RowNorms& norms, uint32_t* keys) {
  const int m = params.block_positions, length = part.sequence.length, group = params.group();
  const int rows = part.padded_rows(params), tile_floats = params.tile_floats(rows);
  const int64_t max_blocks = params.max_blocks;

  // Each lane adds up four heads, so that the lanes of a warp read whole lines.
  const int lanes_log2 = max(0, params.group_log2 - 2), lanes = 1 << lanes_log2;
  const int quad = threadIdx.x & (lanes - 1), first_row = token * group + 4 * quad;
  const Quad maximum = LoadQuad(norms.maximum + first_row, group);
  const Quad inverse = LoadQuad(norms.inverse + first_row, group);
  float* block_scores = nullptr;
  if (params.arrays.block_scores) {
    const int64_t row = part.sequence.first_row + part.first_token + token;
    block_scores = params.arrays.block_scores +
                   (row * params.heads + part.head * group + 4 * quad) * max_blocks;
  }

  // A tile's record. Counts are below 2^24, so the quotient is off by one at most.
  const float inverse_share = 1.0f / static_cast<float>(part.share);
  const float* own_tiles = params.tiles(part.Region(0)) + first_row;
  const auto tile_record = [&](int tile) -> const float* {
    int after = tile - part.first_tiles;
    if (after < 0) return own_tiles + int64_t{tile} * tile_floats;
    int between = static_cast<int>(static_cast<float>(after) * inverse_share);
    after -= between * part.share;
    if (after < 0) --between, after += part.share;
    if (after >= part.share) ++between, after -= part.share;
    return params.tiles(part.Region(1 + between)) + first_row + int64_t{after} * tile_floats;
  };
  constexpr int kUnrolled = 4;  // blocks whose sums are fetched together
  const int stride = kComputeThreads >> lanes_log2;
  const int first_block = threadIdx.x >> lanes_log2;
#pragma unroll 1
  for (int base = 0; base < num_blocks; base += kUnrolled * stride) {
    Quad sums[kUnrolled][2] = {}, references[kUnrolled][2] = {};
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int j = base + u * stride + first_block;
      // Block j's positions lie in one tile or two; or past the sequence, in none.
      const int first = max(0, m * (j + 1) - (params.taps - 1)),
                last = min(length - 1, m * (j + 1));
      if (j >= num_blocks || first > last) continue;
      const int tiles[2] = {first / kTile, last / kTile};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i == 1 && tiles[1] == tiles[0]) continue;
        const float* record = tile_record(tiles[i]);
        const int slot = j + 1 - params.by_block_positions(tiles[i] * kTile + m - 1);
        references[u][i] = LoadQuad(record, group);
        sums[u][i] = LoadQuad(record + (1 + slot) * rows, group);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      const int j = base + u * stride + first_block;
      float importance = 0.0f;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          score += sums[u][i].x[g] * Exp2(references[u][i].x[g] - maximum.x[g]);
        }
        score *= inverse.x[g];
        importance += score;
        if (block_scores && j < num_blocks && g < group) block_scores[g * max_blocks + j] = score;
      }
#pragma unroll 1
      for (int step = 1; step < lanes; step *= 2) {
        importance += __shfl_xor_sync(~0u, importance, step);
      }
      if (quad == 0 && j < num_blocks) keys[j] = ImportanceKey(importance);
    }
  }
#pragma unroll 1
  for (int j = num_blocks + first_block; block_scores && j < max_blocks; j += stride) {
#pragma unroll 1
    for (int g = 0; g < min(group, 4); ++g) block_scores[g * max_blocks + j] = 0.0f;
  }
}

// Selects the blocks of each token of a merged item.
__device__ inline void Select(const Params& params, const Part& part, const RowNorms& norms,
                              SelectionScratch& scratch) {
  const int num_blocks = static_cast<int>(params.problem.window.NumBlocks(part.sequence.length));
  const int count = static_cast<int>(params.problem.select_count);
  uint64_t* spill = reinterpret_cast<uint64_t*>(params.selection());
  uint32_t* keys =
      params.plan.keys > 0 ? reinterpret_cast<uint32_t*>(spill + params.plan.sorted) : scratch.keys;
#pragma unroll 1
  for (int token = 0; token < part.tokens; ++token) {
    const int64_t row = part.sequence.first_row + part.first_token + token;
    SumImportances(params, part, token, num_blocks, norms, keys);
    SyncConsumers();
    SelectBlocks(keys, num_blocks, count, spill, scratch,
                 params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count);
    SyncConsumers();
  }
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECTION_CUH_
