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

struct SelectionScratch {
  alignas(16) float importances[2 * kSharedBlocks];
  TopkScratch topk;
};

// What makes an item's exponentials probabilities: each row's greatest score, in powers of two, and
// the inverse of its sum; both 0 where the row sees no position.
struct alignas(16) RowNorms {
  float maxima[kMaxRows];
  float inverses[kMaxRows];
};

// Adds up tiles [first, end) of the sums over the heads of a token's scores of every block, in two
// terms: those of even tiles at importances[j], those of odd ones at importances[num_blocks + j].
// (A block has positions in two neighbouring tiles at most.) They are 0 before. Takes 4 * kSteps
// heads at a time; where the group is smaller than 4, the other rows beside it count nothing.
template <int kSteps>
__device__ inline void SumImportances(const Params& params, const Records& records, int batch,
                                      int token, int first, int end, int num_blocks,
                                      const RowNorms& norms, float* importances) {
  const int thread = ThreadIndex(), slots = params.plan.slots;
  const int group = params.group(), row = token * group, tiles = end - first;
  // So many threads share a tile, each with its own slots.
  const int sharers_log2 = tiles <= 16 ? 4 : tiles <= 32 ? 3 : tiles <= 64 ? 2 : 1;
  const int sharers = 1 << sharers_log2, first_slot = thread & (sharers - 1);
  const int slot_floats = records.slot_floats();
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
#pragma unroll 1
  for (int head = 0; head < group; head += 4 * kSteps) {
    const float* maxima = norms.maxima + (row & ~3) + head;
    const float* inverses = norms.inverses + (row & ~3) + head;
#pragma unroll 1
    for (int i = thread >> sharers_log2; i < tiles; i += kComputeThreads >> sharers_log2) {
      const int tile = first + i;
      const float* record = records.Read(batch, first, token, tile) + head;
      float4 factors[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const float4 own = load(record, step), maximum = load(maxima, step);
        const float4 inverse = load(inverses, step);
        factors[step] =
            masked({Exp2(own.x - maximum.x) * inverse.x, Exp2(own.y - maximum.y) * inverse.y,
                    Exp2(own.z - maximum.z) * inverse.z, Exp2(own.w - maximum.w) * inverse.w});
      }
      const int first_block = params.FirstBlock(tile * kTile);
      float* to = importances + (tile & 1) * num_blocks + first_block;
      const int last_slot = min(slots, num_blocks - first_block);
      const float* sums = record + (1 + first_slot) * slot_floats;
#pragma unroll 2
      for (int slot = first_slot; slot < last_slot; slot += sharers) {
        float4 terms = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const float4 sum = masked(load(sums, step));
          terms.x += sum.x * factors[step].x;
          terms.y += sum.y * factors[step].y;
          terms.z += sum.z * factors[step].z;
          terms.w += sum.w * factors[step].w;
        }
        // The first slot of the first tile may be of no block.
        if (slot + first_block >= 0) to[slot] += (terms.x + terms.y) + (terms.z + terms.w);
        sums += sharers * slot_floats;
      }
    }
  }
  SyncConsumers();
}

// Writes each head's own scores of every block. Slow, and not often wanted.
__device__ inline void StoreBlockScores(const Params& params, const Part& part,
                                        const Records& records, int token, const RowNorms& norms) {
  const int group = params.group();
  const int record_rows = RecordRows(part.rows(params));
  const int64_t row = part.sequence.first_row + part.first_token + token;
  float* scores =
      params.arrays.block_scores + (row * params.heads + part.head * group) * params.max_blocks;
#pragma unroll 1
  for (int j = ThreadIndex(); j < params.max_blocks; j += kComputeThreads) {
    const int first = max(0, params.LastPosition(j) - (params.taps - 1));
    const int last = min(part.sequence.length - 1, params.LastPosition(j));
#pragma unroll 1
    for (int g = 0; g < group; ++g) {
      float score = 0.0f;
#pragma unroll 1
      for (int tile = first / kTile; first <= last && tile <= last / kTile; ++tile) {
        const float* record = records.Of(tile) + token * group + g;
        const int slot = j - params.FirstBlock(tile * kTile);
        score += record[(1 + slot) * record_rows] *
                 Exp2(record[0] - norms.maxima[token * group + g]) *
                 norms.inverses[token * group + g];
      }
      scores[int64_t{g} * params.max_blocks + j] = score;
    }
  }
}

// Selects the blocks of each token of an item that is through. If it is cut, its first batch of
// records is on its way; all arrive at `records_read` once the last one is read.
__device__ inline void Select(const Params& params, const Part& part, const Records& records,
                              const RowNorms& norms, SelectionScratch& scratch,
                              uint64_t* records_read) {
  const int tiles = part.sequence.tiles;
  const int count = static_cast<int>(params.problem.select_count);
  uint64_t* spill = reinterpret_cast<uint64_t*>(params.selection());
  float* importances = params.plan.importances > 0
                           ? reinterpret_cast<float*>(spill + params.plan.sorted)
                           : scratch.importances;
  const int most = records.BatchTiles();
  int batch = 0;
#pragma unroll 1
  for (int token = 0; token < part.tokens; ++token) {
    const int num_blocks = part.sequence.NumBlocks(params, part.first_token + token);
#pragma unroll 1
    for (int i = 4 * ThreadIndex(); i < 2 * num_blocks; i += 4 * kComputeThreads) {
      *reinterpret_cast<float4*>(importances + i) = {0.0f, 0.0f, 0.0f, 0.0f};
    }
#pragma unroll 1
    for (int first = 0; first < tiles; ++batch) {
      const int end = min(first + most, tiles);
      if (part.is_cut()) {
        // The next batch comes while this one is added up.
        if (end < tiles) {
          records.Fetch(batch + 1, token, end, min(end + most, tiles));
          WaitForCopies<1>();
        } else if (token + 1 < part.tokens) {
          records.Fetch(batch + 1, token + 1, 0, min(most, tiles));
          WaitForCopies<1>();
        } else {
          WaitForCopies<0>();
        }
      }
      SyncConsumers();
      const auto sum = [&](auto steps) {
        SumImportances<steps()>(params, records, batch, token, first, end, num_blocks, norms,
                                importances);
      };
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
      first = end;
    }
    if (params.arrays.block_scores) {
      StoreBlockScores(params, part, records, token, norms);
    }
    if (part.is_cut() && token + 1 == part.tokens) BarrierArrive(records_read);
    const int64_t row = part.sequence.first_row + part.first_token + token;
    const int begin = min(params.init_blocks, num_blocks);
    const int end = max(begin, num_blocks - params.local_blocks);
    SelectBlocks({importances, importances + num_blocks, begin, end}, num_blocks, count, spill,
                 scratch.topk,
                 params.arrays.topk_indices + (row * params.key_value_heads + part.head) * count);
    SyncConsumers();
  }
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_SELECTION_CUH_
