// One call of compression into the cache, decoded: which compress window each sequence completes,
// where it lies and which row it becomes. A window is a compress window wherever this is included,
// and a slot the row of the cache that slot_mapping names. Free of XLA, for host and device code.

#ifndef JAX_NSA_COMPRESS_H_
#define JAX_NSA_COMPRESS_H_

#include <cstdint>

#include "paged.h"

namespace jax_nsa::compress {

// Limits that kernels build on; jax_nsa/compress/problem.py has them in the user's terms.
constexpr int64_t kMaxPairs = 2;
constexpr int64_t kMaxCompressedHeadSize = 256;

// Sizes. Names and axes are those of the operator in jax_nsa.
struct Problem : PagedSequences {
  DataType dtype;               // of inputs and caches
  int64_t rows;                 // of each cache
  int64_t heads;                // N
  int64_t compress_block_size;  // l
  int64_t compress_stride;      // d
  int64_t pairs;                // inputs, each with a cache
};

// An input and the cache that its windows go to.
struct Pair {
  int64_t head_size;  // D
  DataType weight_dtype, bias_dtype;
  const void* input;   // [num_pages, page_size, heads * head_size]
  const void* weight;  // [compress_block_size, heads]
  const void* bias;    // [heads, head_size], or null
  void* cache;         // [rows, heads * head_size]
};

// Where the arrays lie, on the host or on a device.
struct Arrays {
  Pair pairs[kMaxPairs];
  const int32_t* block_table;   // [sequences, pages_per_sequence]
  const int32_t* lengths;       // [sequences]
  const int32_t* slots;         // [sequences]
  const int32_t* token_counts;  // [sequences], or null: one each
};

// What is wrong with a sequence.
enum class SequenceFault { kNone, kLength, kTokenCount, kPageId, kSlot };

constexpr int64_t kNoWindow = -1;

// Finds the first token of the window that sequence b completes, or kNoWindow. It is a multiple of
// kPageGranule, as strides are.
JAX_NSA_HOST_DEVICE inline SequenceFault FindWindow(const Problem& problem, const Arrays& arrays,
                                                    int64_t b, int64_t* first) {
  const int32_t length = arrays.lengths[b];
  const int64_t count = arrays.token_counts ? arrays.token_counts[b] : 1;
  *first = kNoWindow;
  if (!IsLength(problem, length)) return SequenceFault::kLength;
  if (count < 0 || count > problem.compress_stride) return SequenceFault::kTokenCount;
  const int64_t before = length - problem.compress_block_size;  // the tokens before the newest l
  if (before < 0) return SequenceFault::kNone;
  const int64_t beyond = before % problem.compress_stride;  // tokens after the last window's end
  if (beyond < count) *first = before - beyond;
  return SequenceFault::kNone;
}

// The first column of block_table that a window needs and that names no page; -1 if there is none.
JAX_NSA_HOST_DEVICE inline int64_t FindBadPage(const Problem& problem, const Arrays& arrays,
                                               int64_t b, int64_t first) {
  const int32_t* const pages = arrays.block_table + b * problem.pages_per_sequence;
  const int64_t last = first + problem.compress_block_size - 1;
  for (int64_t c = first / problem.page_size; c <= last / problem.page_size; ++c) {
    if (!IsPage(problem, pages[c])) return c;
  }
  return -1;
}

// Whether sequence b, whose window begins at `first`, names a row of the cache. A row that two
// sequences name is written by neither.
JAX_NSA_HOST_DEVICE inline bool NamesRow(const Problem& problem, const Arrays& arrays, int64_t b,
                                         int64_t first) {
  return first != kNoWindow && arrays.slots[b] >= 0 && arrays.slots[b] < problem.rows;
}

// The row of the pool that token `token` of sequence b lies in, whose page must be good.
JAX_NSA_HOST_DEVICE inline int64_t RowOfToken(const Problem& problem, const Arrays& arrays,
                                              int64_t b, int64_t token) {
  const int64_t column = token / problem.page_size;
  return arrays.block_table[b * problem.pages_per_sequence + column] * problem.page_size +
         (token - column * problem.page_size);
}

}  // namespace jax_nsa::compress

#endif  // JAX_NSA_COMPRESS_H_
