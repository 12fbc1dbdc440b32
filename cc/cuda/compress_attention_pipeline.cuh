// How keys and values reach shared memory: a ring of stages, each one tile of positions, filled by
// the loading warps in turn and emptied by the others. It runs on through the end of an item, so
// that the next item's tiles arrive while the last one's results are worked out.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tiles.cuh"

namespace jax_nsa::cuda::compressed {

// The ring has a power of two stages. A barrier's parity tells only one phase from the next, so
// whoever waits for a stage must know that its last but one use is over: each loading warp and each
// computing one comes back to the stages it used before, as their numbers divide the ring's.
constexpr int kMaxStages = 16;

struct Barriers {
  uint64_t full[kMaxStages];   // each lane of a loading warp arrives, or one and all bytes
  uint64_t empty[kMaxStages];  // each lane of kConsumers warps, fewer warps more than once
  int faulty[kMaxStages];      // whether the stage's tile has a faulty page id
  // At the end of an item that the thread block finishes for others, each consumer thread arrives
  // when the item's norms are known, and when its records are read.
  uint64_t norms, records;
};

// A place in the ring, and the parity of the phase that its barriers are in there.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance(int tiles, int stages) {
    const int to = stage + tiles;
    stage = to & (stages - 1);
    // Whether the ring's end was passed an odd number of times.
    parity ^= (to & stages) != 0;
  }
};

template <typename T, int kHeadSize, int kValueSize>
struct Ring {
  using Stage = cuda::Stage<T, kTile, kHeadSize, kValueSize>;
  char* memory;
  Barriers* barriers;

  __device__ Stage operator[](int stage) const { return {memory + stage * Stage::kBytes}; }
  // What lies behind the stages.
  __device__ float* behind(int stages) const {
    return reinterpret_cast<float*>(memory + stages * Stage::kBytes);
  }
};

// Prepares the ring, by all threads.
template <typename T, int kHeadSize, int kValueSize>
__device__ void InitRing(const Params& params, const Ring<T, kHeadSize, kValueSize>& ring) {
  if (const int stage = threadIdx.x - (kThreads - 32); stage >= 0 && stage < params.stages) {
    ring.barriers->faulty[stage] = 0;
    BarrierInit(&ring.barriers->full[stage], params.pools.boxed ? 1 : 32);
    BarrierInit(&ring.barriers->empty[stage], 32 * kConsumers);
    FenceBarrierInit();
  }
  if (threadIdx.x == kThreads - 1) {
    BarrierInit(&ring.barriers->norms, kComputeThreads);
    BarrierInit(&ring.barriers->records, kComputeThreads);
  }
  if (params.pools.boxed || params.head_size == kHeadSize) return;
#pragma unroll 1
  for (int stage = 0; stage < params.stages; ++stage) {
    ring[stage].ClearColumns(params.pools, threadIdx.x, kTile, kThreads);
  }
}

// The runs of a loading warp's next tiles in a part, which are every `step`-th one. Each lane finds
// one of them, so that page ids come for many tiles at a time.
class Runs {
 public:
  static constexpr int kOfTile = kTile / kRun;
  // What stands for a place in the pools where there is none: beyond the sequence, or of a page
  // whose id is wrong.
  static constexpr int kAbsent = -1, kFaulty = -2;

  __device__ Runs(const Params& params, const Part& part, int first, int step)
      : params_(params), part_(part), next_(first), step_(step) {}

  // The first position in the pools of each run of the tile that comes next.
  __device__ void Next(int (&runs)[kOfTile]) {
    if (left_ == 0) {
      own_ = Find();
      left_ = 32 / kOfTile;
    }
#pragma unroll
    for (int i = 0; i < kOfTile; ++i) {
      runs[i] = __shfl_sync(~0u, own_, 32 - left_ * kOfTile + i);
    }
    --left_;
    next_ += step_;
  }

 private:
  __device__ int Find() const {
    const int lane = threadIdx.x % 32;
    const int tile = next_ + lane / kOfTile * step_;
    const int position = tile * kTile + lane % kOfTile * kRun;
    if (tile >= part_.end || position >= part_.sequence.length) return kAbsent;
    const PagedProblem& problem = params_.problem;
    const int32_t* table =
        params_.arrays.block_table + part_.sequence.b * problem.pages_per_sequence;
    const int column = params_.by_page_size(position);
    const int32_t page = table[column];
    if (!IsPage(problem, page)) return kFaulty;
    return (page - column) * params_.page_size + position;
  }

  const Params& params_;
  const Part& part_;
  int next_;  // tile
  const int step_;
  int own_ = kAbsent, left_ = 0;
};

// A loading warp: fills its stages with its tiles of the share. Returns whether the share has the
// last part of an item.
template <typename T, int kHeadSize, int kValueSize>
__device__ bool Load(const Params& params, const Ring<T, kHeadSize, kValueSize>& ring,
                     WorkList work) {
  const int lane = threadIdx.x % 32;
  const Pools& pools = params.pools;
  const uint64_t policy = ReadOncePolicy();
  RingPosition position;
  unsigned faulty_stages = 0;  // what lane 0 last wrote of each
  // One thread asks for boxes nearly as fast as they come. Two keep up where shares are long; in
  // short ones they get in each other's way.
  const int askers = work.share_entries() < kLongShare ? 1 : 2;
  const int loaders = min(pools.boxed ? askers : kLoaders, params.stages);
  int turn = threadIdx.x / 32 - kConsumers;  // tiles until this warp's next
  if (turn >= loaders) turn = 1 << 30;       // never
  position.Advance(turn, params.stages);

  bool has_last = false;
  Part part;
#pragma unroll 1
  while (work.Next(&part)) {
    if (!part.sequence.loads()) continue;
    has_last |= part.is_last();
    int tile = part.begin + turn;
    Runs runs(params, part, tile, loaders);
#pragma unroll 1
    for (; tile < part.end; tile += loaders) {
      int from[Runs::kOfTile];
      runs.Next(from);
      bool faulty = false;
#pragma unroll
      for (int run : from) faulty |= run == Runs::kFaulty;

      const int stage = position.stage;
      const auto target = ring[stage];
      uint64_t* const full = &ring.barriers->full[stage];
      // Where one thread asks, only it waits: others could come too late for a phase.
      if (pools.boxed && lane != 0) {
        position.Advance(loaders, params.stages);
        continue;
      }
      BarrierWait(&ring.barriers->empty[stage], position.parity ^ 1);  // none in the first round
      BarrierWait(full, position.parity ^ 1);                          // long over; for synccheck
      if (lane == 0 && faulty != ((faulty_stages >> stage & 1) != 0)) {
        ring.barriers->faulty[stage] = faulty;
        faulty_stages ^= 1u << stage;
      }
      if (pools.boxed) {
        // A box takes one run, or all of the tile's.
        const int boxes = pools.box_positions == kTile ? 1 : Runs::kOfTile;
        int asked = 0;
#pragma unroll
        for (int i = 0; i < Runs::kOfTile; ++i) asked += i < boxes && from[i] >= 0;
        BarrierArriveExpecting(full, asked * pools.box_positions * target.kPositionBytes);
#pragma unroll
        for (int i = 0; i < Runs::kOfTile; ++i) {
          if (i < boxes && from[i] >= 0) {
            CopyBoxes(pools, target, i * kRun, from[i], part.head, full, policy);
          }
        }
      } else {
        // This store comes before the copies' arrival.
        if (faulty) __threadfence_block();
#pragma unroll
        for (int i = 0; i < Runs::kOfTile; ++i) {
          if (from[i] < 0) continue;
          const int end = min(kRun, part.sequence.length - tile * kTile - i * kRun);
          CopyRun(pools, target, i * kRun, from[i], part.head, 0, end, policy);
        }
        if (pools.aligned) {
          BarrierArriveAfterCopies(full);
        } else {
          BarrierArrive(full);
        }
      }
      position.Advance(loaders, params.stages);
    }
    turn = tile - part.end;
  }
  return has_last;
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_PIPELINE_CUH_
