// How warps go through the tiles of a part. Warps that have different heads of the item are a
// team: they bring the same tiles into a ring of stages of their own, and each attends with its 16
// rows. A group of up to 16 heads needs a team of one warp, which waits for no other.

#ifndef JAX_NSA_CUDA_SELECT_ATTEND_CUH_
#define JAX_NSA_CUDA_SELECT_ATTEND_CUH_

#include <cmath>
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

// Waits for this thread's copies of the oldest of `stages` batches.
__device__ inline void WaitForStage(int stages) {
  switch (stages) {
    case 1:
      return WaitForCopies<0>();
    case 2:
      return WaitForCopies<1>();
    case 3:
      return WaitForCopies<2>();
    default:
      return WaitForCopies<3>();
  }
}

// Copies rows of a tile without waiting, `source` being the row of the pools for the position that
// is this lane's number modulo 16; nothing is copied for a negative one. Eight lanes copy 128
// neighbouring bytes at a time, so that a warp has four rows in hand. With kFull, all columns
// exist.
template <bool kFull, typename T, int kHeadSize, int kValueSize>
__device__ inline void CopyRows(const Params& params, const Stage<T, kHeadSize, kValueSize>& stage,
                                int source, int first, int end, uint64_t policy) {
  const int lane = threadIdx.x % 32, offset = lane % 8 * 16;
  const int key_bytes = (kFull ? kHeadSize : params.head_size) * static_cast<int>(sizeof(T));
  const int value_bytes = (kFull ? kValueSize : params.value_size) * static_cast<int>(sizeof(T));
  const uint32_t keys = SharedAddress(stage.keys()) + lane / 8 * stage.kKeyPitch + offset;
  const uint32_t values = SharedAddress(stage.values()) + lane / 8 * stage.kValuePitch + offset;
  const char* key_pool = static_cast<const char*>(params.arrays.key) + offset;
  const char* value_pool = static_cast<const char*>(params.arrays.value) + offset;
#pragma unroll
  for (int r = 0; r < kTile; r += 4) {
    if (r < first || r >= end) continue;
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
__device__ inline void CopyElements(const void* pool, int source, int first, int end, int row_size,
                                    char* to, int pitch) {
#pragma unroll 1
  for (int r = first; r < end; ++r) {
    const int64_t from = __shfl_sync(~0u, source, r);
    if (from < 0) continue;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < row_size; i += 32) {
      reinterpret_cast<T*>(to + r * pitch)[i] = static_cast<const T*>(pool)[from * row_size + i];
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

  // A tile, and the row of the pools for the position that is this lane's number modulo 16, or -1.
  struct Place {
    int valid, source;
  };
  __device__ Place Locate(const Item& item, const Row& row, int tile, int end) const {
    if (tile >= end) return {0, -1};
    const Tile found = FindTile(params_, item, row, tile);
    const int own = threadIdx.x % kTile;
    if (own >= found.valid) return {found.valid, -1};
    const int position = found.first + own, column = params_.by_page_size(position);
    const int page = Table(params_, row)[column];
    if (!IsPage(params_.problem, page)) return {found.valid, -1};
    return {found.valid,
            ((page - column) * params_.page_size + position) * params_.key_value_heads + item.head};
  }

  // This warp's share of bringing a tile into a stage, as one batch of copies.
  __device__ void Load(const Place& place, int slot) const {
    if (place.valid > 0) {
      const Stage stage = (*this)[slot];
      const int own = threadIdx.x % kTile, source = place.source;
      if (source < 0 && own >= first_ && own < end_) {
        // A probability of zero must not meet a NaN. (Scores are masked whatever the keys.)
#pragma unroll 1
        for (int c = threadIdx.x % 32 / kTile * 16; c < Stage::kValuePitch; c += 32) {
          *reinterpret_cast<int4*>(stage.values() + own * Stage::kValuePitch + c) =
              int4{0, 0, 0, 0};
        }
      }
      if (!params_.aligned) {
        CopyElements<T>(params_.arrays.key, source, first_, end_, params_.head_size, stage.keys(),
                        Stage::kKeyPitch);
        CopyElements<T>(params_.arrays.value, source, first_, end_, params_.value_size,
                        stage.values(), Stage::kValuePitch);
      } else if (params_.head_size == kHeadSize && params_.value_size == kValueSize) {
        CopyRows<true>(params_, stage, source, first_, end_, policy_);
      } else {
        CopyRows<false>(params_, stage, source, first_, end_, policy_);
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

// One warp's 16 rows. Lane 4g + t holds of any [16, 8n] result the rows g and g + 8, columns
// 8j + 2t and 8j + 2t + 1 for each j < n, as the matrix instruction leaves them.
template <typename T, int kHeadSize, int kValueSize>
class WarpRows {
 public:
  static constexpr bool kPlain = std::is_same_v<T, float>;
  using Stage = select::Stage<T, kHeadSize, kValueSize>;
  static constexpr int kSteps = kHeadSize / 16, kColumns = kValueSize / 8;

  float sums[kColumns][4];  // exponentials times values
  float maxima[2];          // of the scaled scores, in powers of two
  float totals[2];          // of the exponentials of this lane's columns

  // `first_row` of the item's.
  __device__ WarpRows(const Params& params, const Item& item, int first_row) : params_(params) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (float& sum : sums[n]) sum = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maxima[r] = -INFINITY;
      totals[r] = 0.0f;
      // A row that doesn't exist is any that does; its results are not used.
      const int row = min(first_row + lane() / 4 + 8 * r, params.plan.rows - 1);
      const int64_t query = int64_t{item.row} * params.heads + item.first_head + row;
      query_row_[r] = static_cast<const T*>(params.arrays.query) + query * params.head_size;
    }
    if constexpr (!kPlain) LoadQuery();
  }

  // Adds a tile's positions, of which the first `valid` exist.
  __device__ void Attend(const Stage& stage, int valid) {
    float p[2][4];  // scores, then their exponentials
    Scores(stage.keys(), p);
    const float scale = params_.scale_log2;
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = 8 * n + 2 * (lane() % 4) + c % 2;
        p[n][c] = position < valid ? p[n][c] * scale : -INFINITY;
        peak[c / 2] = fmaxf(peak[c / 2], p[n][c]);
      }
    }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 2));
      const float before = maxima[r];
      maxima[r] = fmaxf(before, peak[r]);
      peak[r] = maxima[r] == -INFINITY ? 0.0f : maxima[r];
      shrink[r] = Exp2(before - peak[r]);
      totals[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[n][c] = Exp2(p[n][c] - peak[c / 2]);
        totals[c / 2] += p[n][c];
      }
    }
    // The maxima settle after a few tiles.
    if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[n][c] *= shrink[c / 2];
      }
    }
    AddValues(stage.values(), p);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // Keeps the query rows in registers, zero beyond their ends.
  __device__ void LoadQuery() {
    const int column = 2 * (lane() % 4);
    const T* rows[2] = {query_row_[0] + column, query_row_[1] + column};
    if (params_.aligned && params_.head_size == kHeadSize) {
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i) {
        query_[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(rows[i % 2] + 8 * (i / 2));
      }
    } else {
      const int rest = params_.head_size - column;  // columns from there on
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i) {
        const int row = i % 2, d = 8 * (i / 2);
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(rows[row] + d);
        query_[i / 4][i % 4] =
            (d < rest ? pair[0] : 0) | (d + 1 < rest ? uint32_t{pair[1]} << 16 : 0);
      }
    }
  }

  // p[16 rows, 16 positions] = query keys^T
  __device__ void Scores(const char* keys, float (&p)[2][4]) {
    float q[2][2][4];  // sums over even and over odd steps, so that fewer wait for one another
#pragma unroll
    for (int i = 0; i < 16; ++i) q[i / 8][i / 4 % 2][i % 4] = 0.0f;
    if constexpr (kPlain) {
      const char* row = keys + 2 * (lane() % 4) * Stage::kKeyPitch;
#pragma unroll 2
      for (int d = 0; d < params_.head_size; ++d) {
        const float x[2] = {query_row_[0][d], query_row_[1][d]};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float k = reinterpret_cast<const float*>(row + (8 * n + c) * Stage::kKeyPitch)[d];
            q[0][n][c] += x[0] * k;
            q[0][n][2 + c] += x[1] * k;
          }
        }
      }
    } else {
      // Of four matrices: two times 8 positions, each with two times 8 columns.
      const uint32_t row = SharedAddress(keys) + (lane() % 8 + lane() / 16 * 8) * Stage::kKeyPitch +
                           lane() / 8 % 2 * 16;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t k[4];
        LoadMatrices(k, row + 32 * s);
        MultiplyAdd<T>(q[s % 2][0], query_[s], k[0], k[1]);
        MultiplyAdd<T>(q[s % 2][1], query_[s], k[2], k[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) p[n][c] = q[0][n][c] + q[1][n][c];
    }
  }

  // sums[16 rows, kValueSize] += p[16 rows, 16 positions] values
  __device__ void AddValues(const char* values, const float (&p)[2][4]) {
    if constexpr (kPlain) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {  // the lane, of four, that has these positions
          const int source = (lane() & ~3) | owner;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float p0 = __shfl_sync(~0u, p[n][c], source);
            const float p1 = __shfl_sync(~0u, p[n][2 + c], source);
            const float* row = reinterpret_cast<const float*>(values + (8 * n + 2 * owner + c) *
                                                                           Stage::kValuePitch);
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              const float2 pair = *reinterpret_cast<const float2*>(row + 8 * v + 2 * (lane() % 4));
              sums[v][0] += p0 * pair.x;
              sums[v][1] += p0 * pair.y;
              sums[v][2] += p1 * pair.x;
              sums[v][3] += p1 * pair.y;
            }
          }
        }
      }
    } else {
      // Of four matrices: two times 8 positions of 8 columns, then of the next 8.
      const uint32_t row =
          SharedAddress(values) + lane() % 16 * Stage::kValuePitch + lane() / 16 * 16;
      const uint32_t a[4] = {Pack<T>(p[0][0], p[0][1]), Pack<T>(p[0][2], p[0][3]),
                             Pack<T>(p[1][0], p[1][1]), Pack<T>(p[1][2], p[1][3])};
#pragma unroll
      for (int v = 0; v < kColumns; v += 2) {
        uint32_t b[4];
        LoadMatricesTransposed(b, row + 16 * v);
        MultiplyAdd<T>(sums[v], a, b[0], b[1]);
        MultiplyAdd<T>(sums[v + 1], a, b[2], b[3]);
      }
    }
  }

  const Params& params_;
  const T* query_row_[2];
  uint32_t query_[kPlain ? 1 : kSteps][4];
};

// Goes through the tiles of the item's part. Adds whether anything that its row needs is wrong.
template <typename T, int kHeadSize, int kValueSize>
__device__ inline WarpRows<T, kHeadSize, kValueSize> AttendPart(const Params& params,
                                                                const Item& item, const Row& row,
                                                                const Team& team, char* memory,
                                                                bool* faulty) {
  const Ring<T, kHeadSize, kValueSize> ring(params, team, memory);
  const int all = item.kind == kWindow ? (row.window_end - row.window_begin + kTile - 1) / kTile
                                       : static_cast<int>(params.plan.tiles[kSelected]);
  const int parts = params.plan.parts[item.kind];
  const int each = params.by_parts_of[item.kind](all), more = all - each * parts;
  const int begin = item.part * each + min(item.part, more);
  const int end = begin + each + (item.part < more ? 1 : 0);

  // Tiles of the ring, and the number of valid positions of each, 8 bits a slot.
  uint32_t valid = 0;
  int next = begin + team.team;
#pragma unroll 1
  for (int slot = 0; slot < params.stages; ++slot, next += team.teams) {
    const auto place = ring.Locate(item, row, next, end);
    ring.Load(place, slot);
    valid |= static_cast<uint32_t>(place.valid) << 8 * slot;
  }
  ring.Clear();
  WarpRows<T, kHeadSize, kValueSize> rows(params, item, team.member * kRowTile);
  *faulty = AnyFault(params, item, row, threadIdx.x, kThreads);

  int slot = 0;
#pragma unroll 1
  for (int tile = begin + team.team; tile < end; tile += team.teams, next += team.teams) {
    const auto place = ring.Locate(item, row, next, end);
    WaitForStage(params.stages);
    team.Sync();
    const int positions = valid >> 8 * slot & 255;
    if (positions > 0) rows.Attend(ring[slot], positions);
    team.Sync();
    ring.Load(place, slot);
    valid = (valid & ~(255u << 8 * slot)) | static_cast<uint32_t>(place.valid) << 8 * slot;
    slot = slot + 1 == params.stages ? 0 : slot + 1;
  }
  WaitForCopies<0>();
  return rows;
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_ATTEND_CUH_
