// One call of the selected branch, decoded: attention over chosen blocks of original tokens, and
// over a window of the newest. Free of XLA, so that kernels are usable and testable without it.

#ifndef JAX_NSA_SELECT_ATTENTION_H_
#define JAX_NSA_SELECT_ATTENTION_H_

#include <cstdint>

#include "paged.h"
#include "spans.h"

namespace jax_nsa::select_attention {

struct Problem : PagedProblem {
  DataType attention_dtype;   // of the attentions: dtype, or float32 where they are to be merged
  int64_t select_block_size;  // l'
  int64_t select_count;       // k, 0 where no blocks are chosen
  int64_t window_size;        // 0 where there is no window
  bool partial;               // whether other devices hold the positions beyond the capacity

  // The end of what this device holds of a sequence of `limit` tokens.
  JAX_NSA_HOST_DEVICE constexpr int64_t End(int64_t limit) const {
    return limit < capacity() ? limit : capacity();
  }
  // What token rows that see `limit` positions read of block `id`, and of the window.
  JAX_NSA_HOST_DEVICE constexpr Span Block(int64_t id, int64_t limit) const {
    return BlockSpan(select_block_size, id, End(limit));
  }
  JAX_NSA_HOST_DEVICE constexpr Span Window(int64_t limit) const {
    return NewestSpan(window_size, limit, capacity());
  }
};

struct Arrays : PagedArrays {
  const int32_t* topk_indices;  // [rows, key_value_heads, select_count], or null
  void* attention;              // [rows, heads, value_size], of the chosen blocks, or null
  void* window_attention;       // the same of the window, or null
  float* lse;                   // [rows, heads], or null: not wanted
  float* window_lse;            // the same
};

// As for any paged call. Where other devices hold positions too, lengths are in this one's own
// numbering, and any is good.
JAX_NSA_HOST_DEVICE inline Fault FindRows(const Problem& problem, const Arrays& arrays, int64_t b,
                                          SequenceRows* rows) {
  const Fault fault = jax_nsa::FindRows(problem, arrays, b, rows);
  if (!problem.partial && !IsLength(problem, arrays.lengths[b])) return Fault::kLength;
  return fault;
}

// How many positions of sequence b the token t of `count` sees; none where it is not positive.
JAX_NSA_HOST_DEVICE inline int64_t Limit(const Arrays& arrays, int64_t b, int64_t count,
                                         int64_t t) {
  return int64_t{arrays.lengths[b]} - (count - 1 - t);
}

// The blocks chosen by a row of query for a kv head.
JAX_NSA_HOST_DEVICE inline const int32_t* ChosenBlocks(const Problem& problem, const Arrays& arrays,
                                                       int64_t row, int64_t head) {
  return arrays.topk_indices + (row * problem.key_value_heads + head) * problem.select_count;
}

// Whether an entry of topk_indices is one that a sequence of so many tokens may have: -1, or a
// block that it has begun. With `partial` any passes, as it may be another device's block.
JAX_NSA_HOST_DEVICE inline bool IsBlock(const Problem& problem, int64_t length, int32_t id) {
  return problem.partial || id == -1 || (id >= 0 && id * problem.select_block_size < length);
}

// What is wrong with what a row of query reads for a kv head, and in which column of topk_indices
// or of block_table.
enum class RowFault { kNone, kBlock, kPage };

JAX_NSA_HOST_DEVICE inline RowFault CheckSpan(const Problem& problem, const int32_t* pages,
                                              const Span& span, int64_t* column) {
  for (int64_t at = span.begin; at < span.end;) {
    *column = at / problem.page_size;
    if (!IsPage(problem, pages[*column])) return RowFault::kPage;
    at = (*column + 1) * problem.page_size;
  }
  return RowFault::kNone;
}

// For row `row` of query, which is one of sequence b's and sees `limit` positions.
JAX_NSA_HOST_DEVICE inline RowFault CheckRow(const Problem& problem, const Arrays& arrays,
                                             int64_t b, int64_t row, int64_t head, int64_t limit,
                                             int64_t* column) {
  const int32_t* const pages = arrays.block_table + b * problem.pages_per_sequence;
  const int32_t* const ids = ChosenBlocks(problem, arrays, row, head);
  for (int64_t i = 0; i < problem.select_count; ++i) {
    if (!IsBlock(problem, arrays.lengths[b], ids[i])) {
      *column = i;
      return RowFault::kBlock;
    }
  }
  for (int64_t i = 0; i < problem.select_count; ++i) {
    if (ids[i] < 0) continue;
    const RowFault fault = CheckSpan(problem, pages, problem.Block(ids[i], limit), column);
    if (fault != RowFault::kNone) return fault;
  }
  return CheckSpan(problem, pages, problem.Window(limit), column);
}

}  // namespace jax_nsa::select_attention

#endif  // JAX_NSA_SELECT_ATTENTION_H_
