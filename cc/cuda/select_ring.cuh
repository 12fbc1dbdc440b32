// How queries, keys and values reach shared memory. Warps that have different heads of the item are
// a team: they bring the same tiles into a ring of stages of their own. A group of up to 16 heads
// needs a team of one warp, which waits for no other.

#ifndef JAX_NSA_CUDA_SELECT_RING_CUH_
#define JAX_NSA_CUDA_SELECT_RING_CUH_

#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/select_item.cuh"
#include "cuda/select_params.cuh"
#include "cuda/select_ptx.cuh"
#include "cuda/tiles.cuh"

namespace jax_nsa::cuda::select {

// Stages of a ring, at most; a switch of WaitForStage has one case for each.
constexpr int kMaxStages = 4;

// Warps of a team, and this warp's place.
struct Team {
  int warps_log2;
  int team, teams;
  int member;

  __device__ explicit Team(const Params& params) {
    warps_log2 = params.plan.rows > 2 * kRowTile ? 2 : params.plan.rows > kRowTile ? 1 : 0;
    const int warp = threadIdx.x / 32;
    team = warp >> warps_log2;
    teams = kWarps >> warps_log2;
    member = warp & ((1 << warps_log2) - 1);
  }
  __device__ void Sync() const {
    if (warps_log2 == 0) {
      __syncwarp();
    } else if (team == 0) {
      SyncSome<1>(32 << warps_log2);
    } else {
      SyncSome<2>(32 << warps_log2);
    }
  }
};

// Waits for all batches of this thread's copies but the `later` last ones.
__device__ inline void WaitForAllBut(int later) {
  static_assert(kMaxStages == 4);
  switch (later) {
    case 0:
      return WaitForCopies<0>();
    case 1:
      return WaitForCopies<1>();
    case 2:
      return WaitForCopies<2>();
    default:
      return WaitForCopies<3>();
  }
}

// The item's query rows in shared memory, as the matrix instructions take them: [16-row tiles of
// the item, kHeadSize], zero where there is none. Kernels of float32 read them where they are.
template <typename T, int kHeadSize>
struct Queries {
  static constexpr bool kPlain = std::is_same_v<T, float>;
  using Rows = Swizzled<T, kRowTile, kHeadSize>;
  static constexpr int kTileBytes = kPlain ? 0 : Rows::kBytes;

  char* memory;

  // Begins to bring them, as one batch of copies of each thread, by all threads.
  __device__ void Load(const Params& params, const Item& item) const {
    if constexpr (!kPlain) {
      const int rows = max(params.plan.rows, kRowTile);
      const T* query = static_cast<const T*>(params.arrays.query) +
                       (int64_t{item.row} * params.heads + item.first_head) * params.head_size;
      if (params.aligned_query) {
        constexpr int kUnits = kHeadSize / 8;  // of 16 bytes, in a row
        const int units = params.head_size / 8;
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * kUnits; i += kThreads) {
          const int row = i / kUnits, unit = i % kUnits;
          char* to = memory + row / kRowTile * kTileBytes + Rows::Place(row % kRowTile, unit);
          if (row < params.plan.rows && unit < units) {
            CopyAsync16(SharedAddress(to), query + row * params.head_size + 8 * unit);
          } else {
            *reinterpret_cast<int4*>(to) = int4{0, 0, 0, 0};
          }
        }
      } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * kHeadSize; i += kThreads) {
          const int row = i / kHeadSize, d = i % kHeadSize;
          const bool exists = row < params.plan.rows && d < params.head_size;
          *Rows::At(memory + row / kRowTile * kTileBytes, row % kRowTile, d) =
              exists ? query[row * params.head_size + d] : T(0.0f);
        }
      }
      CommitCopies();
    }
  }
};

// A team's ring. `full` are barriers of its stages, for boxes.
template <typename T, int kHeadSize, int kValueSize>
class Ring {
 public:
  using Stage = cuda::Stage<T, kTile, kHeadSize, kValueSize>;
  static_assert(kTile == kRun);

  __device__ Ring(const Params& params, const Item& item, const Team& team, char* memory,
                  uint64_t* full)
      : params_(params),
        team_(team),
        head_(item.head),
        memory_(memory + team.team * params.stages * Stage::kBytes),
        full_(full + team.team * kMaxStages),
        policy_(ReadOncePolicy()) {
    if (params.pools.boxed && asks()) {
#pragma unroll 1
      for (int stage = 0; stage < params.stages; ++stage) BarrierInit(&full_[stage], 1);
      FenceBarrierInit();
    }
  }

  __device__ Stage operator[](int stage) const { return {memory_ + stage * Stage::kBytes}; }

  // The team must meet before it reads what this has cleared.
  __device__ void Clear() const {
    if (params_.pools.key.size == kHeadSize || params_.pools.boxed) return;
#pragma unroll 1
    for (int stage = 0; stage < params_.stages; ++stage) {
      (*this)[stage].ClearColumns(params_.pools, first() + threadIdx.x % 32, end(), 32);
    }
  }

  // This warp's share of bringing a tile into a stage, as one batch of copies; or one thread of the
  // team has it brought.
  __device__ void Load(const Tile& tile, int stage) const {
    const Pools& pools = params_.pools;
    if (pools.boxed) {
      if (tile.end == 0 || !asks()) return;
      BarrierArriveExpecting(&full_[stage], Stage::kBytes);
      CopyBoxes(pools, (*this)[stage], 0, tile.source, head_, &full_[stage], policy_);
    } else {
      CopyRun(pools, (*this)[stage], 0, tile.source, head_, max(tile.begin, first()),
              min(tile.end, end()), policy_);
      CommitCopies();
    }
  }

  // Waits for the tile that was loaded into a stage before as many others as there are stages, if
  // it has any positions. By all of the team.
  __device__ void Await(int stage, bool any) {
    if (!params_.pools.boxed) {
      WaitForAllBut(params_.stages - 1);
      team_.Sync();
    } else if (any) {
      BarrierWait(&full_[stage], phases_ >> stage & 1);
      phases_ ^= 1u << stage;
    }
  }

 private:
  // Whether this thread asks for the team's boxes.
  __device__ bool asks() const { return team_.member == 0 && threadIdx.x % 32 == 0; }
  // Rows that this warp brings.
  __device__ int first() const { return team_.member << (4 - team_.warps_log2); }
  __device__ int end() const { return (team_.member + 1) << (4 - team_.warps_log2); }

  const Params& params_;
  const Team& team_;
  const int head_;
  char* const memory_;
  uint64_t* const full_;
  const uint64_t policy_;
  uint32_t phases_ = 0;  // of each stage's barrier, as bits
};

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_RING_CUH_
