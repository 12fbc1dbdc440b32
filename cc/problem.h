// One call, decoded: sizes, attributes and where the arrays lie. Free of XLA, so that kernels are
// usable and testable without it; `decode.h` fills it from FFI buffers.

#ifndef JAX_NSA_PROBLEM_H_
#define JAX_NSA_PROBLEM_H_

#include <cstdint>

#include "selection.h"

namespace jax_nsa {

enum class DataType { kBFloat16, kFloat16, kFloat32 };

// Limits that kernels build on; jax_nsa/problem.py has them in the user's terms.
constexpr int64_t kPageGranule = 16;  // rows; page sizes are multiples of it
constexpr int64_t kMaxGroup = 128;    // query heads for each of key's; groups divide it
constexpr int64_t kMaxHeadSize = 192, kMaxValueSize = 128;

// Sizes and attributes. Names and axes are those of jax_nsa/primitive.py.
struct Problem {
  DataType dtype;              // of query, key and value
  DataType attention_dtype;    // of attention: dtype, or float32 beside block_scores
  int64_t sequences;           // B
  int64_t rows;                // rows of query, one for each token, in all sequences together
  int64_t tokens;              // rows that each sequence owns; 0 when ragged
  int64_t heads;               // N
  int64_t key_value_heads;     // Nkv
  int64_t head_size;           // D
  int64_t value_size;          // Dv
  int64_t num_pages;           // pages in the pool of key and value
  int64_t page_size;           // rows in a page
  int64_t pages_per_sequence;  // P, columns of block_table
  int64_t select_count;        // k
  float scale;
  Window window;

  // G, the query heads that share a key/value head.
  JAX_NSA_HOST_DEVICE constexpr int64_t group() const { return heads / key_value_heads; }
  // Columns of block_scores: blocks of the longest sequence that block_table can name.
  JAX_NSA_HOST_DEVICE constexpr int64_t max_blocks() const { return window.NumBlocks(capacity()); }
  // The longest sequence that block_table can name.
  JAX_NSA_HOST_DEVICE constexpr int64_t capacity() const { return pages_per_sequence * page_size; }
};

// Where the arrays lie, on the host or on a device.
struct Arrays {
  const void* query;            // [rows, heads, head_size]
  const void* key;              // [num_pages, page_size, key_value_heads * head_size]
  const void* value;            // [num_pages, page_size, key_value_heads * value_size]
  const int32_t* block_table;   // [sequences, pages_per_sequence]
  const int32_t* lengths;       // [sequences]
  const int32_t* token_counts;  // [sequences], or null: each sequence has `tokens` tokens
  const int32_t* early_counts;  // [sequences], or null: no token ignores the last position
  const int32_t* first_rows;    // [sequences], not decreasing, when ragged; else null
  void* attention;              // [rows, heads, value_size]
  int32_t* topk_indices;        // [rows, key_value_heads, select_count]
  float* lse;                   // [rows, heads], or null: not wanted
  float* block_scores;          // [rows, heads, max_blocks()], or null: not wanted
};

// The rows of query, and of the results, that belong to one sequence.
struct SequenceRows {
  int64_t first;  // first row that the sequence owns
  int64_t owned;  // rows that it owns
  int64_t count;  // of these, how many hold a token; the others are padding
  int64_t early;  // leading tokens that ignore the sequence's last position

  // How many of `length` positions the sequence's token t sees.
  JAX_NSA_HOST_DEVICE constexpr int64_t Visible(int64_t t, int64_t length) const {
    return length - (t < early && length > 0 ? 1 : 0);
  }
};

// What is wrong with a sequence.
enum class Fault { kNone, kLength, kTokenCount, kEarlyCount, kPageId };

// Finds the rows of sequence b, clamped to the arrays whatever the operands hold. On a fault other
// than kNone the owned rows become NaN and -1 where the call cannot fail. Page ids are checked
// where they are read, with IsPage.
JAX_NSA_HOST_DEVICE inline Fault FindRows(const Problem& problem, const Arrays& arrays, int64_t b,
                                          SequenceRows* rows) {
  const int64_t count = arrays.token_counts ? arrays.token_counts[b] : problem.tokens;
  rows->early = arrays.early_counts ? arrays.early_counts[b] : 0;
  if (arrays.first_rows == nullptr) {
    rows->first = b * problem.tokens;
    rows->owned = problem.tokens;
  } else {
    const auto clamp = [&](int64_t row) {
      return row < 0 ? 0 : (row > problem.rows ? problem.rows : row);
    };
    rows->first = clamp(arrays.first_rows[b]);
    const int64_t next = b + 1 < problem.sequences ? clamp(arrays.first_rows[b + 1]) : problem.rows;
    rows->owned = next > rows->first ? next - rows->first : 0;
  }
  const bool fits = count >= 0 && count <= rows->owned;
  rows->count = fits ? count : 0;
  if (arrays.lengths[b] < 0 || arrays.lengths[b] > problem.capacity()) return Fault::kLength;
  if (!fits) return Fault::kTokenCount;
  if (rows->early < 0) return Fault::kEarlyCount;
  return Fault::kNone;
}

JAX_NSA_HOST_DEVICE inline bool IsPage(const Problem& problem, int32_t id) {
  return id >= 0 && id < problem.num_pages;
}

}  // namespace jax_nsa

#endif  // JAX_NSA_PROBLEM_H_
