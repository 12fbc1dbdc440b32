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
  int block = static_cast<int>(blockIdx.x);
  if (params.early) {
    // All windows come first: they need no chosen blocks.
    const int windows = static_cast<int>(params.plan.items) * params.plan.parts[kWindow];
    item.kind = block < windows ? kWindow : kSelected;
    if (block >= windows) block -= windows;
  }
  const int rest = params.by_head_items(block);
  const int head_item = block - rest * params.head_items;
  if (params.early) {
    item.row = params.by_parts_of[item.kind](rest);
    item.part = rest - item.row * params.plan.parts[item.kind];
  } else {
    item.row = params.by_parts(rest);
    const int part = rest - item.row * params.plan.all_parts();
    const int selected = params.plan.parts[kSelected];
    item.kind = part < selected ? kSelected : kWindow;
    item.part = part < selected ? part : part - selected;
  }
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
  if (fault != Fault::kNone) {
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

// Where a tile's positions lie: from position `source` of the pools on. Those in [begin, end)
// count. A tile never straddles pages.
struct Tile {
  int source;
  int begin, end;
};

// A chosen block's id, for a tile of the selected attention below `end`; else any number.
__device__ inline int LoadId(const Params& params, const Item& item, int tile, int end) {
  if (item.kind == kWindow || tile >= end) return -1;
  return Ids(params, item)[params.by_block_tiles(tile)];
}

__device__ inline Tile FindTile(const Params& params, const Item& item, const Row& row, int tile,
                                int end, int id) {
  Tile found = {0, 0, 0};
  if (tile >= end) return found;
  int first;
  if (item.kind == kWindow) {
    first = (row.window_begin & -kTile) + tile * kTile;
    found.begin = max(0, row.window_begin - first);
  } else {
    if (id < 0 || id >= row.blocks) return found;
    const int within = tile - params.by_block_tiles(tile) * params.block_tiles;
    first = id * params.block_size + within * kTile;
  }
  const int column = params.by_page_size(first);
  if (first >= row.limit) return found;
  const int page = Table(params, row)[column];
  if (!IsPage(params.problem, page)) return {0, 0, 0};
  found.source = (page - column) * params.page_size + first;
  found.end = min(kTile, row.limit - first);
  return found;
}

// Whether an id of the item's row and head, or of a page that these need, is wrong: then both
// attentions are NaN, whichever of them needs it. Each thread looks at some, first at those that it
// has loaded ahead of time: an id before it is known what the row sees, its page thereafter.
class Faults {
 public:
  __device__ Faults(const Params& params, const Item& item)
      : params_(params), item_(item), pages_(params.select_count * params.pages_each) {}

  __device__ void LoadIds() {
    if (own() < pages_) id_ = IdOf(own());
  }

  __device__ void LoadPages(const Row& row) {
    if (own() < pages_) page_ = PageOf(row, own(), id_);
    window_page_ = WindowPage(row, 0);
  }

  // Whether this thread has found any.
  __device__ bool Any(const Row& row) const {
    bool faulty = !IsPage(params_.problem, page_) || !IsPage(params_.problem, window_page_);
#pragma unroll 1
    for (int i = own() + kThreads; i < pages_; i += kThreads) {
      faulty |= !IsPage(params_.problem, PageOf(row, i, IdOf(i)));
    }
#pragma unroll 1
    for (int i = kThreads; i * params_.page_size < row.window_end - row.window_begin;
         i += kThreads) {
      faulty |= !IsPage(params_.problem, WindowPage(row, i));
    }
    return faulty;
  }

 private:
  static constexpr int kSound = 0, kFaulty = -1;  // for a page's id
  __device__ static int own() { return threadIdx.x; }

  // Of page i of all that the chosen blocks lie in.
  __device__ int IdOf(int i) const { return Ids(params_, item_)[params_.by_pages_each(i)]; }
  __device__ int PageOf(const Row& row, int i, int id) const {
    if (id < 0 || id >= row.blocks) return params_.problem.partial || id == -1 ? kSound : kFaulty;
    const int first = id * params_.block_size, end = min(first + params_.block_size, row.limit);
    const int column =
        params_.by_page_size(first) + (i - params_.by_pages_each(i) * params_.pages_each);
    if (first >= end || column * params_.page_size >= end) return kSound;
    return Table(params_, row)[column];
  }
  // Of this thread's page of the window, `further` pages on.
  __device__ int WindowPage(const Row& row, int further) const {
    const int column = params_.by_page_size(row.window_begin) + own() + further;
    const bool needed =
        row.window_begin < row.window_end && column * params_.page_size < row.window_end;
    return needed ? Table(params_, row)[column] : kSound;
  }

  const Params& params_;
  const Item& item_;
  const int pages_;
  int id_ = -1;
  int page_ = kSound, window_page_ = kSound;
};

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_ITEM_CUH_
