// How warps go through the tiles of a part: each warp of a team attends with its 16 rows to the
// tiles that the team brings.

#ifndef JAX_NSA_CUDA_SELECT_ATTEND_CUH_
#define JAX_NSA_CUDA_SELECT_ATTEND_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/select_item.cuh"
#include "cuda/select_params.cuh"
#include "cuda/select_ring.cuh"

namespace jax_nsa::cuda::select {

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
      if (params_.value_size <= 16) {
        // Over few columns the errors of rounded p do not average out: adds what it was rounded by.
        const auto rest = [](uint32_t pair, float low, float high) {
          uint16_t halves[2] = {static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
          return Pack<T>(low - static_cast<float>(reinterpret_cast<const T&>(halves[0])),
                         high - static_cast<float>(reinterpret_cast<const T&>(halves[1])));
        };
        const uint32_t rests[4] = {rest(a[0], p[0][0], p[0][1]), rest(a[1], p[0][2], p[0][3]),
                                   rest(a[2], p[1][0], p[1][1]), rest(a[3], p[1][2], p[1][3])};
        uint32_t b[4];
        LoadMatricesTransposed(b, row);
        MultiplyAdd<T>(sums[0], rests, b[0], b[1]);
        MultiplyAdd<T>(sums[1], rests, b[2], b[3]);
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
