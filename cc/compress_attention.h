// One call of the compressed branch, decoded: attention over compressed positions and the choice
// of blocks. Free of XLA, so that kernels are usable and testable without it.

#ifndef JAX_NSA_COMPRESS_ATTENTION_H_
#define JAX_NSA_COMPRESS_ATTENTION_H_

#include <cstdint>

#include "blocks.h"
#include "paged.h"
#include "selection.h"

namespace jax_nsa::compress_attention {

struct Problem : PagedProblem {
  DataType attention_dtype;  // of attention: dtype, or float32 beside block_scores
  int64_t select_count;      // k
  Blocks blocks;
  Forced forced = {1, 2};
  bool causal = false;  // whether tokens count the original tokens that they see

  // Columns of block_scores: blocks of the longest sequence that block_table can name.
  JAX_NSA_HOST_DEVICE constexpr int64_t max_blocks() const { return blocks.MaxBlocks(capacity()); }
};

struct Arrays : PagedArrays {
  const int32_t* early_counts;    // [sequences], or null: no token ignores the last position
  const int32_t* select_lengths;  // [sequences], original tokens, where blocks are aligned
  void* attention;                // [rows, heads, value_size]
  int32_t* topk_indices;          // [rows, key_value_heads, select_count]
  float* lse;                     // [rows, heads], or null: not wanted
  float* block_scores;            // [rows, heads, max_blocks()], or null: not wanted
};

// As for any paged call, and who ignores the last position.
JAX_NSA_HOST_DEVICE inline Fault FindRows(const Problem& problem, const Arrays& arrays, int64_t b,
                                          SequenceRows* rows) {
  // All is read before anything is decided, so that a GPU waits for memory once.
  const int32_t length = arrays.lengths[b];
  const int32_t tokens = problem.blocks.aligned ? arrays.select_lengths[b] : 0;
  const int32_t early = arrays.early_counts ? arrays.early_counts[b] : 0;
  const Fault fault = jax_nsa::FindRows(problem, arrays, b, rows);
  rows->early = early;
  if (!IsLength(problem, length)) return Fault::kLength;
  if (fault != Fault::kNone) return fault;
  const bool fits = !problem.blocks.aligned || problem.blocks.AreCompressedTo(tokens, length);
  return early < 0 || !fits ? Fault::kOriginalLength : Fault::kNone;
}

// How many blocks token t of sequence b, which has `count` tokens, chooses from.
JAX_NSA_HOST_DEVICE inline int64_t NumBlocks(const Problem& problem, const Arrays& arrays,
                                             int64_t b, int64_t count, int64_t t) {
  if (!problem.blocks.aligned) return problem.blocks.NumBlocks(arrays.lengths[b]);
  return problem.blocks.Universe(arrays.select_lengths[b] - (problem.causal ? count - 1 - t : 0));
}

}  // namespace jax_nsa::compress_attention

#endif  // JAX_NSA_COMPRESS_ATTENTION_H_
