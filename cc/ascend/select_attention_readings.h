// What rows of query read of paged caches on the host, gathered for CANN's kernel.

#ifndef JAX_NSA_ASCEND_SELECT_ATTENTION_READINGS_H_
#define JAX_NSA_ASCEND_SELECT_ATTENTION_READINGS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ascend/select_attention_launch.h"
#include "select_attention_call.h"
#include "spans.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::ascend {

constexpr int64_t kGatheredPage = SelectAttentionLimits::kLargePage;  // rows

// The positions that a row reads for a key/value head in one of the branches.
struct Reading {
  int64_t row, head;
  void* attention;       // the branch's
  const int32_t* pages;  // the sequence's row of the block table
  std::vector<Span> spans;
  int64_t size;        // positions
  int64_t first_page;  // of those that it is gathered into

  int64_t num_pages() const { return (size + kGatheredPage - 1) / kGatheredPage; }
};

// All readings of a call that are not empty.
class Readings {
 public:
  explicit Readings(const select_attention::Call& call) : call_(call) {}

  // Collects them, and makes all results 0. A fault fails the call, or where it may not makes NaN
  // of what is concerned.
  xla::ffi::Error Collect();

  // Makes all results NaN.
  void FillWithNaN();

  const std::vector<Reading>& all() const { return readings_; }
  int64_t longest() const { return longest_; }      // positions
  int64_t num_pages() const { return num_pages_; }  // of all together

 private:
  xla::ffi::Error AddRow(int64_t sequence, int64_t row, int64_t head, int64_t limit);
  xla::ffi::Error Add(Reading reading);
  void FillWithNaN(int64_t row, int64_t head);

  const select_attention::Call& call_;
  std::vector<Reading> readings_;
  int64_t longest_ = 0, num_pages_ = 0;
};

// Copies the rows of one head that a reading names out of a pool, each from `size` elements widened
// to `padded_size` by zeros, to its pages. The rest of the last page becomes zeros too: in a pool
// it may be anything, and a kernel may multiply it by a zero probability.
void Gather(const select_attention::Problem& problem, const Reading& reading, const void* pool,
            int64_t size, int64_t padded_size, std::byte* pages);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_SELECT_ATTENTION_READINGS_H_
