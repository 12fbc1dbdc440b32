// How warps go through the tiles of a part: each warp of a team attends with its 16 rows to the
// tiles that the team brings.

#ifndef JAX_NSA_CUDA_SELECT_ATTEND_CUH_
#define JAX_NSA_CUDA_SELECT_ATTEND_CUH_

#include <type_traits>

#include "cuda/attend.cuh"
#include "cuda/select_item.cuh"
#include "cuda/select_params.cuh"
#include "cuda/select_ptx.cuh"
#include "cuda/select_ring.cuh"

namespace jax_nsa::cuda::select {

// One warp's 16 rows (attend.cuh).
template <typename T, int kHeadSize, int kValueSize>
class WarpRows : public AttendedRows<Stage<T, kTile, kHeadSize, kValueSize>> {
 public:
  static constexpr bool kPlain = std::is_same_v<T, float>;
  using Stage = cuda::Stage<T, kTile, kHeadSize, kValueSize>;

  // `first_row` of the item's.
  __device__ WarpRows(const Params& params, const Item& item, int first_row,
                      const Queries<T, kHeadSize>& queries)
      : params_(params) {
    const int lane = threadIdx.x % 32;
    if constexpr (kPlain) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row that doesn't exist is any that does; its results are not used.
        const int row = min(first_row + lane / 4 + 8 * r, params.plan.rows - 1);
        const int64_t query = int64_t{item.row} * params.heads + item.first_head + row;
        query_[r] = static_cast<const T*>(params.arrays.query) + query * params.head_size;
      }
    } else {
      // Of four matrices: two times 8 rows, then of the next 8 columns.
      query_ = SharedAddress(queries.memory) + first_row / kRowTile * queries.kTileBytes +
               QueryRows::Place(lane % 16, lane / 16);
    }
  }

  // Adds positions [begin, end) of a tile.
  __device__ void Attend(const Stage& stage, int begin, int end) {
    float p[2][4];  // scores, then their exponentials
    if constexpr (kPlain) {
      PlainScores<Stage>(stage.keys(), query_, params_.head_size, p);
    } else {
      const auto query = [&](int s, uint32_t (&a)[4]) {
        LoadMatrices(a, QueryRows::After(query_, 2 * s));
      };
      Scores<Stage>(stage.keys(), query, p);
    }
    this->Exponentiate(p, params_.scale_log2,
                       [&](int, int position) { return position >= begin && position < end; });
    this->AddValues(stage.values(), p, begin, end, params_.value_size);
  }

 private:
  using QueryRows = typename Queries<T, kHeadSize>::Rows;

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

// Goes through the tiles of a part. Tells, too, whether anything that the row needs is wrong; with
// `ids_later` it looks at chosen blocks at the end, when the kernel that chooses them is through.
template <typename T, int kHeadSize, int kValueSize>
__device__ inline WarpRows<T, kHeadSize, kValueSize> AttendPart(
    const Params& params, const Item& item, const Row& row, const Team& team, TeamTiles& tiles,
    Faults& faults, bool ids_later, const Queries<T, kHeadSize>& queries, char* memory,
    uint64_t* full, bool* faulty) {
  Ring<T, kHeadSize, kValueSize> ring(params, item, team, memory, full);
  const int stages = params.stages;
  tiles.Find(row);
  if (!ids_later) faults.LoadPages(row);
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
  if (!ids_later) *faulty = faults.Any(row);
  WarpRows<T, kHeadSize, kValueSize> rows(params, item, team.member * kRowTile, queries);
  WaitForCopies<0>();
  __syncthreads();  // the queries are there

  int stage = 0;
#pragma unroll 1
  for (int left = tiles.count(); left > 0; --left, ++next) {
    const int range = static_cast<int>(ranges >> 16 * stage & 0xffff);
    ring.Await(stage, range != 0);
    if (range != 0) rows.Attend(ring[stage], range & 255, range >> 8);
    team.Sync();
    const Tile tile = tiles.Get(row, next);
    ring.Load(tile, stage);
    ranges = (ranges & ~(uint64_t{0xffff} << 16 * stage)) |
             static_cast<uint64_t>(tile.begin | tile.end << 8) << 16 * stage;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  WaitForCopies<0>();
  if (ids_later) {
    AwaitKernelBefore();
    faults.LoadIds();
    faults.LoadPages(row);
    *faulty = faults.Any(row);
  }
  return rows;
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_ATTEND_CUH_
