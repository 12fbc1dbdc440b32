// What CANN is told about the sequences of a call, checked against what its kernel can do.

#ifndef JAX_NSA_ASCEND_COMPRESS_ATTENTION_REQUEST_H_
#define JAX_NSA_ASCEND_COMPRESS_ATTENTION_REQUEST_H_

#include <cstdint>
#include <vector>

#include "compress_attention_call.h"

namespace jax_nsa::ascend {

using compress_attention::Arrays;
using compress_attention::Call;
using compress_attention::Problem;

// Limits of CANN's kernel, from its documentation.
inline constexpr int64_t kMaxPageSize = 128;  // rows
inline constexpr int64_t kMaxSequences = 10000;
inline constexpr int64_t kMaxTokens = 4;     // of a sequence
inline constexpr int64_t kMaxLength = 8192;  // compressed positions of a sequence
inline constexpr int64_t kMaxBlocks = 4096;  // select blocks of a sequence

// The host-side arguments of the operator; the vectors have an entry for each sequence.
struct Request {
  std::vector<int64_t> token_counts;
  std::vector<int64_t> lengths;
  // Original lengths. Empty with one token each, which needs none and older CANN refuses.
  std::vector<int64_t> select_lengths;
  bool causal = false;  // some token ignores its sequence's last position

  std::vector<int64_t> first_rows;  // of query and of the results
  int64_t total_tokens = 0;
  int64_t most_tokens = 0;
  int64_t longest = 0;
};

// Whether the ids in block_table can be read here.
enum class PageIds { kOnHost, kOnDevice };

// Fills `request` from a call whose integer operands lie on the host. Refuses what the operands
// hold that no backend accepts or that CANN's kernel cannot do, naming the operand and the value.
xla::ffi::Error MakeRequest(const Call& call, PageIds page_ids, Request* request);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_ATTENTION_REQUEST_H_
