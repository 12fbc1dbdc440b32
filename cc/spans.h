// Which positions of a sequence a row of query reads, as spans, and where the rows of keys and
// values of a span lie in the pool. One definition for host and device code.

#ifndef JAX_NSA_SPANS_H_
#define JAX_NSA_SPANS_H_

#include <cstdint>

#include "blocks.h"

namespace jax_nsa {

// Positions [begin, end) of a sequence.
struct Span {
  int64_t begin, end;

  JAX_NSA_HOST_DEVICE constexpr int64_t size() const { return end > begin ? end - begin : 0; }
};

// The positions below `end` that block `id` of so many positions holds.
JAX_NSA_HOST_DEVICE constexpr Span BlockSpan(int64_t block_size, int64_t id, int64_t end) {
  const int64_t begin = id * block_size, whole = begin + block_size;
  return {begin, whole < end ? whole : end};
}

// Of the `count` newest of `limit` positions, those below `end`.
JAX_NSA_HOST_DEVICE constexpr Span NewestSpan(int64_t count, int64_t limit, int64_t end) {
  return {limit > count ? limit - count : 0, limit < end ? limit : end};
}

// Rows of a pool, one after the other.
struct RowRun {
  int64_t first, count;
};

// The rows of a span up to the end of a page; `pages` is the sequence's row of the block table.
JAX_NSA_HOST_DEVICE constexpr RowRun FirstRun(const int32_t* pages, int64_t page_size,
                                              const Span& span) {
  const int64_t column = span.begin / page_size, row = span.begin - column * page_size;
  const int64_t left = page_size - row, size = span.size();
  return {pages[column] * page_size + row, left < size ? left : size};
}

// Calls function(run) for all rows of a span.
template <class Function>
JAX_NSA_HOST_DEVICE void ForRuns(const int32_t* pages, int64_t page_size, Span span,
                                 Function function) {
  while (span.begin < span.end) {
    const RowRun run = FirstRun(pages, page_size, span);
    function(run);
    span.begin += run.count;
  }
}

}  // namespace jax_nsa

#endif  // JAX_NSA_SPANS_H_
