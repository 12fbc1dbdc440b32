// What calls over paged caches have in common: sizes, arrays, which rows of query belong to which
// sequence, and what may be wrong with a sequence. Free of XLA, for host and device code.

#ifndef JAX_NSA_PAGED_H_
#define JAX_NSA_PAGED_H_

#include <cstdint>

#include "blocks.h"

namespace jax_nsa {

enum class DataType { kBFloat16, kFloat16, kFloat32 };

// Bytes of an element.
constexpr int64_t ElementSize(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

// Limits that kernels build on; jax_nsa/paged.py (heads) and pools.py (pages, values) have
// them in the user's terms.
constexpr int64_t kPageGranule = 16;  // rows; page sizes are multiples of it
constexpr int64_t kMaxPage = 256;     // rows
constexpr int64_t kMaxGroup = 128;    // query heads for each of key's; groups divide it
constexpr int64_t kMaxHeadSize = 192, kMaxValueSize = 128;

constexpr bool IsPageSize(int64_t rows) {
  return rows > 0 && rows % kPageGranule == 0 && rows <= kMaxPage;
}

// How far apart things lie in a pool, in elements.
struct Pitch {
  int64_t head;  // from one kv head of a row to the next
  int64_t row;   // from one row to the next
};

// Sequences whose rows lie in the pages of a pool, as block_table tells for each.
struct PagedSequences {
  int64_t sequences;           // B
  int64_t pages_per_sequence;  // P, columns of block_table
  int64_t num_pages;           // pages in the pool
  int64_t page_size;           // rows in a page

  // The longest sequence that block_table can name.
  JAX_NSA_HOST_DEVICE constexpr int64_t capacity() const { return pages_per_sequence * page_size; }
};

// Sizes of attention. Names and axes are those of the operators in jax_nsa.
struct PagedProblem : PagedSequences {
  DataType dtype;           // of query, key and value
  int64_t rows;             // rows of query, one for each token, in all sequences together
  int64_t tokens;           // rows that each sequence owns; 0 where rows are packed
  int64_t heads;            // N
  int64_t key_value_heads;  // Nkv
  int64_t head_size;        // D
  int64_t value_size;       // Dv
  float scale;
  // Whether one pool holds both, of each kv head its key and then its value.
  bool interleaved = false;

  // G, the query heads that share a key/value head.
  JAX_NSA_HOST_DEVICE constexpr int64_t group() const { return heads / key_value_heads; }
  // How the keys and the values lie, from the first on.
  JAX_NSA_HOST_DEVICE constexpr Pitch key_pitch() const { return PitchOf(head_size); }
  JAX_NSA_HOST_DEVICE constexpr Pitch value_pitch() const { return PitchOf(value_size); }

 private:
  JAX_NSA_HOST_DEVICE constexpr Pitch PitchOf(int64_t size) const {
    const int64_t head = interleaved ? head_size + value_size : size;
    return {head, key_value_heads * head};
  }
};

// Where the operands lie, on the host or on a device.
struct PagedArrays {
  const void* query;            // [rows, heads, head_size]
  const void* key;              // first key of [num_pages, page_size, key_value_heads, head_size]
  const void* value;            // first value, likewise; pitches say how either lies
  const int32_t* block_table;   // [sequences, pages_per_sequence]
  const int32_t* lengths;       // [sequences]
  const int32_t* token_counts;  // [sequences], or null: each sequence has `tokens` tokens
  const int32_t* first_rows;    // [sequences], not decreasing, where rows are packed; else null
};

// The rows of query, and of the results, that belong to one sequence.
struct SequenceRows {
  int64_t first;      // first row that the sequence owns
  int64_t owned;      // rows that it owns
  int64_t count;      // of these, how many hold a token; the others are padding
  int64_t early = 0;  // leading tokens that ignore the sequence's last position

  // How many of `length` positions the sequence's token t sees.
  JAX_NSA_HOST_DEVICE constexpr int64_t Visible(int64_t t, int64_t length) const {
    return length - (t < early && length > 0 ? 1 : 0);
  }
};

// What is wrong with a sequence.
enum class Fault { kNone, kLength, kTokenCount, kOriginalLength, kPageId };

// Finds the rows of sequence b, clamped so that no operand's contents lead outside the arrays. On a
// fault other than kNone the owned rows become NaN and -1 where the call does not fail. Page ids
// are checked where they are read, with IsPage.
JAX_NSA_HOST_DEVICE inline Fault FindRows(const PagedProblem& problem, const PagedArrays& arrays,
                                          int64_t b, SequenceRows* rows) {
  const int64_t count = arrays.token_counts ? arrays.token_counts[b] : problem.tokens;
  rows->early = 0;
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
  return fits ? Fault::kNone : Fault::kTokenCount;
}

// Whether a sequence's length is one that its row of the block table can name.
JAX_NSA_HOST_DEVICE constexpr bool IsLength(const PagedSequences& sequences, int32_t length) {
  return length >= 0 && length <= sequences.capacity();
}

// Whether a column of the block table names a page of the pool.
JAX_NSA_HOST_DEVICE constexpr bool IsPage(const PagedSequences& sequences, int32_t id) {
  return id >= 0 && id < sequences.num_pages;
}

}  // namespace jax_nsa

#endif  // JAX_NSA_PAGED_H_
