// The blocks of highest importance, chosen by the consumer warps of one thread block.
//
// This runs once for a token, and every step waits for the one before: dependent steps, barriers
// and jumps to code not fetched yet are what it costs.
//
// Usually few blocks are to be chosen. Then the candidates are dealt to 32 groups, and of the
// groups' best ones the n-th is a bound: n candidates at least reach it, rarely many more. Those
// that do are ranked by comparing each with every other. Otherwise a histogram finds the bound.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_TOPK_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_TOPK_CUH_

#include <cstdint>

#include "cuda/compress_attention_plan.h"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// The groups of candidates, and how many blocks are chosen through them at most: for more, too many
// candidates would reach the bound.
constexpr int kGroups = 32, kFewNeeded = 29;
// Up to so many candidates are ranked at once, without a bound.
constexpr int kFewCandidates = 64;
// Up to so many are ranked by comparing each with every other; more are sorted.
constexpr int kRanked = 128;
constexpr int kHistogramBits = 10, kHistogramBins = 1 << kHistogramBits;

struct TopkScratch {
  uint64_t list[kSharedChosen];  // orders of candidates; the first kRanked are 0 if there are fewer
  uint64_t bests[kGroups];       // orders
  uint4 histogram[kHistogramBins / 4];
  uint32_t warp_least[kConsumers], warp_most[kConsumers];
  int warp_counts[kConsumers];
  uint64_t least, most;  // orders that bracket the last candidate to be chosen
  int above;             // candidates above the bracket
  int within;            // and in it
  unsigned listed;
};

// A number that sorts like the importance, a sum of probabilities, or NaN, which ranks as -1. It is
// never 0.
__device__ inline uint32_t ImportanceKey(float importance) {
  return __float_as_uint(fmaxf(importance, -1.0f)) ^ 0x80000000u;
}

// GoesBefore of selection.h as a number, larger for what goes before and different for each block.
__device__ inline uint64_t Order(uint32_t key, int block) {
  return uint64_t{key} << 32 | (0xffffffffu - block);
}
__device__ inline int BlockOf(uint64_t order) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(order));
}

// The blocks among which to choose: [begin, end), all but those that are Forced (selection.h).
struct Candidates {
  const float* importances;
  int begin, end;

  __device__ int size() const { return end - begin; }
  // How many are chosen where `count` of num_blocks blocks are. What is no candidate comes first.
  __device__ int NeededOf(int num_blocks, int count) const {
    return min(num_blocks, count) - (num_blocks - size());
  }
};

// A thread's share of the candidates is this one and every kComputeThreads-th after it.
//
// A group of candidates is the share of the eight threads of a warp that are equal modulo 4. Blocks
// that are important together are neighbours: neighbours are in different groups, so that the
// groups' best are the best of all, and a warp's are in different banks. Any 32 consecutive blocks
// from a multiple of 32 on, counted from the first, are in the 32 groups.
__device__ inline int FirstOfShare(const Candidates& candidates) {
  const int lane = ThreadIndex() % 32, warp = ThreadIndex() / 32;
  return candidates.begin + lane / 4 * 32 + (lane + 4 * warp) % 32;
}

// A share of at most kEach candidates, in registers. Visit calls visit(key, block) for each, and
// for what is missing of kEach with a key of 0.
template <int kEach>
class HeldShare {
 public:
  __device__ explicit HeldShare(const Candidates& candidates)
      : HeldShare(candidates, FirstOfShare(candidates)) {}
  __device__ HeldShare(const Candidates& candidates, int first) : first_(first) {
    const float* importances = candidates.importances + first;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = i * kComputeThreads;
      keys_[i] = first + at < candidates.end ? ImportanceKey(importances[at]) : 0;
    }
  }
  template <typename Function>
  __device__ void Visit(Function visit) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) visit(keys_[i], first_ + i * kComputeThreads);
  }

 private:
  int first_;
  uint32_t keys_[kEach];
};

// A share of any size, fetched anew for each visit.
class FetchedShare {
 public:
  __device__ explicit FetchedShare(const Candidates& candidates) : candidates_(candidates) {}
  template <typename Function>
  __device__ void Visit(Function visit) const {
    constexpr int kTogether = 8;  // a global memory access takes long, eight hardly longer
#pragma unroll 1
    for (int first = FirstOfShare(candidates_); first < candidates_.end;
         first += kTogether * kComputeThreads) {
      HeldShare<kTogether>(candidates_, first).Visit(visit);
    }
  }

 private:
  const Candidates& candidates_;
};

// Which of every 32 orders the eight threads of this one's group rank together.
__device__ inline int OwnOrder() { return ThreadIndex() / 32 * 4 + ThreadIndex() % 4; }

// How many of `size` orders, at most kRanked, go before the eight threads' own. Orders past the
// last, up to a multiple of 32, are 0.
__device__ inline int CountBefore(const uint64_t* orders, int size, uint64_t own) {
  const int lane = ThreadIndex() % 32;
  uint32_t count = 0;
  int base = 0;
#pragma unroll 1
  do {
    const ulonglong2* part = reinterpret_cast<const ulonglong2*>(orders + base) + lane / 4 * 2;
    const ulonglong2 a = part[0], b = part[1];
    count += (a.x > own) + (a.y > own) + (b.x > own) + (b.y > own);
    base += 32;
  } while (base < size);
  // The counts of the warp's four orders are summed at once, a byte for each.
  static_assert(kRanked <= 256);
  const int shift = lane % 4 * 8;
  return __reduce_add_sync(~0u, count << shift) >> shift & 0xff;
}

// Writes the blocks of the first `needed` of `listed` orders, at most kRanked.
__device__ inline void Rank(const uint64_t* list, int listed, int needed, int32_t* indices) {
  int base = 0;
#pragma unroll 1
  do {
    const uint64_t own = list[base + OwnOrder()];
    const int place = CountBefore(list, listed, own);
    if (ThreadIndex() % 32 < 4 && place < needed && own != 0) indices[place] = BlockOf(own);
    base += 32;
  } while (base < listed);
}

// Sorts `count` orders descending, by pairs whose distance is a power of two. There is room for as
// many more as make their number a power of two.
__device__ inline void SortDescending(uint64_t* orders, int count) {
  const int size = 1 << (32 - __clz(count - 1));
#pragma unroll 1
  for (int i = count + ThreadIndex(); i < size; i += kComputeThreads) orders[i] = 0;
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int step = run / 2; step > 0; step /= 2) {
      SyncConsumers();
#pragma unroll 1
      for (int i = ThreadIndex(); i < size / 2; i += kComputeThreads) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const bool descending = (low & run) == 0;
        const uint64_t a = orders[low], b = orders[high];
        if (descending ? a < b : a > b) {
          orders[low] = b;
          orders[high] = a;
        }
      }
    }
  }
  SyncConsumers();
}

// Adds this thread's candidates from the order `least` on to the list, while there is room.
template <typename Share>
__device__ inline void List(const Share& share, uint64_t least, uint64_t* list, unsigned room,
                            TopkScratch& scratch) {
  share.Visit([&](uint32_t key, int block) {
    const uint64_t order = Order(key, block);
    if (order >= least) {
      // atomicInc with a limit below ~0u is an instruction of each lane; of an atomicAdd the
      // compiler makes one for the whole warp, and code around it.
      const unsigned i = atomicInc(&scratch.listed, ~0u >> 1);
      if (i < room) list[i] = order;
    }
  });
}

// An order that at least `needed` candidates reach, few more than that as a rule and only those in
// `needed` groups at worst: the best of the last of these groups. `best` is that of this thread's
// share. No group must be empty. Empties the list.
__device__ inline uint64_t FindBound(uint64_t best, int needed, TopkScratch& scratch) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    best = max(best, static_cast<uint64_t>(__shfl_xor_sync(~0u, best, step)));
  }
  const bool first_of_group = ThreadIndex() % 32 < 4;
  if (first_of_group) scratch.bests[OwnOrder()] = best;
  if (ThreadIndex() < kRanked) scratch.list[ThreadIndex()] = 0;
  if (ThreadIndex() == 0) scratch.listed = 0;
  SyncConsumers();
  const int place = CountBefore(scratch.bests, kGroups, best);
  if (first_of_group && place == needed - 1) scratch.least = best;
  SyncConsumers();
  return scratch.least;
}

// Chooses at most kFewNeeded candidates of more than kGroups. Returns false, and has chosen none,
// if too many reach the bound.
template <typename Share>
__device__ inline bool ChooseFew(const Share& share, int needed, TopkScratch& scratch,
                                 int32_t* indices) {
  uint32_t best_key = 0;
  int best_block = -1;
  share.Visit([&](uint32_t key, int block) {
    if (key > best_key) {
      best_key = key;
      best_block = block;
    }
  });
  const uint64_t best = Order(best_key, best_block);
  const uint64_t least = FindBound(best, needed, scratch);
  if (best >= least) List(share, least, scratch.list, kRanked, scratch);
  SyncConsumers();
  const int listed = static_cast<int>(scratch.listed);
  if (listed > kRanked) return false;
  Rank(scratch.list, listed, needed, indices);
  return true;
}

// An order that at least `needed` and at most `enough` candidates reach, for any `enough` that is
// no less than `needed`. Empties the list.
template <typename Share>
__device__ inline uint64_t FindThreshold(const Share& share, int needed, int enough,
                                         TopkScratch& scratch) {
  const int thread = ThreadIndex(), lane = thread % 32, warp = thread / 32;
  uint32_t least_key = ~0u, most_key = 0;
  share.Visit([&](uint32_t key, int) {
    if (key > 0) least_key = min(least_key, key);
    most_key = max(most_key, key);
  });
  least_key = __reduce_min_sync(~0u, least_key);
  most_key = __reduce_max_sync(~0u, most_key);
  if (lane == 0) {
    scratch.warp_least[warp] = least_key;
    scratch.warp_most[warp] = most_key;
  }
  constexpr int kEach = kHistogramBins / kComputeThreads;
  static_assert(kEach == 4);
  scratch.histogram[thread] = {0, 0, 0, 0};
  if (thread < kRanked) scratch.list[thread] = 0;
  SyncConsumers();
  if (thread == 0) scratch.listed = 0;
#pragma unroll
  for (int w = 0; w < kConsumers; ++w) {
    least_key = min(least_key, scratch.warp_least[w]);
    most_key = max(most_key, scratch.warp_most[w]);
  }
  uint64_t least = uint64_t{least_key} << 32, most = uint64_t{most_key} << 32 | 0xffffffffu;

  // Narrows the bracket [least, most] to the bin of the last one needed, again and again.
  int above = 0;
#pragma unroll 1
  while (true) {
    // A histogram of the bracket, its highest orders in bin 0.
    const int bits = 64 - __clzll(static_cast<long long>(most - least));
    const int shift = max(0, bits - kHistogramBits);
    uint32_t* bins = &scratch.histogram[0].x;
    share.Visit([&](uint32_t key, int block) {
      const uint64_t order = Order(key, block);
      if (least <= order && order <= most) atomicAdd(&bins[(most - order) >> shift], 1);
    });
    SyncConsumers();
    const uint4 own = scratch.histogram[thread];
    scratch.histogram[thread] = {0, 0, 0, 0};
    const int counts[kEach] = {static_cast<int>(own.x), static_cast<int>(own.y),
                               static_cast<int>(own.z), static_cast<int>(own.w)};
    const int sum = counts[0] + counts[1] + counts[2] + counts[3];
    int up_to = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, up_to, step);
      if (lane >= step) up_to += before;
    }
    if (lane == 31) scratch.warp_counts[warp] = up_to;
    SyncConsumers();
    up_to += above;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) up_to += w < warp ? scratch.warp_counts[w] : 0;
    int before = up_to - sum;
    if (before < needed && needed <= up_to) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (before < needed && needed <= before + counts[i]) {
          const uint64_t first = most - (static_cast<uint64_t>(thread * kEach + i) << shift);
          const uint64_t width = (uint64_t{1} << shift) - 1;
          scratch.most = first;
          scratch.least = first - least > width ? first - width : least;
          scratch.above = before;
          scratch.within = counts[i];
        }
        before += counts[i];
      }
    }
    SyncConsumers();
    least = scratch.least;
    most = scratch.most;
    above = scratch.above;
    // With a shift of 0 a bin is one block.
    if (above + scratch.within <= enough || shift == 0) return least;
  }
}

// Chooses any number of candidates. `spill` has room for as many as shared memory has none for.
template <typename Share>
__device__ inline void ChooseMany(const Share& share, int needed, uint64_t* spill,
                                  TopkScratch& scratch, int32_t* indices) {
  // Ranking and sorting are padded to these sizes anyway, so some more than needed cost nothing.
  const int enough = needed <= kRanked ? kRanked : 1 << (32 - __clz(needed - 1));
  uint64_t* list = enough <= kSharedChosen ? scratch.list : spill;
  const uint64_t least = FindThreshold(share, needed, enough, scratch);
  List(share, least, list, enough, scratch);
  SyncConsumers();
  const int listed = static_cast<int>(scratch.listed);
  if (listed <= kRanked) {
    Rank(list, listed, needed, indices);
  } else {
    SortDescending(list, listed);
#pragma unroll 1
    for (int i = ThreadIndex(); i < needed; i += kComputeThreads) indices[i] = BlockOf(list[i]);
  }
}

template <typename Share>
__device__ inline void Choose(const Share& share, int needed, uint64_t* spill, TopkScratch& scratch,
                              int32_t* indices) {
  if (needed > kFewNeeded || !ChooseFew(share, needed, scratch, indices)) {
    ChooseMany(share, needed, spill, scratch, indices);
  }
}

// Writes the `count` most important of num_blocks blocks, by all consumer warps, which have to
// synchronise before and after.
__device__ inline void SelectBlocks(const Candidates& candidates, int num_blocks, int count,
                                    uint64_t* spill, TopkScratch& scratch, int32_t* indices) {
  const int thread = ThreadIndex(), size = candidates.size();
  // The forced blocks, which are no candidates, come first, in the order of their indices.
  const int forced = num_blocks - size;
#pragma unroll 1
  for (int i = thread; i < min(forced, count); i += kComputeThreads) {
    indices[i] = i < candidates.begin ? i : size + i;
  }
  if (num_blocks < count) {
#pragma unroll 1
    for (int i = num_blocks + thread; i < count; i += kComputeThreads) indices[i] = -1;
  }
  const int needed = candidates.NeededOf(num_blocks, count);
  if (needed <= 0) return;
  indices += forced;

  if (size <= (needed <= kFewNeeded ? kFewCandidates : kRanked)) {
    if (thread < kRanked) {
      const int block = candidates.begin + thread;
      const float* importance = candidates.importances + block;
      scratch.list[thread] = thread < size ? Order(ImportanceKey(*importance), block) : 0;
    }
    SyncConsumers();
    Rank(scratch.list, size, needed, indices);
  } else if (size <= kComputeThreads) {
    Choose(HeldShare<1>(candidates), needed, spill, scratch, indices);
  } else if (size <= 4 * kComputeThreads) {
    Choose(HeldShare<4>(candidates), needed, spill, scratch, indices);
  } else if (size <= 8 * kComputeThreads) {
    Choose(HeldShare<8>(candidates), needed, spill, scratch, indices);
  } else {
    Choose(FetchedShare(candidates), needed, spill, scratch, indices);
  }
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_TOPK_CUH_
