// What the selected branch's kernel is launched with.

#ifndef JAX_NSA_CUDA_SELECT_PARAMS_CUH_
#define JAX_NSA_CUDA_SELECT_PARAMS_CUH_

#include <cstdint>

#include "cuda/divider.cuh"
#include "cuda/select_plan.h"
#include "cuda/tiles.cuh"

namespace jax_nsa::cuda::select {

// Integers that the kernel needs often are 32 bits wide: 64-bit arithmetic, and dividing on the
// device, cost more than they look.
struct Params {
  Pools pools;
  Problem problem;
  Arrays arrays;
  Plan plan;
  char* workspace;
  float scale_log2;    // makes powers of two of scores
  bool aligned_query;  // whether rows of query start at multiples of 16 bytes
  bool early;          // whether the kernel before, which chooses blocks, may still run
  int32_t stages;      // tiles in flight for each team of warps
  int32_t heads, key_value_heads, head_size, value_size, value_columns;
  int32_t group, page_size, capacity, num_pages, pages_per_sequence;
  int32_t block_size, block_tiles;  // l', and in tiles
  int32_t max_blocks;               // that the capacity holds, the last perhaps in part
  int32_t pages_each;               // pages that a block lies in, at most
  int32_t select_count;
  int32_t head_items;  // items of one token
  Divider by_head_items, by_chunks, by_parts, by_tokens, by_page_size, by_block_tiles,
      by_pages_each;
  Divider by_parts_of[kKinds];

  // Part `part` of an item.
  __device__ int64_t PartIndex(int64_t item, int part) const {
    return item * plan.all_parts() + part;
  }
  __device__ uint64_t* flag(int64_t index) const {
    return reinterpret_cast<uint64_t*>(workspace) + index;
  }
  // Sums [rows, value_columns] relative to the maxima [rows], which are in powers of two, and the
  // totals [rows] of the exponentials.
  __device__ float* part_sums(int64_t index) const {
    return reinterpret_cast<float*>(workspace + plan.parts_offset) + index * plan.part_floats;
  }
  __device__ float* part_maxima(int64_t index) const {
    return part_sums(index) + plan.rows * value_columns;
  }
  __device__ float* part_totals(int64_t index) const { return part_maxima(index) + plan.rows; }
};

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_CUDA_SELECT_PARAMS_CUH_
