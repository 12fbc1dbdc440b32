// How one call is laid out on the GPU: tiles, chunks, thread blocks and the workspace. Decided from
// shapes alone, so that it can be decided once, when the program is compiled. Free of CUDA.

#ifndef JAX_NSA_CUDA_PLAN_H_
#define JAX_NSA_CUDA_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "compress_attention.h"

namespace jax_nsa::cuda {

using compress_attention::Arrays;
using compress_attention::Problem;

// Positions that one stage of the pipeline holds and one warp processes at a time.
constexpr int kTile = 32;
// Rows of one matrix instruction. A row is one query head of one token.
constexpr int kRowTile = 16;
// Warps that compute, and warps that load. A multiprocessor's four schedulers have three each,
// which leaves every thread 168 registers.
constexpr int kConsumers = 8, kLoaders = 4;
constexpr int kComputeThreadsLog2 = 8, kComputeThreads = 1 << kComputeThreadsLog2;
static_assert(kComputeThreads == 32 * kConsumers);
constexpr int kThreads = kComputeThreads + 32 * kLoaders;
// Rows that a thread block processes against one reading of the keys and values.
constexpr int kMaxRows = kRowTile * kConsumers;
static_assert(kMaxRows % kMaxGroup == 0);
// One persistent thread block for each multiprocessor, up to so many: the workspace is sized before
// the device is known.
constexpr int kMaxCtas = 160;
// Splitting a sequence more finely than this, or into more parts of equal size, costs more in the
// merge than it saves.
constexpr int kMinShare = 8, kMaxParts = 16;
// Blocks whose importances, and chosen blocks whose order, shared memory holds; more of them go
// through the workspace.
constexpr int kSharedBlocks = 2048;
constexpr int kSharedChosen = 1024;

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Warps that share a tile's positions and each take 16 of its rows: a power of two, so that it
// divides kConsumers. The other warps take other tiles.
JAX_NSA_HOST_DEVICE constexpr int RowGroups(int rows) {
  return rows <= 16 ? 1 : rows <= 32 ? 2 : rows <= 64 ? 4 : 8;
}

// The work of a call is a flat list of entries: for each sequence, for each key/value head, for
// each chunk of tokens (as many as kMaxRows rows hold) the tiles of the sequence, then some entries
// for the end. Those of one sequence, head and chunk are an item. Each thread block gets an equal,
// contiguous share of the list, whatever the lengths; so it holds at most two items in part, the
// first and the last. Where all items are equally long, shares end where items do, or items where
// shares do, if that leaves enough thread blocks at work: an item in part costs a merge.
struct Plan {
  int32_t ctas;              // thread blocks
  int32_t items;             // at most; for as many equally long ones,
  int32_t items_per_share;   // so many whole ones are a share, if not 0,
  int32_t shares_per_item;   // or an item is so many shares, at most, if not 0
  int32_t tokens_per_chunk;  // at most
  int32_t rows;              // of a chunk, padded, at most
  int32_t record_floats;     // of a tile's record, at most
  int32_t slots;             // blocks that one tile's positions add to, at most
  int32_t region_tiles;      // tiles of one item in one thread block's share, at most
  int32_t whole_tiles;       // of the longest item, if one share can hold it whole

  // The workspace: a flag for each region, the regions' parts, their tiles, and each thread block's
  // lists for the selection. A thread block has two regions: 0 for an item that began in an earlier
  // thread block's share, 1 for any other, one after the other.
  int64_t part_floats;  // of one region: attention [rows, value_size], maxima and sums
  int64_t
      region_floats;     // of one region's tiles: for each maxima [rows], window sums [slots, rows]
  int64_t importances;   // of one thread block: importances beyond shared memory
  int64_t sorted;        // of one thread block: chosen blocks beyond shared memory
  int64_t parts_offset;  // in bytes, like the next three
  int64_t tiles_offset;
  int64_t selection_offset;
  int64_t bytes;
};

// The widest that a tile's positions spread: from block ceil(i / M) - 1 of the first position i to
// block floor((i + kTile - 1 + M + L - 2) / M) - 1.
constexpr int Slots(const Blocks& window) {
  const int64_t m = window.strides_per_select_block();
  return static_cast<int>((kTile - 1 + window.num_taps() - 1) / m + 1);
}

constexpr int64_t AlignUp(int64_t bytes) { return CeilDiv(bytes, 256) * 256; }

// Rows of a tile's record, for so many rows of an item, and its floats: the maxima and the slots'
// sums. In shared memory some more lie between records, so that they begin in different banks.
JAX_NSA_HOST_DEVICE constexpr int RecordRows(int rows) { return (rows + 3) / 4 * 4; }
JAX_NSA_HOST_DEVICE constexpr int RecordFloats(int rows, int slots) {
  return RecordRows(rows) * (1 + slots);
}
constexpr int kRecordGap = 4;

// The records of an item that is in several parts are read in batches, of one token's rows and
// those beside them that share 16 bytes, of so many tiles at most.
constexpr int kMaxBatchTiles = 128;
JAX_NSA_HOST_DEVICE constexpr int BatchRows(int group) { return group > 4 ? group : 4; }
JAX_NSA_HOST_DEVICE constexpr int BatchTileFloats(int group, int slots) {
  return RecordFloats(BatchRows(group), slots) + kRecordGap;
}

// Entries of the list for an item of so many tiles: its tiles and, for the work at its end, some
// more that stand for as much time.
JAX_NSA_HOST_DEVICE constexpr int64_t ItemEntries(int64_t tiles) { return tiles + tiles / 12 + 7; }

// Items that the call can have at most, and entries of the list.
constexpr int64_t MaxItems(const Problem& problem) {
  const int64_t per_chunk = kMaxRows / problem.group();
  const int64_t chunks = problem.tokens ? problem.sequences * CeilDiv(problem.tokens, per_chunk)
                                        : problem.sequences + CeilDiv(problem.rows, per_chunk);
  return chunks * problem.key_value_heads;
}
constexpr int64_t MaxEntries(const Problem& problem) {
  return MaxItems(problem) * ItemEntries(CeilDiv(problem.capacity(), kTile));
}

// The plan for `ctas` thread blocks, at most kMaxCtas.
constexpr Plan MakePlan(const Problem& problem, int ctas) {
  Plan plan = {};
  const int64_t group = problem.group();
  const int64_t per_chunk = kMaxRows / group;
  const int64_t tokens = problem.tokens ? problem.tokens : problem.rows;
  plan.tokens_per_chunk = static_cast<int32_t>(per_chunk);
  const int rows = static_cast<int>((tokens < per_chunk ? tokens : per_chunk) * group);
  plan.rows = kRowTile * RowGroups(rows);
  plan.slots = Slots(problem.blocks);
  plan.record_floats = RecordFloats(rows, plan.slots);

  const int64_t tiles = CeilDiv(problem.capacity(), kTile);
  const int64_t total = MaxEntries(problem);
  // An equal share of what there can be at most, and never less than kMinShare.
  const int64_t share = total > int64_t{ctas} * kMinShare ? CeilDiv(total, ctas) : kMinShare;
  plan.ctas = static_cast<int32_t>(CeilDiv(total, share));
  // Somewhat fewer thread blocks keep memory as busy.
  const int64_t items = MaxItems(problem), enough = 9;  // tenths
  plan.items = static_cast<int32_t>(items);
  if (items > plan.ctas) {
    const int64_t per_share = CeilDiv(items, plan.ctas);
    if (10 * items >= enough * per_share * plan.ctas) {
      plan.items_per_share = static_cast<int32_t>(per_share);
    }
  } else {
    const int64_t per_item = plan.ctas / items;
    if (10 * items * per_item >= enough * plan.ctas) {
      plan.shares_per_item = static_cast<int32_t>(std::min<int64_t>(per_item, kMaxParts));
    }
  }
  const int64_t in_equal_share = std::min(tiles, share);
  // An item that is several shares is shares_per_item of them, or fewer if these would be less than
  // kMinShare each: then each is less than twice that.
  const int64_t in_item_share =
      plan.shares_per_item == 0
          ? 0
          : std::min(tiles, std::max(CeilDiv(tiles, plan.shares_per_item), int64_t{2 * kMinShare}));
  plan.region_tiles = static_cast<int32_t>(std::max(in_equal_share, in_item_share));
  const bool some_whole =
      plan.shares_per_item == 1 || (plan.shares_per_item == 0 && tiles <= share);
  plan.whole_tiles = static_cast<int32_t>(some_whole ? tiles : 0);

  plan.part_floats = plan.rows * (CeilDiv(problem.value_size, 4) * 4 + 2);
  plan.region_floats = int64_t{plan.region_tiles} * plan.record_floats;
  plan.importances =
      problem.max_blocks() > kSharedBlocks ? CeilDiv(problem.max_blocks(), 4) * 4 : 0;
  // The candidates of a selection are at most as many as the power of two that sorting pads to.
  const int64_t most =
      problem.select_count < problem.max_blocks() ? problem.select_count : problem.max_blocks();
  plan.sorted = 0;
  if (most > kSharedChosen) {
    for (plan.sorted = kSharedChosen; plan.sorted < most;) plan.sorted *= 2;
  }
  plan.parts_offset = AlignUp(2 * 8 * plan.ctas);
  plan.tiles_offset = plan.parts_offset + AlignUp(2 * 4 * plan.ctas * plan.part_floats);
  plan.selection_offset = plan.tiles_offset + AlignUp(2 * 4 * plan.ctas * plan.region_floats);
  plan.bytes =
      plan.selection_offset + AlignUp(plan.ctas * (8 * plan.sorted + 4 * plan.importances));
  return plan;
}

// Bytes of workspace that suffice on every device.
inline int64_t WorkspaceBytes(const Problem& problem) {
  // Fewer thread blocks have longer shares: neither end of the range is always the largest.
  int64_t most = 0;
  for (int ctas = 1; ctas <= kMaxCtas; ++ctas) {
    const int64_t bytes = MakePlan(problem, ctas).bytes;
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_PLAN_H_
