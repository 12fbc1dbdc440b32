// How keys and values reach shared memory: a ring of stages, each one tile of positions, filled by
// the loading warps in turn and emptied by the others. It runs on through the end of an item, so
// that the next item's tiles arrive while the last one's results are worked out.

#ifndef JAX_NSA_CUDA_PIPELINE_CUH_
#define JAX_NSA_CUDA_PIPELINE_CUH_

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/work.cuh"

namespace jax_nsa::cuda {

// The ring has a power of two stages. A barrier's parity tells only one phase from the next, so
// whoever waits for a stage must know that its last but one use is over: each loading warp and each
// computing one comes back to the stages it used before, as their numbers divide the ring's.
constexpr int kMaxStages = 16;

struct Barriers {
  uint64_t full[kMaxStages];   // each lane of a loading warp arrives
  uint64_t empty[kMaxStages];  // kConsumers arrivals
  int faulty[kMaxStages];      // whether the stage's tile has a faulty page id
};

// A place in the ring, and the parity of the phase that its barriers are in there.
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void Advance(int tiles, int stages) {
    const int to = slot + tiles;
    slot = to & (stages - 1);
    // Whether the ring's end was passed an odd number of times.
    parity ^= (to & stages) != 0;
  }
};

// The stages. A pitch is an odd multiple of 16 bytes, so that 8 rows lie in different banks.
struct Ring {
  char* memory;
  Barriers* barriers;

  __device__ char* Keys(const Params& params, int slot) const {
    return memory + slot * (kTile * (params.key_pitch + params.value_pitch));
  }
  __device__ char* Values(const Params& params, int slot) const {
    return Keys(params, slot) + kTile * params.key_pitch;
  }
};

// Prepares the ring, by all threads. Columns between head_size and the next multiple of 16 enter
// the products, so they are made zero; no copy ever touches them.
__device__ inline void InitRing(const Params& params, const Ring& ring) {
  if (threadIdx.x < params.stages) {
    BarrierInit(&ring.barriers->full[threadIdx.x], 32);
    BarrierInit(&ring.barriers->empty[threadIdx.x], kConsumers);
  }
  const int element = params.problem.dtype == DataType::kFloat32 ? 4 : 2;
  const int used = params.head_size * element, padded = params.key_pitch - 16;
  if (used == padded) return;
#pragma unroll 1
  for (int row = threadIdx.x; row < params.stages * kTile; row += kThreads) {
    char* start = ring.Keys(params, row / kTile) + row % kTile * params.key_pitch;
#pragma unroll 1
    for (int c = used; c < padded; c += 2) *reinterpret_cast<uint16_t*>(start + c) = 0;
  }
}

// How the lanes of a warp share a tile's rows in units of 16 bytes: neighbouring lanes copy
// neighbouring chunks, going through the tile row by row.
struct CopyPattern {
  int row_bytes, pitch, chunks;
  int row, chunk;            // where this lane starts
  int row_step, chunk_step;  // to its next chunk

  __device__ CopyPattern(int row_bytes, int pitch)
      : row_bytes(row_bytes), pitch(pitch), chunks(row_bytes / 16) {
    const int lane = threadIdx.x % 32, width = max(1, chunks);
    row = lane / width;
    chunk = lane - row * width;
    row_step = 32 / width;
    chunk_step = 32 - row_step * width;
  }

  // Copies a tile without waiting. `source` is the row for this lane's position, nothing is copied
  // for a negative one.
  __device__ void Copy(const void* pool, int source, uint32_t to, uint64_t policy) const {
    int r = row, c = chunk;
#pragma unroll 4
    for (int i = 0; i < chunks; ++i) {
      const int from = __shfl_sync(~0u, source, r);
      if (from >= 0) {
        CopyAsync16(to + r * pitch + c * 16,
                    static_cast<const char*>(pool) + int64_t{from} * row_bytes + c * 16, policy);
      }
      r += row_step;
      c += chunk_step;
      if (c >= chunks) {
        c -= chunks;
        ++r;
      }
    }
  }
};

// The same one element at a time, for rows that start anywhere. Slow.
template <typename T>
__device__ inline void CopyTileElements(const void* pool, int row, int row_size, char* to,
                                        int pitch) {
#pragma unroll 1
  for (int r = 0; r < kTile; ++r) {
    const int64_t from = __shfl_sync(~0u, row, r);
    if (from < 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < row_size; i += 32) {
      reinterpret_cast<T*>(to + r * pitch)[i] = static_cast<const T*>(pool)[from * row_size + i];
    }
  }
}

// A loading warp: fills its stages with its tile of the share.
template <typename T>
__device__ void Load(const Params& params, const Ring& ring, WorkList work) {
  const Problem& problem = params.problem;
  const int lane = threadIdx.x % 32, heads = params.key_value_heads;
  const CopyPattern key_pattern(params.head_size * sizeof(T), params.key_pitch);
  const CopyPattern value_pattern(params.value_size * sizeof(T), params.value_pitch);
  const uint64_t policy = ReadOncePolicy();
  RingPosition position;
  const int loaders = min(kLoaders, params.stages);
  int turn = threadIdx.x / 32 - kConsumers;  // tiles until this warp's next
  if (turn >= loaders) return;
  position.Advance(turn, params.stages);

  Part part;
#pragma unroll 1
  while (work.Next(&part)) {
    if (!part.sequence.loads) continue;
    const int32_t* table = params.arrays.block_table + part.sequence.b * problem.pages_per_sequence;
    int tile = part.begin + turn;
#pragma unroll 1
    for (; tile < part.end; tile += loaders) {
      // Each lane finds one row of the pools.
      const int i = tile * kTile + lane;
      const bool exists = i < part.sequence.length;
      const int column = params.by_page_size(i);
      const int32_t page = exists ? table[column] : 0;
      const bool legal = IsPage(problem, page);
      const int row =
          exists && legal ? ((page - column) * params.page_size + i) * heads + part.head : -1;

      const int slot = position.slot;
      char* keys = ring.Keys(params, slot);
      char* values = ring.Values(params, slot);
      BarrierWait(&ring.barriers->empty[slot], position.parity ^ 1);  // none in the first round
      const bool faulty = __any_sync(~0u, !legal);
      if (lane == 0) ring.barriers->faulty[slot] = faulty;
      if (row < 0) {
        // A probability of zero must not meet a NaN. (Scores are masked whatever the keys.)
#pragma unroll 1
        for (int c = 0; c < params.value_pitch; c += 16) {
          *reinterpret_cast<int4*>(values + lane * params.value_pitch + c) = int4{0, 0, 0, 0};
        }
      }
      if (params.aligned) {
        key_pattern.Copy(params.arrays.key, row, SharedAddress(keys), policy);
        value_pattern.Copy(params.arrays.value, row, SharedAddress(values), policy);
        BarrierHoldForCopies(&ring.barriers->full[slot]);
      } else {
        CopyTileElements<T>(params.arrays.key, row, params.head_size, keys, params.key_pitch);
        CopyTileElements<T>(params.arrays.value, row, params.value_size, values,
                            params.value_pitch);
      }
      BarrierArrive(&ring.barriers->full[slot]);
      position.Advance(loaders, params.stages);
    }
    turn = tile - part.end;
  }
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_PIPELINE_CUH_
