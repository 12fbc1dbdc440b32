// Which item a thread block works on, where its positions lie, and whether anything is wrong.

#ifndef JAX_NSA_CUDA_SELECT_ITEM_CUH_
#define JAX_NSA_CUDA_SELECT_ITEM_CUH_

#include "cuda/ptx.cuh"
#include "cuda/select_params.cuh"

namespace jax_nsa::cuda::select {

// The item of a thread block, and its part of it.
struct Item {
  int row;         // of query
  int head;        // key/value head
  int first_head;  // query head
  int kind;        // of attention
  int part;        // of that attention
  int64_t index;   // of the item
};

__device__ inline Item FindItem(const Params& params) {
  Item item;
  const int block = static_cast<int>(blockIdx.x);
  const int rest = params.by_head_items(block);
  const int head_item = block - rest * params.head_items;
  item.row = params.by_parts(rest);
  const int part = rest - item.row * params.plan.all_parts();
  const int selected = params.plan.parts[kSelected];
  item.kind = part < selected ? kSelected : kWindow;
  item.part = part < selected ? part : part - selected;
  item.head = params.by_chunks(head_item);
  item.first_head =
      item.head * params.group + (head_item - item.head * params.plan.chunks) * params.plan.rows;
  item.index = int64_t{item.row} * params.head_items + head_item;
  return item;
}

// The sequence that owns a row of packed ones: the last that begins at or before it, or -1. A warp
// looks at 32 of them at a time.
__device__ inline int FindPackedSequence(const Params& params, int row) {
  const int lane = threadIdx.x % 32;
  int first = 0, count = static_cast<int>(params.problem.sequences);
#pragma unroll 1
  while (true) {
    const int step = (count - 1) / 32 + 1;
    const int own = lane * step;
    const bool begins = own < count && params.arrays.first_rows[first + own] <= row;
    const int before = static_cast<int>(__reduce_add_sync(~0u, begins ? 1u : 0u));
    if (before == 0) return -1;
    first += (before - 1) * step;
    count = min(step, count - (before - 1) * step);
    if (step == 1) return first;
  }
}

// What a row sees.
struct Row {
  enum State {
    kSound,
    kAbsent,  // no token: attention to nothing
    kFaulty   // of a sequence whose length or count of tokens is wrong
  };
  State state;
  int sequence;
  int limit;                     // positions [0, limit) are before it, and here
  int window_begin, window_end;  // its window, as far as it is here
  int blocks;                    // ids must be below, unless partial
};

__device__ inline Row FindRow(const Params& params, int row) {
  const Problem& problem = params.problem;
  Row found = {};
  const bool packed = params.arrays.first_rows != nullptr;
  found.sequence = packed ? FindPackedSequence(params, row) : params.by_tokens(row);
  found.state = Row::kAbsent;
  if (found.sequence < 0) return found;
  SequenceRows rows;
  const int length = params.arrays.lengths[found.sequence];
  const Fault fault = FindRows(problem, params.arrays, found.sequence, &rows);
  const int64_t token = row - rows.first;
  if (token < 0 || token >= rows.owned) return found;
  if (fault != Fault::kNone || (!problem.partial && !IsLength(problem, length))) {
    found.state = Row::kFaulty;
    return found;
  }
  if (token >= rows.count) return found;
  found.state = Row::kSound;
  const int64_t limit = length - (rows.count - 1 - token);
  const auto here = [&](int64_t position) {
    return static_cast<int>(
        position < 0 ? 0 : (position < params.capacity ? position : params.capacity));
  };
  found.limit = here(limit);
  found.window_begin = here(limit - problem.window_size);
  found.window_end = found.limit;
  found.blocks = params.max_blocks;
  if (!problem.partial && length < params.capacity) {
    found.blocks = length == 0 ? 0 : params.by_block_tiles((length - 1) / kTile) + 1;
  }
  return found;
}

__device__ inline const int32_t* Ids(const Params& params, const Item& item) {
  return params.arrays.topk_indices +
         (int64_t{item.row} * params.key_value_heads + item.head) * params.select_count;
}
__device__ inline const int32_t* Table(const Params& params, const Row& row) {
  return params.arrays.block_table + int64_t{row.sequence} * params.pages_per_sequence;
}

// Positions [first, first + valid) of one tile of the item's attention.
struct Tile {
  int first, valid;
};

__device__ inline Tile FindTile(const Params& params, const Item& item, const Row& row, int tile) {
  int first, end;
  if (item.kind == kWindow) {
    first = row.window_begin + tile * kTile;
    end = row.window_end;
  } else {
    const int place = params.by_block_tiles(tile);
    const int id = Ids(params, item)[place];
    if (id < 0 || id >= row.blocks) return {0, 0};
    first = id * params.block_size + (tile - place * params.block_tiles) * kTile;
    end = row.limit;
  }
  return {first, max(0, min(kTile, end - first))};
}

// Whether an id of the item's row and head, or of a page that these need, is wrong: then both
// attentions are NaN, whichever of them needs it. Each of `threads` threads looks at some.
__device__ inline bool AnyFault(const Params& params, const Item& item, const Row& row, int thread,
                                int threads) {
  const int32_t* table = Table(params, row);
  bool faulty = false;
  if (params.arrays.topk_indices != nullptr) {
    const int32_t* ids = Ids(params, item);
    const int pages = params.select_count * params.pages_each;
#pragma unroll 1
    for (int i = thread; i < pages; i += threads) {
      const int place = params.by_pages_each(i);
      const int id = ids[place];
      if (id < 0 || id >= row.blocks) {
        faulty |= !params.problem.partial && id != -1;
        continue;
      }
      const int first = id * params.block_size, end = min(first + params.block_size, row.limit);
      if (first >= end) continue;
      const int column = params.by_page_size(first) + i - place * params.pages_each;
      if (column * params.page_size < end) faulty |= !IsPage(params.problem, table[column]);
    }
  }
  if (row.window_begin == row.window_end) return faulty;
  const int end = params.by_page_size(row.window_end + params.page_size - 1);
#pragma unroll 1
  for (int column = params.by_page_size(row.window_begin) + thread; column < end;
       column += threads) {
    faulty |= !IsPage(params.problem, table[column]);
  }
  return faulty;
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_ITEM_CUH_
