// What the kernel is launched with, and where things lie in the workspace.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_PARAMS_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_PARAMS_CUH_

#include <cstdint>

#include "compress_attention.h"
#include "cuda/compress_attention_plan.h"
#include "cuda/divider.cuh"
#include "cuda/tiles.cuh"

namespace jax_nsa::cuda::compressed {

// Integers are worked out on the host and 32 bits wide where the kernel needs them often: dividing
// on the device, and 64-bit arithmetic, cost far more than they look.
struct Params {
  Pools pools;
  compress_attention::Problem problem;
  compress_attention::Arrays arrays;
  Plan plan;
  char* workspace;
  int32_t stages;         // of the ring (compress_attention_pipeline.cuh)
  int32_t shared_floats;  // of shared memory behind the ring's stages, for records
  int32_t ring_floats;    // the same, once the ring is through and its memory is free too
  int32_t batch_tiles;    // of a batch of records, at most; two batches fit into ring_floats
  bool discards;          // whether the records of cut items are discarded once read
  bool aligned_query;     // whether rows of query start at multiples of 16 bytes
  float scale_log2;       // scale / ln 2: exponentials are taken as powers of two
  int32_t heads, key_value_heads, head_size, value_size;
  int32_t value_columns;  // value_size rounded up to a multiple of 4
  int32_t group_log2;     // of group(), a power of two
  int32_t tokens_log2;    // of plan.tokens_per_chunk
  // Of the blocks, as blocks.h has them, in 32 bits.
  int32_t block_positions;   // M, the positions from one block's last to the next one's
  int32_t last_position;     // LastPosition(0)
  int32_t taps;              // num_taps()
  int32_t num_blocks_rest;   // NumBlocks(n) = (n + num_blocks_rest) / M, for n > 0
  int32_t first_block_rest;  // FirstBlock(i) = (i + first_block_rest) / M - 1, below
  int32_t init_blocks, local_blocks;
  int32_t max_blocks;
  int32_t sequences;
  int32_t sequences_each;  // that a thread counts entries of
  int32_t items_each;      // of a sequence, if all have as many at most; or 0
  int32_t tokens, capacity;
  bool lengths_only;  // whether nothing but its length tells one sequence from another
  Divider by_page_size, by_block_positions, by_select_block_size, by_items_each;
  Divider by_record_rows;  // 1 + plan.block_sums
  int32_t page_size;

  __device__ int group() const { return 1 << group_log2; }
  // The last position that adds to a block.
  __device__ int LastPosition(int block) const { return block_positions * block + last_position; }
  // The first position that adds to a block; may be negative.
  __device__ int FirstPosition(int block) const { return LastPosition(block) - (taps - 1); }
  // The first block that a position adds to. By CANN's rule it is -1 for position 0, which would be
  // the last one of a block before the first.
  __device__ int FirstBlock(int position) const {
    return by_block_positions(position + first_block_rest) - 1;
  }

  // One for each region: whether its part is there.
  __device__ uint64_t* flags() const { return reinterpret_cast<uint64_t*>(workspace); }
  // Another for each: whether its blocks' importances are there, where the item is joint.
  __device__ uint64_t* importance_flags() const { return flags() + 2 * plan.ctas; }
  // A region's attention [rows, value_columns], not yet divided: the sum of its tiles' exponentials
  // times values, relative to its maxima.
  __device__ float* part_attention(int region) const {
    return reinterpret_cast<float*>(workspace + plan.parts_offset) + region * plan.part_floats;
  }
  // Each row's greatest score times scale_log2, [rows].
  __device__ float* part_max(int region) const {
    return part_attention(region) + plan.rows * value_columns;
  }
  // The sum of each row's exponentials, [rows]. All are negative if a page id is faulty.
  __device__ float* part_sum(int region) const { return part_max(region) + plan.rows; }
  // Room for the records of a region's tiles (compress_attention_records.cuh).
  __device__ float* tiles(int region) const {
    return reinterpret_cast<float*>(workspace + plan.tiles_offset) + region * plan.region_floats;
  }
  // Room for what a thread block's selection has no shared memory for: orders, and importances.
  __device__ uint64_t* orders(int cta) const {
    return reinterpret_cast<uint64_t*>(workspace + plan.selection_offset +
                                       cta * (8 * plan.sorted + 4 * plan.importances));
  }
  __device__ float* importances(int cta) const {
    return reinterpret_cast<float*>(orders(cta) + plan.sorted);
  }
};

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_PARAMS_CUH_
