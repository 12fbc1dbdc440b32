// How one call is laid out on the GPU. Decided from shapes alone, so that it can be decided once,
// when the program is compiled. Free of CUDA.
//
// The work is a list that is cut into equal shares, one for each thread block, whatever the lengths
// of the sequences are. Its words:
//
//   chunk    tokens of one sequence that are served by one reading of its keys and values: as many
//            as kMaxRows rows hold, a row being one query head of one token
//   tile     32 positions of a sequence, of one key/value head
//   item     one sequence, key/value head and chunk: so many tiles
//   entry    a unit of cost in the list: an item has one for each tile, and after these some for
//            the time that finishing it takes (ItemEntries)
//   share    the entries of one thread block
//   part     the tiles of one item that are in one share. An item of several parts is cut
//   region   a place in the workspace for a part's sums until the item's other parts are there,
//            and for the records that shared memory has no room for. A thread block has two: 0
//            for an item that began in an earlier share, 1 for any other
//   record   what a tile leaves behind for the scores of blocks: each row's greatest score so far
//            and, relative to it, block sums: of its exponentials, weighted, for each block that
//            the tile's positions add to, counted from the first of these
//   joint    of a cut item: each part's thread block merges some of its results. Otherwise the one
//            that has the last part merges all of them
//
// An example: items of 24 and 12 tiles, and three thread blocks. The items have 33 and 20 entries,
// 53 in all, so shares have 18. The thread block with the last part of a cut item finishes it.
//
//   item     |------------ 0 ------------------------|--------------- 1 ---------------|
//   entries  | 18 tiles      | 6 tiles  | 9, its end | 3 tiles    | 9 tiles | 8, its end |
//   share    | of block 0    |        of block 1                  |     of block 2       |
//   part     | first         | last     |            | first      | last    |
//   region   | 1 of block 0  | 0 of 1   |            | 1 of 1     | 0 of 2  |

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_PLAN_H_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "compress_attention.h"
#include "rounding.h"

namespace jax_nsa::cuda::compressed {

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
// the device is known. An H100 has 132 of them, a B200 148; of a larger GPU the rest stays idle.
constexpr int kMaxCtas = 160;
// Splitting a sequence more finely than this, or into more parts of equal size, costs more in the
// merge than it saves; but more parts of so many tiles each are worth it.
constexpr int kMinShare = 8, kMaxParts = 16, kLongShare = 64;
// The thread blocks of a joint item wait for each other once more, and then share the work of its
// end, so that it may have as many parts as there are thread blocks. With so many blocks to rank
// that is worth it.
constexpr int kJointBlocks = 1024;
// Blocks whose importances, and chosen blocks whose order, shared memory holds; more of them go
// through the workspace.
constexpr int kSharedBlocks = 2048 + 256;
constexpr int kSharedChosen = 1024;

// Warps that share a tile's positions and each take 16 of its rows: a power of two, so that it
// divides kConsumers. The other warps take other tiles.
JAX_NSA_HOST_DEVICE constexpr int RowGroups(int rows) {
  return rows <= 16 ? 1 : rows <= 32 ? 2 : rows <= 64 ? 4 : 8;
}

// Shares are equal and follow each other in the list, so that a share has parts of two cut items at
// most, its first and its last. A cut item costs a merge: if all `items` items are equally long, a
// share is a whole number of items, or an item a whole number of shares, unless that leaves more
// than a tenth of the thread blocks idle.
struct Plan {
  int32_t ctas;              // thread blocks
  int32_t items;             // that the call can have at most
  int32_t items_per_share;   // whole items in a share, where all are equally long; or 0
  int32_t shares_per_item;   // whole shares in an item, at most, where all are equally long; or 0
  int32_t equal_parts;       // parts of an item whose shares are shorter than kLongShare, at most
  bool joint;                // whether cut items of one token are joint
  int32_t tokens_per_chunk;  // at most
  int32_t rows;              // of a chunk, padded, at most
  int32_t record_floats;     // of a record, at most
  int32_t block_sums;        // of a record's row, at most
  int32_t region_tiles;      // of a part, at most
  int32_t whole_tiles;       // of the longest item that is not cut, or 0 if all may be

  // The workspace has two flags for each region, then each region's merged sums, each region's
  // records, and for each thread block its lists for the selection.
  int64_t part_floats;    // of a region's merged sums: attention [rows, value_size], maxima, sums
  int64_t region_floats;  // of a region's records
  int64_t importances;    // of a thread block's blocks, unless shared memory has room for all
  int64_t sorted;         // of a thread block's chosen blocks, likewise
  int64_t parts_offset;   // in bytes, like the next three
  int64_t tiles_offset;
  int64_t selection_offset;
  int64_t bytes;
};

// The most blocks that a tile's positions can add to. They are those whose last position is one of
// the tile's or one of the num_taps() - 1 after it: of so many positions in a row, every M-th one.
constexpr int BlockSums(const Blocks& blocks) {
  const int64_t m = blocks.strides_per_select_block();
  return static_cast<int>((kTile - 1 + blocks.num_taps() - 1) / m + 1);
}

constexpr int64_t AlignUp(int64_t bytes) { return RoundUp(bytes, 256); }

// How many rows a record has for an item of so many rows, and how many floats: the maxima [rows]
// and the sums [block_sums, rows]. In shared memory a gap lies between records, so that they begin
// in different banks.
JAX_NSA_HOST_DEVICE constexpr int RecordRows(int rows) { return (rows + 3) / 4 * 4; }
JAX_NSA_HOST_DEVICE constexpr int RecordFloats(int rows, int block_sums) {
  return RecordRows(rows) * (1 + block_sums);
}
constexpr int kRecordGap = 4;

// The records of an item that is in several parts are read in batches of one token's rows, of so
// many tiles at most. Copies are of 16 bytes: with fewer than 4 rows, a batch has their neighbours
// too.
constexpr int kMaxBatchTiles = 128;
JAX_NSA_HOST_DEVICE constexpr int BatchRows(int group) { return group > 4 ? group : 4; }
JAX_NSA_HOST_DEVICE constexpr int BatchTileFloats(int group, int block_sums) {
  return RecordFloats(BatchRows(group), block_sums) + kRecordGap;
}

// Entries of the list for an item of so many tiles: its tiles and, for the work at its end, some
// more that stand for as much time.
JAX_NSA_HOST_DEVICE constexpr int64_t ItemEntries(int64_t tiles) { return tiles + tiles / 12 + 7; }

// Shares, `most` at most, that an item of so many tiles is cut into where all are equally long,
// with a plan's equal_parts.
JAX_NSA_HOST_DEVICE constexpr int EqualShares(int tiles, int equal_parts, int most) {
  const int few = tiles / kMinShare < equal_parts ? tiles / kMinShare : equal_parts;
  const int shares = few > tiles / kLongShare ? few : tiles / kLongShare;
  return shares < 1 ? 1 : shares < most ? shares : most;
}
// Tiles that such a share has at most, of an item of `tiles` at most.
constexpr int64_t MostInEqualShare(int64_t tiles, int64_t equal_parts, int64_t most) {
  const int64_t between =
      most > equal_parts ? kLongShare + kLongShare / equal_parts : 2 * kMinShare;
  return std::min(tiles, std::max(CeilDiv(tiles, most), between));
}

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
  plan.block_sums = BlockSums(problem.blocks);
  plan.record_floats = RecordFloats(rows, plan.block_sums);

  const int64_t tiles = CeilDiv(problem.capacity(), kTile);
  const int64_t total = MaxEntries(problem);
  // An equal share of what there can be at most, and never less than kMinShare.
  const int64_t share = total > int64_t{ctas} * kMinShare ? CeilDiv(total, ctas) : kMinShare;
  plan.ctas = static_cast<int32_t>(CeilDiv(total, share));
  // Nine tenths of the thread blocks keep memory as busy as all.
  const int64_t items = MaxItems(problem), enough = 9;  // tenths
  plan.items = static_cast<int32_t>(items);
  plan.joint = 2 * items <= plan.ctas && problem.rows <= problem.sequences &&
               problem.max_blocks() > kJointBlocks;
  plan.equal_parts = plan.joint ? kMaxCtas : kMaxParts;
  if (items > plan.ctas) {
    const int64_t per_share = CeilDiv(items, plan.ctas);
    if (10 * items >= enough * per_share * plan.ctas) {
      plan.items_per_share = static_cast<int32_t>(per_share);
    }
  } else {
    const int64_t per_item = plan.ctas / items;
    if (10 * items * per_item >= enough * plan.ctas) {
      const int64_t most = std::max<int64_t>(plan.equal_parts, tiles / kLongShare);
      plan.shares_per_item = static_cast<int32_t>(std::min(per_item, most));
    }
  }
  const int64_t in_equal_share = std::min(tiles, share);
  const int64_t in_item_share =
      plan.shares_per_item == 0 ? 0
                                : MostInEqualShare(tiles, plan.equal_parts, plan.shares_per_item);
  plan.region_tiles = static_cast<int32_t>(std::max(in_equal_share, in_item_share));
  const bool some_whole =
      plan.shares_per_item == 1 || (plan.shares_per_item == 0 && tiles <= share);
  plan.whole_tiles = static_cast<int32_t>(some_whole ? tiles : 0);

  plan.part_floats = plan.rows * (CeilDiv(problem.value_size, 4) * 4 + 2);
  plan.region_floats = int64_t{plan.region_tiles} * plan.record_floats;
  plan.importances =
      plan.joint || problem.max_blocks() > kSharedBlocks ? CeilDiv(problem.max_blocks(), 4) * 4 : 0;
  // The candidates of a selection are at most as many as the power of two that sorting pads to.
  const int64_t most =
      problem.select_count < problem.max_blocks() ? problem.select_count : problem.max_blocks();
  plan.sorted = 0;
  if (most > kSharedChosen) {
    for (plan.sorted = kSharedChosen; plan.sorted < most;) plan.sorted *= 2;
  }
  plan.parts_offset = AlignUp(2 * 2 * 8 * plan.ctas);
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

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_PLAN_H_
