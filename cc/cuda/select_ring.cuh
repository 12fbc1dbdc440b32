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

namespace jax_nsa::cuda::select {

// Stages of a ring, at most; a switch of WaitForStage has one case for each.
constexpr int kMaxStages = 4;

// A tile's rows in shared memory. A pitch is an odd multiple of 16 bytes, so that 8 rows lie in
// different banks.
template <typename T, int kHeadSize, int kValueSize>
struct Stage {
  static constexpr int kKeyPitch = kHeadSize * sizeof(T) + 16;
  static constexpr int kValuePitch = kValueSize * sizeof(T) + 16;
  static constexpr int kBytes = kTile * (kKeyPitch + kValuePitch);

  char* memory;

  __device__ char* keys() const { return memory; }
  __device__ char* values() const { return memory + kTile * kKeyPitch; }
};

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
  static constexpr int kPitch = kHeadSize * sizeof(T) + 16;
  static constexpr int kTileBytes = kPlain ? 0 : kRowTile * kPitch;

  char* memory;

  // Begins to bring them, as one batch of copies of each thread, by all threads.
  __device__ void Load(const Params& params, const Item& item) const {
    if constexpr (!kPlain) {
      const int rows = max(params.plan.rows, kRowTile);
      const T* query = static_cast<const T*>(params.arrays.query) +
                       (int64_t{item.row} * params.heads + item.first_head) * params.head_size;
      if (params.aligned) {
        constexpr int kUnits = kHeadSize / 8;  // of 16 bytes, in a row
        const int units = params.head_size / 8;
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * kUnits; i += kThreads) {
          const int row = i / kUnits, unit = i % kUnits;
          char* to = memory + row * kPitch + 16 * unit;
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
          reinterpret_cast<T*>(memory + row * kPitch)[d] =
              exists ? query[row * params.head_size + d] : T(0.0f);
        }
      }
      CommitCopies();
    }
  }
};

// Copies rows [first, end) of a tile without waiting, as far as they count. Eight lanes copy 128
// neighbouring bytes at a time, so that a warp has four rows in hand. With kFull, all columns
// exist.
template <bool kFull, typename T, int kHeadSize, int kValueSize>
__device__ inline void CopyRows(const Params& params, const Stage<T, kHeadSize, kValueSize>& stage,
                                const Tile& tile, int first, int end, uint64_t policy) {
  const int lane = threadIdx.x % 32, offset = lane % 8 * 16;
  const int key_bytes = (kFull ? kHeadSize : params.head_size) * static_cast<int>(sizeof(T));
  const int value_bytes = (kFull ? kValueSize : params.value_size) * static_cast<int>(sizeof(T));
  const uint32_t keys = SharedAddress(stage.keys()) + lane / 8 * stage.kKeyPitch + offset;
  const uint32_t values = SharedAddress(stage.values()) + lane / 8 * stage.kValuePitch + offset;
  const int64_t source = tile.source + lane / 8 * params.key_value_heads;
  const char* key = static_cast<const char*>(params.arrays.key) + offset + source * key_bytes;
  const char* value = static_cast<const char*>(params.arrays.value) + offset + source * value_bytes;
  const int key_step = params.key_value_heads * key_bytes;
  const int value_step = params.key_value_heads * value_bytes;
#pragma unroll
  for (int r = 0; r < kTile; r += 4) {
    const int row = r + lane / 8;
    if (r < first || r >= end || row < tile.begin || row >= tile.end) continue;
#pragma unroll
    for (int c = 0; c < kHeadSize * static_cast<int>(sizeof(T)); c += 128) {
      if (kFull || offset + c < key_bytes) {
        CopyAsync16(keys + r * stage.kKeyPitch + c, key + int64_t{r} * key_step + c, policy);
      }
    }
#pragma unroll
    for (int c = 0; c < kValueSize * static_cast<int>(sizeof(T)); c += 128) {
      if (kFull || offset + c < value_bytes) {
        CopyAsync16(values + r * stage.kValuePitch + c, value + int64_t{r} * value_step + c,
                    policy);
      }
    }
  }
}

// The same one element at a time, for rows that start anywhere. Slow.
template <typename T>
__device__ inline void CopyElements(const Params& params, const void* pool, const Tile& tile,
                                    int first, int end, int row_size, char* to, int pitch) {
#pragma unroll 1
  for (int r = max(first, tile.begin); r < min(end, tile.end); ++r) {
    const T* from = static_cast<const T*>(pool) +
                    (tile.source + int64_t{r} * params.key_value_heads) * row_size;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < row_size; i += 32) {
      reinterpret_cast<T*>(to + r * pitch)[i] = from[i];
    }
  }
}

// A team's ring.
template <typename T, int kHeadSize, int kValueSize>
class Ring {
 public:
  using Stage = select::Stage<T, kHeadSize, kValueSize>;

  __device__ Ring(const Params& params, const Team& team, char* memory)
      : params_(params),
        memory_(memory + team.team * params.stages * Stage::kBytes),
        first_(team.member << (4 - team.warps_log2)),
        end_((team.member + 1) << (4 - team.warps_log2)),
        policy_(ReadOncePolicy()) {
    static_assert(kTile == 16);
  }

  __device__ Stage operator[](int slot) const { return {memory_ + slot * Stage::kBytes}; }

  // The keys' columns from head_size to the pitch enter the products, so they are made zero; no
  // copy ever touches them. The team must meet before it reads them.
  __device__ void Clear() const {
    if (params_.head_size == kHeadSize) return;
    const int lane = threadIdx.x % 32, rows = end_ - first_;
#pragma unroll 1
    for (int i = lane; i < params_.stages * rows; i += 32) {
      const int slot = i / rows;
      char* keys = (*this)[slot].keys() + (first_ + i - slot * rows) * Stage::kKeyPitch;
#pragma unroll 1
      for (int d = params_.head_size; d < kHeadSize; ++d) reinterpret_cast<T*>(keys)[d] = T(0.0f);
    }
  }

  // This warp's share of bringing a tile into a stage, as one batch of copies.
  __device__ void Load(const Tile& tile, int slot) const {
    if (tile.end > 0) {
      const Stage stage = (*this)[slot];
      const int own = threadIdx.x % kTile;
      if ((own < tile.begin || own >= tile.end) && own >= first_ && own < end_) {
        // A probability of zero must not meet a NaN. (Scores are masked whatever the keys.)
#pragma unroll 1
        for (int c = threadIdx.x % 32 / kTile * 16; c < Stage::kValuePitch; c += 32) {
          *reinterpret_cast<int4*>(stage.values() + own * Stage::kValuePitch + c) =
              int4{0, 0, 0, 0};
        }
      }
      if (!params_.aligned) {
        CopyElements<T>(params_, params_.arrays.key, tile, first_, end_, params_.head_size,
                        stage.keys(), Stage::kKeyPitch);
        CopyElements<T>(params_, params_.arrays.value, tile, first_, end_, params_.value_size,
                        stage.values(), Stage::kValuePitch);
      } else if (params_.head_size == kHeadSize && params_.value_size == kValueSize) {
        CopyRows<true>(params_, stage, tile, first_, end_, policy_);
      } else {
        CopyRows<false>(params_, stage, tile, first_, end_, policy_);
      }
    }
    CommitCopies();
  }

 private:
  const Params& params_;
  char* const memory_;
  const int first_, end_;  // rows that this warp brings
  const uint64_t policy_;
};

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_RING_CUH_
