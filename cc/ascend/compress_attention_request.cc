#include "ascend/compress_attention_request.h"

#include <algorithm>
#include <string>

namespace jax_nsa::ascend {
namespace {

namespace ffi = xla::ffi;

ffi::Error Refused(const char* argument, int64_t sequence, int64_t value,
                   const std::string& reason) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    std::string(argument) + "[" + std::to_string(sequence) +
                        "] = " + std::to_string(value) + " cannot run on implementation " +
                        "\"ascend\": " + reason + "; another implementation can");
}

ffi::Error CheckLimits(const Problem& problem, const SequenceRows& rows, int64_t b,
                       int64_t length) {
  const auto refuse_length = [&](const std::string& reason) {
    return Refused("actual_cmp_seq_kvlen", b, length, reason);
  };
  if (length < 1 || length > kMaxLength) {
    return refuse_length("CANN's kernel takes 1 to " + std::to_string(kMaxLength) +
                         " compressed positions");
  }
  const int64_t blocks = problem.blocks.NumBlocks(length);
  if (blocks > kMaxBlocks) {
    return refuse_length("it has " + std::to_string(blocks) +
                         " select blocks, and CANN's kernel takes at most " +
                         std::to_string(kMaxBlocks));
  }
  if (blocks < problem.select_count) {
    return refuse_length("it has " + std::to_string(blocks) + " select blocks, fewer than " +
                         "select_block_count (" + std::to_string(problem.select_count) +
                         "), which CANN's kernel cannot pad");
  }
  if (rows.count < 1 || rows.count > kMaxTokens) {
    return Refused("actual_seq_qlen", b, rows.count,
                   "CANN's kernel takes 1 to " + std::to_string(kMaxTokens) + " query tokens");
  }
  if (rows.early >= rows.count) {
    return Refused("early_counts", b, rows.early,
                   "its last token sees the whole sequence in CANN's kernel");
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error MakeRequest(const Call& call, PageIds page_ids, Request* request) {
  const Problem& problem = call.problem;
  *request = Request();
  for (int64_t b = 0; b < problem.sequences; ++b) {
    SequenceRows rows;
    const Fault fault = FindRows(problem, call.arrays, b, &rows);
    if (fault != Fault::kNone) return FaultError(call, fault, b);
    const int64_t length = call.arrays.lengths[b];
    if (ffi::Error error = CheckLimits(problem, rows, b, length); error.failure()) return error;
    const int32_t* table = call.arrays.block_table + b * problem.pages_per_sequence;
    const int64_t pages = (length + problem.page_size - 1) / problem.page_size;
    for (int64_t p = 0; page_ids == PageIds::kOnHost && p < pages; ++p) {
      if (!IsPage(problem, table[p])) return FaultError(call, Fault::kPageId, b, p);
    }

    request->token_counts.push_back(rows.count);
    request->lengths.push_back(length);
    request->first_rows.push_back(rows.first);
    request->total_tokens += rows.count;
    request->most_tokens = std::max(request->most_tokens, rows.count);
    request->longest = std::max(request->longest, length);
    request->causal |= rows.early > 0;
    // Token t ignores the last position where count - 1 - t > slack, slack being the original
    // tokens past the last compress window. The call says `early`, how many tokens do; this
    // slack says the same, and as it is below kMaxTokens, thus below every stride, the original
    // length compresses to `length`, without which CANN ignores all tokens but one.
    const int64_t slack = rows.count - 1 - rows.early;
    request->select_lengths.push_back((length - 1) * problem.blocks.compress_stride +
                                      problem.blocks.compress_block_size + slack);
  }
  if (request->most_tokens <= 1) request->select_lengths.clear();
  return ffi::Error::Success();
}

}  // namespace jax_nsa::ascend
