// Which tiles a thread block processes: its share of the list that compress_attention_plan.h
// describes, item by item. The loading warps and the computing ones walk the same share, each at
// its own pace.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_

#include "cuda/compress_attention_params.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// a / b for counts of tiles, which are below 2^30: a float's quotient is off by less than 2^9, the
// next one by one at most.
__device__ inline int Quotient(int a, int b) {
  const float inverse = Inverse(static_cast<float>(b));
  int quotient = static_cast<int>(static_cast<float>(a) * inverse);
  int rest = a - quotient * b;
  quotient += static_cast<int>(floorf(static_cast<float>(rest) * inverse));
  rest = a - quotient * b;
  return quotient + (rest >= b) - (rest < 0);
}

// A sequence's place in the list.
struct Sequence {
  int b;
  int first_row, owned, count, early;  // as in SequenceRows
  int length;                          // -1 if there is a fault
  int original_length;                 // where blocks are aligned
  int tiles;                           // of one item
  int entries;                         // of one item
  int chunks;                          // of tokens

  __device__ bool is_faulty() const { return length < 0; }
  // Whether it needs its pages; otherwise its one tile only fills in the results.
  __device__ bool loads() const { return length > 0 && count > 0; }
  __device__ int TotalEntries(const Params& params) const {
    return entries * chunks * params.key_value_heads;
  }
  __device__ int Visible(int token) const {
    return static_cast<int>(SequenceRows{first_row, owned, count, early}.Visible(token, length));
  }
  // NumBlocks of compress_attention.h, in 32 bits.
  __device__ int NumBlocks(const Params& params, int token) const {
    if (!params.problem.blocks.aligned) {
      return length > 0 ? params.by_block_positions(length + params.num_blocks_rest) : 0;
    }
    const int tokens = original_length - (params.problem.causal ? count - 1 - token : 0);
    return tokens > 0 ? params.by_select_block_size(tokens - 1) + 1 : 0;
  }
};

// `length` is the sequence's.
__device__ inline Sequence FindSequence(const Params& params, int b, int length) {
  Sequence sequence;
  sequence.b = b;
  if (params.lengths_only) {
    // FindRows of compress_attention.h, in 32 bits.
    sequence.first_row = b * params.tokens;
    sequence.owned = sequence.count = params.tokens;
    sequence.early = sequence.original_length = 0;
    sequence.length = length <= params.capacity ? max(length, -1) : -1;
  } else {
    SequenceRows rows;
    const bool faulty = FindRows(params.problem, params.arrays, b, &rows) != Fault::kNone;
    sequence.first_row = static_cast<int>(rows.first);
    sequence.owned = static_cast<int>(rows.owned);
    sequence.count = static_cast<int>(rows.count);
    sequence.early = static_cast<int>(rows.early);
    sequence.length = faulty ? -1 : length;
    sequence.original_length = params.problem.blocks.aligned ? params.arrays.select_lengths[b] : 0;
  }
  const bool loads = sequence.loads();
  sequence.tiles = loads ? (sequence.length - 1) / kTile + 1 : 1;
  sequence.entries = loads ? static_cast<int>(ItemEntries(sequence.tiles)) : 1;
  sequence.chunks = loads ? ((sequence.count - 1) >> params.tokens_log2) + 1 : 1;
  return sequence;
}

__device__ inline Sequence FindSequence(const Params& params, int b) {
  return FindSequence(params, b, params.arrays.lengths[b]);
}

// The part of one item that lies in one thread block's share: tiles [begin, end) of the item's. The
// item's parts, in the order of their tiles, lie in the regions of as many thread blocks.
struct Part {
  Sequence sequence;
  int head;         // key/value head
  int first_token;  // of the chunk
  int tokens;       // of the chunk
  int begin, end;
  int first_cta;    // whose share has the item's first part
  int first_tiles;  // tiles in that part, at most
  int parts;
  int share;  // entries of the list that each thread block has

  __device__ int Region(int part) const {
    return part == 0 ? first_cta * 2 + 1 : (first_cta + part) * 2;
  }
  __device__ int own_region() const { return blockIdx.x * 2 + (begin == 0 ? 1 : 0); }

  // Whether the item has parts in several shares, and whether this is the last of them. A share
  // holds at most one such last part, and begins with it.
  __device__ bool is_cut() const { return parts > 1; }
  __device__ bool is_last() const { return begin > 0 && end == sequence.tiles; }
  // Whether the thread block writes the item's results.
  __device__ bool finishes() const { return end == sequence.tiles; }
  __device__ int own_number() const { return static_cast<int>(blockIdx.x) - first_cta; }
  __device__ int last_cta() const { return first_cta + parts - 1; }

  // Whether the item is joint, where the plan has joint items.
  __device__ bool IsJoint() const { return is_cut() && tokens == 1; }
  // Tiles [PartBegin(part), PartBegin(part + 1)) of the item are in the part.
  __device__ int PartBegin(int part) const {
    return part == 0 ? 0 : min(first_tiles + (part - 1) * share, sequence.tiles);
  }
  __device__ int PartOf(int tile) const {
    return tile < first_tiles ? 0 : 1 + Quotient(tile - first_tiles, share);
  }

  __device__ int rows(const Params& params) const { return tokens << params.group_log2; }
  __device__ bool is_last_chunk() const { return first_token + tokens >= sequence.count; }
};

// How the list is shared out, and where this thread block's share begins, in shared memory.
struct Share {
  int2 warps[kThreads / 32];  // entries of each warp's sequences, and of their longest item
  Sequence first;             // of the list
  Sequence sequence;          // that holds the first entry of the share
  int index;                  // of the item that holds it, among the sequence's
  int item;                   // that item's first entry in the list
  int entries;                // of each share
  int item_entries;           // if not 0, of each item, instead of ItemEntries
  int begin, end;             // of this share

  // By one thread, when it is known how many entries all shares have, all items if not 0, and the
  // list.
  __device__ void Set(int of_shares, int of_items, int total) {
    entries = of_shares;
    item_entries = of_items;
    begin = min(total, static_cast<int>(blockIdx.x) * entries);
    end = min(total, begin + entries);
  }
};

// The length of the first sequence whose entries this thread counts, if there is one: what a thread
// block does first has to wait for it.
__device__ inline int LoadFirstLength(const Params& params) {
  const int b = static_cast<int>(threadIdx.x) * params.sequences_each;
  return b < params.sequences ? params.arrays.lengths[b] : 0;
}

// By all threads of the block together, `first_length` being LoadFirstLength. Whatever is in shared
// memory before is visible after.
__device__ inline void FindShare(const Params& params, int first_length, Share& share) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sequences = params.sequences;
  const int first = min(sequences, static_cast<int>(threadIdx.x) * params.sequences_each);
  const int last = min(sequences, first + params.sequences_each);
  int own = 0, longest = 0;  // entries of this thread's sequences, and of their longest item
  Sequence sequence;
#pragma unroll 1
  for (int b = first; b < last; ++b) {
    sequence = FindSequence(params, b, b == first ? first_length : params.arrays.lengths[b]);
    own += sequence.TotalEntries(params);
    longest = max(longest, sequence.entries);
    if (b == 0) share.first = sequence;
  }

  const int of_warps = static_cast<int>(__reduce_add_sync(~0u, own));
  longest = static_cast<int>(__reduce_max_sync(~0u, longest));
  if (lane == 0) share.warps[warp] = {of_warps, longest};
  __syncthreads();
  const int2 of_warp = lane < kThreads / 32 ? share.warps[lane] : int2{0, 0};
  const int total = static_cast<int>(__reduce_add_sync(~0u, of_warp.x));
  longest = static_cast<int>(__reduce_max_sync(~0u, of_warp.y));

  // Only if there are plan.items items, all as long as the longest, do they add up to so many
  // tiles. (With the first one's length it would not follow: 2 + 1 + 3 is three times 2.)
  const Plan& plan = params.plan;
  if (params.items_each > 0 && int64_t{plan.items} * longest == total) {
    const int block = static_cast<int>(blockIdx.x);
    int of_item = longest, entries;
    int item;  // the first of the share
    if (plan.items_per_share > 0) {
      entries = plan.items_per_share * of_item;
      item = block * plan.items_per_share;
    } else if (plan.shares_per_item > 0) {
      const int tiles = share.first.tiles;
      const int shares = EqualShares(tiles, plan.equal_parts, plan.shares_per_item);
      entries = Quotient(tiles + shares - 1, shares);
      of_item = shares * entries;
      item = Quotient(block, shares);
    } else {
      entries = max(kMinShare, Quotient(total + plan.ctas - 1, plan.ctas));
      item = Quotient(block * entries, of_item);
    }
    const int b = params.by_items_each(item);
    if (threadIdx.x == 0) share.Set(entries, of_item, of_item * plan.items);
    if (first <= b && b < last) {
      if (last - first > 1) sequence = FindSequence(params, b);
      sequence.entries = of_item;
      share.sequence = sequence;
      share.index = item - b * params.items_each;
      share.item = item * of_item;
    }
  } else {
    int up_to = own;  // entries of this and all earlier threads' sequences
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, up_to, step);
      if (lane >= step) up_to += before;
    }
    up_to += static_cast<int>(__reduce_add_sync(~0u, lane < warp ? of_warp.x : 0));
    const int entries = max(kMinShare, Quotient(total + plan.ctas - 1, plan.ctas));
    const int begin = static_cast<int>(blockIdx.x) * entries;
    if (threadIdx.x == 0) share.Set(entries, 0, total);
    int base = up_to - own;
    if (base <= begin && begin < up_to) {
      if (last - first > 1) sequence = FindSequence(params, first);
#pragma unroll 1
      for (int b = first;;) {
        const int of_sequence = sequence.TotalEntries(params);
        if (begin < base + of_sequence) break;
        base += of_sequence;
        sequence = FindSequence(params, ++b);
      }
      share.sequence = sequence;
      share.index = Quotient(begin - base, sequence.entries);
      share.item = base + share.index * sequence.entries;
    }
  }
  __syncthreads();
}

// Walks this thread block's share.
class WorkList {
 public:
  __device__ WorkList(const Params& params, const Share& share)
      : params_(params),
        share_(share),
        next_(share.begin),
        item_(share.item),
        index_(share.index),
        sequence_(share.sequence) {}

  __device__ int share_entries() const { return share_.entries; }

  // Finds the next part; false at the end of the share.
  __device__ bool Next(Part* part) {
    if (next_ >= share_.end) return false;
#pragma unroll 1
    while (next_ >= item_ + sequence_.tiles) {
      // Only the entries for its end are left, or none.
      item_ += sequence_.entries;
      next_ = item_;
      if (next_ >= share_.end) return false;
      if (++index_ == sequence_.chunks * params_.key_value_heads) {
        index_ = 0;
        sequence_ = FindSequence(params_, sequence_.b + 1);
        if (share_.item_entries > 0) sequence_.entries = share_.item_entries;
      }
    }
    const int item = item_;
    part->sequence = sequence_;
    part->head = sequence_.chunks == 1 ? index_ : Quotient(index_, sequence_.chunks);
    part->first_token = (index_ - part->head * sequence_.chunks) << params_.tokens_log2;
    part->tokens = min(params_.plan.tokens_per_chunk, sequence_.count - part->first_token);
    part->begin = next_ - item;
    part->end = min(sequence_.tiles, share_.end - item);
    part->share = share_.entries;
    part->first_cta = Quotient(item, part->share);
    part->first_tiles = (part->first_cta + 1) * part->share - item;
    part->parts = Quotient(item + sequence_.tiles - 1, part->share) - part->first_cta + 1;
    next_ = item + part->end;
    return true;
  }

 private:
  const Params& params_;
  const Share& share_;
  int next_;
  int item_;   // the first entry of the item
  int index_;  // of the item among the sequence's
  Sequence sequence_;
};

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_
