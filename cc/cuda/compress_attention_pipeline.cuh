// How keys and values reach shared memory: a ring of stages, each one tile of positions, filled by
// the loading warps in turn and emptied by the others. It runs on through the end of an item, so
// that the next item's tiles arrive while the last one's results are worked out.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda {

// The ring has a power of two stages. A barrier's parity tells only one phase from the next, so
// whoever waits for a stage must know that its last but one use is over: each loading warp and each
// computing one comes back to the stages it used before, as their numbers divide the ring's.
constexpr int kMaxStages = 16;

struct Barriers {
  uint64_t full[kMaxStages];   // each lane of a loading warp arrives
  uint64_t empty[kMaxStages];  // each lane of kConsumers warps, fewer warps more than once
  int faulty[kMaxStages];      // whether the stage's tile has a faulty page id
  // At the end of an item that the thread block finishes for others, each consumer thread arrives
  // when the item's norms are known, and when its records are read.
  uint64_t norms, records;
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

// Where a stage's rows lie. A pitch is an odd multiple of 16 bytes, so that 8 rows lie in different
// banks.
template <typename T, int kHeadSize, int kValueSize>
struct Stage {
  static constexpr int kKeyPitch = kHeadSize * sizeof(T) + 16;
  static constexpr int kValuePitch = kValueSize * sizeof(T) + 16;
  static constexpr int kBytes = kTile * (kKeyPitch + kValuePitch);

  char* memory;

  __device__ char* keys() const { return memory; }
  __device__ char* values() const { return memory + kTile * kKeyPitch; }
};

template <typename T, int kHeadSize, int kValueSize>
struct Ring {
  using Stage = cuda::Stage<T, kHeadSize, kValueSize>;
  char* memory;
  Barriers* barriers;

  __device__ Stage operator[](int slot) const { return {memory + slot * Stage::kBytes}; }
  // What lies behind the stages.
  __device__ float* behind(int stages) const {
    return reinterpret_cast<float*>(memory + stages * Stage::kBytes);
  }
};

// Prepares the ring, by all threads. The keys' columns from head_size to the pitch enter the
// products, so they are made zero; no copy ever touches them.
template <typename T, int kHeadSize, int kValueSize>
__device__ void InitRing(const Params& params, const Ring<T, kHeadSize, kValueSize>& ring) {
  if (const int slot = threadIdx.x - (kThreads - 32); slot >= 0 && slot < params.stages) {
    ring.barriers->faulty[slot] = 0;
    BarrierInit(&ring.barriers->full[slot], 32);
    BarrierInit(&ring.barriers->empty[slot], 32 * kConsumers);
  }
  if (threadIdx.x == kThreads - 1) {
    BarrierInit(&ring.barriers->norms, kComputeThreads);
    BarrierInit(&ring.barriers->records, kComputeThreads);
  }
  if (params.head_size == kHeadSize) return;
#pragma unroll 1
  for (int row = threadIdx.x; row < params.stages * kTile; row += kThreads) {
    char* keys = ring[row / kTile].keys() + row % kTile * ring[0].kKeyPitch;
#pragma unroll 1
    for (int d = params.head_size; d < kHeadSize; ++d) reinterpret_cast<T*>(keys)[d] = T(0.0f);
  }
}

// Copies a tile's rows in units of 16 bytes, without waiting. `source` is the row for this lane's
// position; nothing is copied for a negative one. Eight lanes copy 128 neighbouring bytes at a
// time, so that a warp has four rows in hand. With kFull, all columns exist.
template <bool kFull, typename T, int kHeadSize, int kValueSize>
__device__ inline void CopyTile(const Params& params, const Stage<T, kHeadSize, kValueSize>& stage,
                                int source, uint64_t policy) {
  const int lane = threadIdx.x % 32, offset = lane % 8 * 16;
  const int key_bytes = (kFull ? kHeadSize : params.head_size) * static_cast<int>(sizeof(T));
  const int value_bytes = (kFull ? kValueSize : params.value_size) * static_cast<int>(sizeof(T));
  const uint32_t keys = SharedAddress(stage.keys()) + lane / 8 * stage.kKeyPitch + offset;
  const uint32_t values = SharedAddress(stage.values()) + lane / 8 * stage.kValuePitch + offset;
  const char* key_pool = static_cast<const char*>(params.arrays.key) + offset;
  const char* value_pool = static_cast<const char*>(params.arrays.value) + offset;
#pragma unroll
  for (int r = 0; r < kTile; r += 4) {
    const int row = __shfl_sync(~0u, source, r + lane / 8);
    if (row < 0) continue;
    const char* key = key_pool + int64_t{row} * key_bytes;
    const char* value = value_pool + int64_t{row} * value_bytes;
#pragma unroll
    for (int c = 0; c < kHeadSize * static_cast<int>(sizeof(T)); c += 128) {
      if (kFull || offset + c < key_bytes) {
        CopyAsync16(keys + r * stage.kKeyPitch + c, key + c, policy);
      }
    }
#pragma unroll
    for (int c = 0; c < kValueSize * static_cast<int>(sizeof(T)); c += 128) {
      if (kFull || offset + c < value_bytes) {
        CopyAsync16(values + r * stage.kValuePitch + c, value + c, policy);
      }
    }
  }
}

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

// A loading warp: fills its stages with its tiles of the share. Returns whether the share has the
// last part of an item.
template <typename T, int kHeadSize, int kValueSize>
__device__ bool Load(const Params& params, const Ring<T, kHeadSize, kValueSize>& ring,
                     WorkList work) {
  const Problem& problem = params.problem;
  const int lane = threadIdx.x % 32, heads = params.key_value_heads;
  const uint64_t policy = ReadOncePolicy();
  RingPosition position;
  unsigned faulty_slots = 0;  // what lane 0 last wrote of each slot
  const int loaders = min(kLoaders, params.stages);
  int turn = threadIdx.x / 32 - kConsumers;  // tiles until this warp's next
  if (turn >= loaders) turn = 1 << 30;       // never
  position.Advance(turn, params.stages);

  bool has_last = false;
  Part part;
#pragma unroll 1
  while (work.Next(&part)) {
    if (!part.sequence.loads()) continue;
    has_last |= part.is_last();
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
      const auto stage = ring[slot];
      BarrierWait(&ring.barriers->empty[slot], position.parity ^ 1);  // none in the first round
      BarrierWait(&ring.barriers->full[slot], position.parity ^ 1);   // long over; for synccheck
      const bool faulty = __any_sync(~0u, !legal);
      if (row < 0) {
        // A probability of zero must not meet a NaN. (Scores are masked whatever the keys.)
#pragma unroll 1
        for (int c = 0; c < stage.kValuePitch; c += 16) {
          *reinterpret_cast<int4*>(stage.values() + lane * stage.kValuePitch + c) =
              int4{0, 0, 0, 0};
        }
      }
      if (lane == 0 && faulty != ((faulty_slots >> slot & 1) != 0)) {
        ring.barriers->faulty[slot] = faulty;
        faulty_slots ^= 1u << slot;
      }
      // These stores, on a sequence's last tile, come before the copies' arrival.
      if (row < 0 || faulty) __threadfence_block();
      if (params.aligned_rows) {
        if (params.head_size == kHeadSize && params.value_size == kValueSize) {
          CopyTile<true>(params, stage, row, policy);
        } else {
          CopyTile<false>(params, stage, row, policy);
        }
        BarrierArriveAfterCopies(&ring.barriers->full[slot]);
      } else {
        CopyTileElements<T>(params.arrays.key, row, params.head_size, stage.keys(),
                            stage.kKeyPitch);
        CopyTileElements<T>(params.arrays.value, row, params.value_size, stage.values(),
                            stage.kValuePitch);
        BarrierArrive(&ring.barriers->full[slot]);
      }
      position.Advance(loaders, params.stages);
    }
    turn = tile - part.end;
  }
  return has_last;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_
