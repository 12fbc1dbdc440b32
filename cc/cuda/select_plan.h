// How one call of the selected branch is laid out on the GPU: items, parts and the workspace.
// Decided from shapes alone, so that it can be decided once, when the program is compiled, and is
// the same on every device. Free of CUDA.

#ifndef JAX_NSA_CUDA_SELECT_PLAN_H_
#define JAX_NSA_CUDA_SELECT_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "rounding.h"
#include "select_attention.h"

namespace jax_nsa::cuda::select {

using select_attention::Arrays;
using select_attention::Problem;

// Positions that a warp, or several with different heads, process at a time.
constexpr int kTile = 16;
// Rows of one matrix instruction: query heads.
constexpr int kRowTile = 16;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
// Heads that a thread block processes against one reading of keys and values.
constexpr int kMaxRows = kRowTile * kWarps;

// The two attentions of a call, as indices.
constexpr int kSelected = 0, kWindow = 1, kKinds = 2;

// Parts of one attention, at most: a lane for each when they are merged.
constexpr int kMaxParts = 32;
// Thread blocks that keep a big GPU busy: an H100's 132 multiprocessors run kResident at the same
// time if two share one; others run right, if not as fast as they could. Parts are made no smaller
// than it takes to have so many, as it costs time to merge them; nor larger than kMaxPartTiles
// unless there would be too many of them, so that the last thread blocks don't end long after the
// others.
constexpr int64_t kResident = 264, kEnough = 240;
constexpr int64_t kMinPartTiles = 8, kMaxPartTiles = 64;

constexpr int64_t AlignUp(int64_t bytes) { return RoundUp(bytes, 256); }

// Each token's query heads that share a key/value head, up to kMaxRows of them, are an item. Both
// its attentions go over a list of tiles, and each list is cut into parts of equal size, one for
// each thread block. Whichever thread block sees that all parts of an attention are there merges
// them; an attention of one part goes straight to the results.
struct Plan {
  int32_t rows;           // query heads of an item
  int32_t chunks;         // items of one token and key/value head
  int64_t items;          // in all
  int64_t tiles[kKinds];  // of an item, at most
  int32_t parts[kKinds];  // of an item; 0 where the attention is not wanted
  bool merged;            // whether parts go through the workspace

  // The workspace: a flag for each part, then the parts. Part p of an item has index
  // item * all_parts() + p, the window's after the selected ones.
  int64_t part_floats;  // sums [rows, value_columns], maxima and totals [rows]
  int64_t parts_offset, bytes;

  constexpr int all_parts() const { return parts[kSelected] + parts[kWindow]; }
};

// Columns of a part's sums.
constexpr int64_t ValueColumns(const Problem& problem) {
  return CeilDiv(problem.value_size, 4) * 4;
}

constexpr Plan MakePlan(const Problem& problem) {
  Plan plan = {};
  const int64_t group = problem.group();
  plan.rows = static_cast<int32_t>(group < kMaxRows ? group : kMaxRows);
  plan.chunks = static_cast<int32_t>(group / plan.rows);
  plan.items = problem.rows * problem.key_value_heads * plan.chunks;
  const int64_t window =
      problem.window_size < problem.capacity() ? problem.window_size : problem.capacity();
  plan.tiles[kSelected] = problem.select_count * (problem.select_block_size / kTile);
  plan.tiles[kWindow] = CeilDiv(window, kTile);

  const auto parts = [&](int kind, int64_t part_tiles) {
    const int64_t most = plan.tiles[kind] < kMaxParts ? plan.tiles[kind] : kMaxParts;
    const int64_t wanted = CeilDiv(plan.tiles[kind], part_tiles);
    return wanted < most ? wanted : most;
  };
  int64_t part_tiles = kMinPartTiles;
  while (part_tiles < kMaxPartTiles &&
         plan.items * (parts(kSelected, part_tiles) + parts(kWindow, part_tiles)) > kEnough) {
    ++part_tiles;
  }
  for (int kind = 0; kind < kKinds; ++kind) {
    plan.parts[kind] = static_cast<int32_t>(parts(kind, part_tiles));
  }
  plan.merged = plan.parts[kSelected] > 1 || plan.parts[kWindow] > 1;
  if (plan.merged) {
    plan.part_floats = plan.rows * (ValueColumns(problem) + 2);
    plan.part_floats = CeilDiv(plan.part_floats, 4) * 4;
    const int64_t all = plan.items * plan.all_parts();
    plan.parts_offset = AlignUp(8 * all);
    plan.bytes = plan.parts_offset + 4 * all * plan.part_floats;
  }
  return plan;
}

// Bytes of workspace that suffice on every device; never 0, which no array may have.
inline int64_t WorkspaceBytes(const Problem& problem) {
  return std::max<int64_t>(MakePlan(problem).bytes, 256);
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_PLAN_H_
