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
  __device__ WarpRows(const Params& params, const Item& item, int first_row,
                      const Queries<T, kHeadSize>& queries)
      : params_(params) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (float& sum : sums[n]) sum = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maxima[r] = -INFINITY;
      totals[r] = 0.0f;
    }
    if constexpr (kPlain) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row that doesn't exist is any that does; its results are not used.
        const int row = min(first_row + lane() / 4 + 8 * r, params.plan.rows - 1);
        const int64_t query = int64_t{item.row} * params.heads + item.first_head + row;
        query_[r] = static_cast<const T*>(params.arrays.query) + query * params.head_size;
      }
    } else {
      // Of four matrices: two times 8 rows, then of the next 8 columns.
      query_ = SharedAddress(queries.memory) + (first_row + lane() % 16) * queries.kPitch +
               lane() / 16 * 16;
    }
  }

  // Adds positions [begin, end) of a tile.
  __device__ void Attend(const Stage& stage, int begin, int end) {
    float p[2][4];  // scores, then their exponentials
    Scores(stage.keys(), p);
    const float scale = params_.scale_log2;
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = 8 * n + 2 * (lane() % 4) + c % 2;
        p[n][c] = position >= begin && position < end ? p[n][c] * scale : -INFINITY;
        peak[c / 2] = fmaxf(peak[c / 2], p[n][c]);
      }
    }
    float shrink[2];
    bool rescales = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 2));
      const float before = maxima[r];
      maxima[r] = fmaxf(before, peak[r]);
      peak[r] = maxima[r] == -INFINITY ? 0.0f : maxima[r];
      shrink[r] = Exp2(before - peak[r]);
      totals[r] *= shrink[r];
      rescales |= shrink[r] != 1.0f && before != -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[n][c] = Exp2(p[n][c] - peak[c / 2]);
        totals[c / 2] += p[n][c];
      }
    }
    // The maxima settle after a few tiles; before the first one there is nothing to rescale.
    if (__any_sync(~0u, rescales)) {
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

  // p[16 rows, 16 positions] = query keys^T
  __device__ void Scores(const char* keys, float (&p)[2][4]) {
    float q[2][2][4];  // sums over even and over odd steps, so that fewer wait for one another
#pragma unroll
    for (int i = 0; i < 16; ++i) q[i / 8][i / 4 % 2][i % 4] = 0.0f;
    if constexpr (kPlain) {
      const char* row = keys + 2 * (lane() % 4) * Stage::kKeyPitch;
#pragma unroll 2
      for (int d = 0; d < params_.head_size; ++d) {
        const float x[2] = {query_[0][d], query_[1][d]};
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
        uint32_t a[4], k[4];
        LoadMatrices(a, query_ + 32 * s);
        LoadMatrices(k, row + 32 * s);
        MultiplyAdd<T>(q[s % 2][0], a, k[0], k[1]);
        MultiplyAdd<T>(q[s % 2][1], a, k[2], k[3]);
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
  // This lane's rows, or its place in the matrices.
  std::conditional_t<kPlain, const T* [2], uint32_t> query_;
};

// A team's tiles of a part: number i is tile first + i * step of the attention. Lane n of each warp
// finds the n-th of 32 of them ahead of time.
class TeamTiles {
 public:
  __device__ TeamTiles(const Params& params, const Item& item, const Team& team)
      : params_(params), item_(item), step_(team.teams), offset_(team.team) {
    if (item.kind == kSelected) {
      SetRange(static_cast<int>(params.plan.tiles[kSelected]));
      id_ = LoadId(params, item, OwnTile(0), end_);
    }
  }

  // When it is known what the row sees.
  __device__ void Find(const Row& row) {
    if (item_.kind == kWindow) {
      const int first = row.window_begin & -kTile;
      SetRange(row.window_begin < row.window_end ? (row.window_end - first - 1) / kTile + 1 : 0);
    }
    own_ = FindTile(params_, item_, row, OwnTile(0), end_, id_);
  }
  __device__ int count() const { return max(0, (end_ - first_ + step_ - 1) / step_); }

  // Number i, of those that come in turn.
  __device__ Tile Get(const Row& row, int i) {
    if (i % 32 == 0 && i > 0) {
      const int tile = OwnTile(i);
      own_ = FindTile(params_, item_, row, tile, end_, LoadId(params_, item_, tile, end_));
    }
    return {__shfl_sync(~0u, own_.source, i % 32), __shfl_sync(~0u, own_.begin, i % 32),
            __shfl_sync(~0u, own_.end, i % 32)};
  }

 private:
  __device__ int OwnTile(int i) const {
    return first_ + (i + static_cast<int>(threadIdx.x % 32)) * step_;
  }
  // The part of so many tiles.
  __device__ void SetRange(int tiles) {
    const int parts = params_.plan.parts[item_.kind];
    const int each = params_.by_parts_of[item_.kind](tiles), more = tiles - each * parts;
    const int begin = item_.part * each + min(item_.part, more);
    end_ = begin + each + (item_.part < more ? 1 : 0);
    first_ = begin + offset_;
  }

  const Params& params_;
  const Item& item_;
  const int step_, offset_;
  int first_ = 0, end_ = 0;
  int id_ = -1;
  Tile own_ = {0, 0, 0};
};

// Goes through the tiles of a part. Tells, too, whether anything that the row needs is wrong.
template <typename T, int kHeadSize, int kValueSize>
__device__ inline WarpRows<T, kHeadSize, kValueSize> AttendPart(
    const Params& params, const Item& item, const Row& row, const Team& team, TeamTiles& tiles,
    Faults& faults, const Queries<T, kHeadSize>& queries, char* memory, bool* faulty) {
  const Ring<T, kHeadSize, kValueSize> ring(params, team, memory);
  const int stages = params.stages;
  tiles.Find(row);
  faults.LoadPages(row);
  // Of each tile in the ring, which positions count: 8 bits for the begin and 8 for the end.
  uint64_t ranges = 0;
  int next = 0;
#pragma unroll 1
  for (; next < stages; ++next) {
    const Tile tile = tiles.Get(row, next);
    ring.Load(tile, next);
    ranges |= static_cast<uint64_t>(tile.begin | tile.end << 8) << 16 * next;
  }
  queries.Load(params, item);
  ring.Clear();
  *faulty = faults.Any(row);
  WarpRows<T, kHeadSize, kValueSize> rows(params, item, team.member * kRowTile, queries);
  WaitForCopies<0>();
  __syncthreads();  // the queries are there

  int slot = 0;
#pragma unroll 1
  for (int left = tiles.count(); left > 0; --left, ++next) {
    WaitForAllBut(stages - 1);
    team.Sync();
    const int range = static_cast<int>(ranges >> 16 * slot & 0xffff);
    if (range != 0) rows.Attend(ring[slot], range & 255, range >> 8);
    team.Sync();
    const Tile tile = tiles.Get(row, next);
    ring.Load(tile, slot);
    ranges = (ranges & ~(uint64_t{0xffff} << 16 * slot)) |
             static_cast<uint64_t>(tile.begin | tile.end << 8) << 16 * slot;
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  WaitForCopies<0>();
  return rows;
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_ATTEND_CUH_
