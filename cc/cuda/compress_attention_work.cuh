// Which tiles a thread block processes: its share of the list that compress_attention_plan.h
// describes, item by item. The loading warps and the computing ones walk the same share, each at
// its own pace.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_

#include "cuda/compress_attention_params.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// a / b for counts of tiles, which are below 2^30: a float's quotient is off by less than 2^7, the
// next one exact.
__device__ inline int Quotient(int a, int b) {
  const float inverse = __frcp_rn(static_cast<float>(b));
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

__device__ inline Sequence FindSequence(const Params& params, int b) {
  SequenceRows rows;
  Sequence sequence;
  sequence.b = b;
  const bool faulty = FindRows(params.problem, params.arrays, b, &rows) != Fault::kNone;
  sequence.first_row = static_cast<int>(rows.first);
  sequence.owned = static_cast<int>(rows.owned);
  sequence.count = static_cast<int>(rows.count);
  sequence.early = static_cast<int>(rows.early);
  sequence.length = faulty ? -1 : params.arrays.lengths[b];
  sequence.original_length = params.problem.blocks.aligned ? params.arrays.select_lengths[b] : 0;
  const bool loads = sequence.loads();
  sequence.tiles = loads ? (sequence.length - 1) / kTile + 1 : 1;
  sequence.entries = loads ? static_cast<int>(ItemEntries(sequence.tiles)) : 1;
  sequence.chunks = loads ? ((sequence.count - 1) >> params.tokens_log2) + 1 : 1;
  return sequence;
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
  int base;                   // index of that sequence's first entry in the list
  int entries;                // of each share
  int item_entries;           // if not 0, of each item, instead of ItemEntries
  int begin, end;             // of this share
};

// By all threads of the block together. Whatever is in shared memory before is visible after.
__device__ inline void FindShare(const Params& params, Share& share) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sequences = static_cast<int>(params.problem.sequences);
  const int first = min(sequences, static_cast<int>(threadIdx.x) * params.sequences_each);
  const int last = min(sequences, first + params.sequences_each);
  int own = 0, longest = 0;  // entries of this thread's sequences, and of their longest item
  Sequence sequence;
#pragma unroll 1
  for (int b = first; b < last; ++b) {
    sequence = FindSequence(params, b);
    own += sequence.TotalEntries(params);
    longest = max(longest, sequence.entries);
    if (b == 0) share.first = sequence;
  }

  int up_to = own;  // entries of this and all earlier threads' sequences
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, up_to, step);
    if (lane >= step) up_to += before;
  }
  longest = __reduce_max_sync(~0u, longest);
  if (lane == 31) share.warps[warp] = {up_to, longest};
  __syncthreads();
  const int2 of_warp = lane < kThreads / 32 ? share.warps[lane] : int2{0, 0};
  int total = __reduce_add_sync(~0u, of_warp.x);
  longest = __reduce_max_sync(~0u, of_warp.y);
  up_to += __reduce_add_sync(~0u, lane < warp ? of_warp.x : 0);

  // Only if there are plan.items items, all as long as the longest, do they add up to so many
  // tiles. (With the first one's length it would not follow: 2 + 1 + 3 is three times 2.)
  const Plan& plan = params.plan;
  const bool uniform = int64_t{plan.items} * longest == total;
  int entries, item_entries = 0;
  if (uniform && plan.items_per_share > 0) {
    entries = plan.items_per_share * longest;
  } else if (uniform && plan.shares_per_item > 0) {
    const int tiles = share.first.tiles;
    const int shares = EqualShares(tiles, plan.equal_parts, plan.shares_per_item);
    entries = Quotient(tiles + shares - 1, shares);
    item_entries = shares * entries;
    // Every item now has item_entries entries: sums over items grow in proportion.
    total = item_entries * plan.items;
    own = Quotient(own, longest) * item_entries;
    up_to = Quotient(up_to, longest) * item_entries;
  } else {
    entries = max(kMinShare, Quotient(total + plan.ctas - 1, plan.ctas));
  }
  const int begin = min(total, static_cast<int>(blockIdx.x) * entries);

  if (threadIdx.x == 0) {
    share.entries = entries;
    share.item_entries = item_entries;
    share.begin = begin;
    share.end = min(total, begin + entries);
  }
  int base = up_to - own;
  if (base <= begin && begin < up_to) {
    if (last - first > 1) sequence = FindSequence(params, first);
#pragma unroll 1
    for (int b = first;;) {
      if (item_entries > 0) sequence.entries = item_entries;
      const int of_sequence = sequence.TotalEntries(params);
      if (begin < base + of_sequence) break;
      base += of_sequence;
      sequence = FindSequence(params, ++b);
    }
    share.sequence = sequence;
    share.base = base;
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
        base_(share.base),
        sequence_(share.sequence) {}

  // Finds the next part; false at the end of the share.
  __device__ bool Next(Part* part) {
    int item, index;  // the item's first entry in the list, and the item's number in the sequence
#pragma unroll 1
    while (true) {
      if (next_ >= share_.end) return false;
      const int total = sequence_.TotalEntries(params_);
      if (next_ >= base_ + total) {
        base_ += total;
        sequence_ = FindSequence(params_, sequence_.b + 1);
        if (share_.item_entries > 0) sequence_.entries = share_.item_entries;
        continue;
      }
      index = Quotient(next_ - base_, sequence_.entries);
      item = base_ + index * sequence_.entries;
      if (next_ < item + sequence_.tiles) break;
      next_ = item + sequence_.entries;  // only the entries for its end are left
    }
    part->sequence = sequence_;
    part->head = sequence_.chunks == 1 ? index : Quotient(index, sequence_.chunks);
    part->first_token = (index - part->head * sequence_.chunks) << params_.tokens_log2;
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
  int base_;  // index of sequence_'s first entry
  Sequence sequence_;
};

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_WORK_CUH_
