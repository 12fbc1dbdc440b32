// Which blocks are chosen: importances from a merged item's window sums, and the top k of them.

#ifndef JAX_NSA_CUDA_SELECTION_CUH_
#define JAX_NSA_CUDA_SELECTION_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/records.cuh"
#include "cuda/work.cuh"
#include "selection.h"

namespace jax_nsa::cuda {

constexpr int kHistogramBits = 10;
constexpr int kHistogramBins = 1 << kHistogramBits;
// So few candidates are ranked by comparing each with every other.
constexpr int kFewCandidates = 128;

// Where a tile's record lies, and the block of its slot 0.
struct TilePlace {
  const float* record;
  int first_block;
};
// For so many tiles at a time, and for so many rows of them, what makes window sums probabilities.
constexpr int kPlaces = 128, kFactors = 2048;
static_assert(kFactors >= kMaxRows && kPlaces <= kComputeThreads);

struct SelectionScratch {
  float importances[2 * kSharedBlocks];  // then keys
  TilePlace places[kPlaces];
  alignas(16) float factors[kFactors];
  uint32_t histogram[kHistogramBins];
  uint64_t chosen[kSharedChosen];
  uint32_t warp_least[kConsumers], warp_most[kConsumers];
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

  uint32_t least_key = ~0u, most_key = 0;
#pragma unroll
  for (int w = 0; w < kConsumers; ++w) {
    least_key = min(least_key, scratch.warp_least[w]);
    most_key = max(most_key, scratch.warp_most[w]);
  }
  uint64_t least = uint64_t{least_key} << 32, most = uint64_t{most_key} << 32 | 0xffffffffu;

  int above = 0;
#pragma unroll 1
  while (true) {
    // A histogram of the bracket, its highest orders in bin 0.
    const int bits = 64 - __clzll(static_cast<long long>(most - least));
    const int shift = max(0, bits - kHistogramBits);
#pragma unroll
    for (int bin = thread; bin < kHistogramBins; bin += kComputeThreads) {
      scratch.histogram[bin] = 0;
    }
    SyncConsumers();
#pragma unroll 4
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
#pragma unroll
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

// Adds the importances' two terms to keys, in place, and finds the least and the most of those that
// are not chosen anyhow.
__device__ inline void MakeKeys(float* importances, int num_blocks, SelectionScratch& scratch) {
  uint32_t* keys = reinterpret_cast<uint32_t*>(importances);
  uint32_t least = ~0u, most = 0;
#pragma unroll 4
  for (int j = threadIdx.x; j < num_blocks; j += kComputeThreads) {
    const uint32_t key = ImportanceKey(importances[j] + importances[num_blocks + j]);
    keys[j] = key;
    if (!AlwaysChosen(j, num_blocks)) {
      least = min(least, key);
      most = max(most, key);
    }
  }
  least = __reduce_min_sync(~0u, least);
  most = __reduce_max_sync(~0u, most);
  if (threadIdx.x % 32 == 0) {
    scratch.warp_least[threadIdx.x / 32] = least;
    scratch.warp_most[threadIdx.x / 32] = most;
  }
  if (threadIdx.x == 0) scratch.listed = 0;
  SyncConsumers();
}

// Writes the `count` most important of num_blocks blocks, by all consumer warps. `spill` has room
// for the candidates that shared memory has none for.
__device__ inline void SelectBlocks(float* importances, int num_blocks, int count, uint64_t* spill,
                                    SelectionScratch& scratch, int32_t* indices) {
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

  MakeKeys(importances, num_blocks, scratch);
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(importances);
  const int candidates = num_blocks - 3;
  const uint64_t least = FindThreshold(keys, candidates, needed, scratch);
  SyncConsumers();
  const int room = max(kFewCandidates, needed + needed / 8);
  uint64_t* chosen = room <= kSharedChosen ? scratch.chosen : spill;
#pragma unroll 4
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
// neighbouring tiles at most.) Takes kRows heads at a time.
template <int kRows>
__device__ inline void SumImportances(const Params& params, const Part& part,
                                      const Records& records, int token, int num_blocks,
                                      const RowNorms& norms, SelectionScratch& scratch,
                                      float* importances) {
  constexpr int kRowsLog2 = kRows == 4 ? 2 : kRows == 2 ? 1 : 0;
  const int thread = threadIdx.x, slots = params.plan.slots, m = params.block_positions;
  const int group_log2 = params.group_log2, first_row = token << group_log2;
  const int steps_log2 = group_log2 - kRowsLog2, steps = 1 << steps_log2;  // of a token's heads
  const int record_rows = RecordRows(part.rows(params)), length = part.sequence.length;
  TilePlace(&places)[kPlaces] = scratch.places;
  const int most = min(kPlaces, kFactors >> group_log2);

#pragma unroll 1
  for (int batch = 0; batch < part.sequence.tiles; batch += most) {
    const int tiles = min(part.sequence.tiles - batch, most);
    SyncConsumers();
    if (thread < tiles) {
      const int tile = batch + thread;
      places[thread] = {records.Of(tile), params.by_block_positions(tile * kTile + m - 1) - 1};
    }
    SyncConsumers();
#pragma unroll 2
    for (int i = thread; i < tiles << steps_log2; i += kComputeThreads) {
      const int tile = i >> steps_log2, row = (i & (steps - 1)) * kRows;
      const auto maxima = LoadRows<kRows>(places[tile].record + first_row + row);
      const auto log2_sums = LoadRows<kRows>(norms.log2_sum + first_row + row);
      Rows<kRows> factors;
#pragma unroll
      for (int r = 0; r < kRows; ++r) factors.x[r] = Exp2(maxima.x[r] - log2_sums.x[r]);
      *reinterpret_cast<Rows<kRows>*>(&scratch.factors[(tile << group_log2) + row]) = factors;
    }
    SyncConsumers();
#pragma unroll 2
    for (int i = thread; i < tiles * slots; i += kComputeThreads) {
      const int in_batch = params.by_slots(i), slot = i - in_batch * slots;
      const float* sums = places[in_batch].record + first_row + (1 + slot) * record_rows;
      const float* factors = &scratch.factors[in_batch << group_log2];
      float importance = 0.0f;
#pragma unroll 4
      for (int step = 0; step < steps; ++step) {
        // Neighbouring threads begin with different heads, whose sums lie in different banks.
        const int row = ((step + i / 2) & (steps - 1)) * kRows;
        const auto own = LoadRows<kRows>(sums + row), factor = LoadRows<kRows>(factors + row);
#pragma unroll
        for (int r = 0; r < kRows; ++r) importance += own.x[r] * factor.x[r];
      }
      const int block = places[in_batch].first_block + slot, tile = batch + in_batch;
      if (static_cast<unsigned>(block) < static_cast<unsigned>(num_blocks)) {
        const int odd = tile & 1;
        importances[odd * num_blocks + block] = importance;
        // Where no other tile adds to the block, the other term is 0.
        const int first = max(m * (block + 1) - (params.taps - 1), 0);
        const int last = min(m * (block + 1), length - 1);
        if (first >= tile * kTile && last < (tile + 1) * kTile) {
          importances[(odd ^ 1) * num_blocks + block] = 0.0f;
        }
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
  for (int j = threadIdx.x; j < params.max_blocks; j += kComputeThreads) {
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
    SelectBlocks(importances, num_blocks, count, spill, scratch,
                 params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count);
    SyncConsumers();
  }
  records.Discard();
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECTION_CUH_
