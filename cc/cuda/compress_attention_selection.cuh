// Which blocks are chosen: importances from an item's block sums, for compress_attention_topk.cuh
// to compare.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_SELECTION_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_SELECTION_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_records.cuh"
#include "cuda/compress_attention_topk.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/flags.cuh"
#include "cuda/ptx.cuh"
#include "selection.h"

namespace jax_nsa::cuda::compressed {

struct SelectionScratch {
  alignas(16) float importances[kSharedBlocks];
  TopkScratch topk;
};

// What makes an item's exponentials probabilities: each row's greatest score, in powers of two, and
// the inverse of its sum; both 0 where the row sees no position.
struct alignas(16) RowNorms {
  float maxima[kMaxRows];
  float inverses[kMaxRows];
};

// Four heads' numbers.
__device__ inline float4 operator*(float4 a, float4 b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}
// a * b + c, rounded once.
__device__ inline float4 Fused(float4 a, float4 b, float4 c) {
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y), fmaf(a.z, b.z, c.z), fmaf(a.w, b.w, c.w)};
}
__device__ inline float Sum(float4 x) { return (x.x + x.y) + (x.z + x.w); }

// Makes importances[j] the scores of block j, summed over the heads of the batch's token, for the
// blocks whose last position is in tiles [first, end) of the batch or past the sequence. Takes
// 4 * kSteps heads at a time; where the group is smaller than 4, the other rows beside it count
// nothing.
template <int kSteps>
__device__ inline void SumImportances(const Params& params, const Part& part,
                                      const Records& records, const Batch& batch, int num_blocks,
                                      const RowNorms& norms, float* importances) {
  const int thread = ThreadIndex(), tiles = batch.end - batch.first;
  const int group = params.group(), row = batch.token * group;
  // Half of the threads have the blocks all of whose positions are in one tile, so many of them
  // sharing a tile; the other half, at the same time, those that have positions in two.
  constexpr int kHalf = kComputeThreads / 2;
  const int own = thread % kHalf, ones = thread < kHalf ? tiles : 0, twos = tiles - ones;
  const int sharers_log2 = tiles <= 16 ? 3 : tiles <= 32 ? 2 : tiles <= 64 ? 1 : 0;
  const int sharers = 1 << sharers_log2;
  const int block_floats = records.block_floats();
  const auto load = [](const float* from, int step) {
    return *reinterpret_cast<const float4*>(from + 4 * step);
  };
  const auto masked = [&](float4 x) {
    if constexpr (kSteps > 1) return x;
    const auto counts = [&](int r) {
      return static_cast<unsigned>(r - (row & 3)) < static_cast<unsigned>(group);
    };
    return float4{counts(0) ? x.x : 0.0f, counts(1) ? x.y : 0.0f, counts(2) ? x.z : 0.0f,
                  counts(3) ? x.w : 0.0f};
  };
  // Each is written by one thread alone, for one turn of heads after the other.
  const auto add = [&](int block, int head, float4 terms) {
    importances[block] = (head > 0 ? importances[block] : 0.0f) + Sum(terms);
  };
#pragma unroll 1
  for (int head = 0; head < group; head += 4 * kSteps) {
    const float* maxima = norms.maxima + (row & ~3) + head;
    const float* inverses = norms.inverses + (row & ~3) + head;
    // What makes a tile's sums relative to the greatest scores of all tiles.
    const auto shrink = [&](const float* record, int step) {
      const float4 own = load(record, step), maximum = load(maxima, step);
      return float4{Exp2(own.x - maximum.x), Exp2(own.y - maximum.y), Exp2(own.z - maximum.z),
                    Exp2(own.w - maximum.w)};
    };
#pragma unroll 1
    for (int i = own >> sharers_log2; i < ones; i += kHalf >> sharers_log2) {
      const int tile = batch.first + i, position = tile * kTile;
      const float* record = records.Read(batch, tile) + head;
      float4 factors[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        factors[step] = masked(shrink(record, step) * load(inverses, step));
      }
      const bool is_last = tile + 1 == part.sequence.tiles;
      const int first_block = params.FirstBlock(position);
      const int begin = tile > 0 ? params.FirstBlock(position + params.taps - 1) : 0;
      const int end = min(num_blocks, is_last ? first_block + params.plan.block_sums
                                              : params.FirstBlock(position + kTile));
#pragma unroll 2
      for (int block = begin + (own & (sharers - 1)); block < end; block += sharers) {
        const float* sums = record + (1 + block - first_block) * block_floats;
        float4 terms = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          terms = Fused(masked(load(sums, step)), factors[step], terms);
        }
        add(block, head, terms);
      }
      // By the aligned rule a sequence may have a block more, to which no position adds.
      if (is_last && (own & (sharers - 1)) == 0) {
        for (int block = max(begin, end); block < num_blocks; ++block) importances[block] = 0.0f;
      }
    }
    // Blocks that have positions in the tile before, too: two of each tile at most. Both tiles'
    // sums are added before they are divided by the row's total, as sums over one tile are, so that
    // blocks whose sums are equal stay equal.
#pragma unroll 1
    for (int i = own / 2; i < twos; i += kHalf / 2) {
      const int tile = batch.first + i, position = tile * kTile;
      const int first_block = params.FirstBlock(position), block = first_block + own % 2;
      if (tile == 0 || params.FirstPosition(block) >= position) continue;
      const float* here = records.Read(batch, tile) + head;
      const float* before = records.Read(batch, tile - 1) + head;
      const float* sums_here = here + (1 + own % 2) * block_floats;
      const float* sums_before =
          before + (1 + block - params.FirstBlock(position - kTile)) * block_floats;
      float4 terms = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float4 sums = Fused(load(sums_here, step), shrink(here, step),
                                  load(sums_before, step) * shrink(before, step));
        terms = Fused(masked(sums), masked(load(inverses, step)), terms);
      }
      add(block, head, terms);
    }
  }
}

// Writes each head's own scores of the batch's token, of the blocks whose last position is in tiles
// [first, end) of the batch; where these are the item's last, of all blocks that follow, too.
__device__ inline void StoreBlockScores(const Params& params, const Part& part,
                                        const Records& records, const Batch& batch,
                                        const RowNorms& norms) {
  const int group = params.group(), first_row = batch.token * group;
  const int block_floats = records.block_floats();
  const int64_t row = part.sequence.first_row + part.first_token + batch.token;
  float* scores =
      params.arrays.block_scores + (row * params.heads + part.head * group) * params.max_blocks;
  const int begin = batch.first > 0 ? params.FirstBlock(batch.first * kTile) : 0;
  const int end =
      batch.end < part.sequence.tiles ? params.FirstBlock(batch.end * kTile) : params.max_blocks;
#pragma unroll 1
  for (int j = begin + ThreadIndex(); j < end; j += kComputeThreads) {
    // The positions are those of one tile, or of two, or of none.
    const int first = max(0, params.FirstPosition(j));
    const int last = min(part.sequence.length - 1, params.LastPosition(j));
    const int tiles = first > last ? 0 : last / kTile - first / kTile + 1;
    const float* records_of[2];
    int sums_at[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile = i < tiles ? first / kTile + i : batch.first;
      records_of[i] = records.Read(batch, tile) + (first_row & 3);
      sums_at[i] = i < tiles ? (1 + j - params.FirstBlock(tile * kTile)) * block_floats : 0;
    }
#pragma unroll 4
    for (int g = 0; g < group; ++g) {
      const float maximum = norms.maxima[first_row + g];
      float score = 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* record = records_of[i] + g;
        if (i < tiles) score += record[sums_at[i]] * Exp2(record[0] - maximum);
      }
      scores[int64_t{g} * params.max_blocks + j] = score * norms.inverses[first_row + g];
    }
  }
}

// Turns the records of one token into importances, if any block has to be ranked, and block scores,
// if they are wanted. Returns the next token's first batch. If the item is cut, `batch` is on its
// way, and so is what is returned.
__device__ inline Batch AddUp(const Params& params, const Part& part, const Records& records,
                              Batch batch, int num_blocks, bool ranks, const RowNorms& norms,
                              float* importances) {
  const int token = batch.token;
#pragma unroll 1
  for (; batch.token == token; batch = records.After(batch)) {
    if (part.is_cut()) {
      // The next batch comes while this one is added up.
      if (const Batch next = records.After(batch); next.token < part.tokens) {
        records.Fetch(next);
        WaitForCopies<1>();
      } else {
        WaitForCopies<0>();
      }
    }
    SyncConsumers();
    const auto sum = [&](auto steps) {
      SumImportances<steps()>(params, part, records, batch, num_blocks, norms, importances);
    };
    if (ranks) {
      switch (params.group_log2) {
        case 0:
        case 1:
        case 2:
          sum(std::integral_constant<int, 1>());
          break;
        case 3:
          sum(std::integral_constant<int, 2>());
          break;
        default:
          sum(std::integral_constant<int, 4>());
          break;
      }
    }
    if (params.arrays.block_scores) StoreBlockScores(params, part, records, batch, norms);
    SyncConsumers();
  }
  return batch;
}

// Selects the blocks of each token of an item that is through. If it is cut, its first batch of
// records is on its way; all arrive at `records_read` once the last one is read. Of a joint item,
// each thread block has its own part's importances to add up, and who finishes it selects.
template <bool kJoint>
__device__ inline void Select(const Params& params, const Part& part, const Records& records,
                              const RowNorms& norms, SelectionScratch& scratch,
                              uint64_t* records_read) {
  const int count = static_cast<int>(params.problem.select_count);
  const bool is_joint = kJoint && part.IsJoint();
  Batch batch = records.FirstBatch();
#pragma unroll 1
  for (int token = 0; token < part.tokens; ++token) {
    const int num_blocks = part.sequence.NumBlocks(params, part.first_token + token);
    float* importances = is_joint                      ? params.importances(part.last_cta())
                         : num_blocks <= kSharedBlocks ? scratch.importances
                                                       : params.importances(blockIdx.x);
    const int begin = params.init_blocks, end = max(begin, num_blocks - params.local_blocks);
    const Candidates candidates = {importances, begin, end};
    const bool ranks = candidates.NeededOf(num_blocks, count) > 0;
    batch = AddUp(params, part, records, batch, num_blocks, ranks, norms, importances);
    if (is_joint) {
      ShareImportances(params, part);
      if (!part.finishes()) return;
    }
    if (part.is_cut() && token + 1 == part.tokens) BarrierArrive(records_read);
    const int64_t row = part.sequence.first_row + part.first_token + token;
    SelectBlocks(candidates, num_blocks, count, params.orders(blockIdx.x), scratch.topk,
                 params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count);
    SyncConsumers();
  }
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_SELECTION_CUH_
