#include "ascend/compress_attention_device.h"

#include <cstddef>
#include <optional>
#include <string>
#include <utility>

#include "ascend/handlers.h"
#include "ascend/tensor.h"

namespace jax_nsa::ascend {
namespace {

constexpr char kName[] = "nsa_compress_attention_infer";

}  // namespace

ffi::ErrorOr<Call> DecodeCompressAttention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                           ffi::Dictionary attributes) {
  const auto refuse = [](const std::string& reason) {
    return ffi::Unexpected(Unserved(kName, reason));
  };
  ffi::ErrorOr<Call> call = compress_attention::Decode(args, rets, attributes);
  if (call.has_error()) return call;
  ffi::Error unread = CheckPagedForCann(kName, call->problem);
  if (unread.failure()) return ffi::Unexpected(std::move(unread));
  if (call->problem.blocks.aligned || call->problem.forced.first != 1 ||
      call->problem.forced.last != 2) {
    return refuse("chooses blocks by its own rule only");
  }
  if (call->arrays.lse != nullptr) return refuse("gives no log-sum-exp");
  if (call->problem.page_size > kMaxPageSize) {
    return refuse("takes pages of at most " + std::to_string(kMaxPageSize) + " rows, got " +
                  std::to_string(call->problem.page_size));
  }
  if (call->problem.sequences > kMaxSequences) {
    return refuse("takes at most " + std::to_string(kMaxSequences) + " sequences");
  }
  return call;
}

ffi::Error CompressAttentionOnDevice::Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                             ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeCompressAttention(args, rets, attributes);
  if (call.has_error()) return call.error();
  const auto constant = ConstantLengths<int32_t>(attributes, call->problem.sequences);
  if (constant.has_error()) return constant.error();
  call_ = on_host_ = *call;
  if (constant->has_value() && call_.arrays.token_counts == nullptr) {
    constant_lengths_ = **constant;
    on_host_.arrays.lengths = constant_lengths_.data();
    page_ids_ = PageIds::kOnDevice;
  }
  return ffi::Error::Success();
}

void CompressAttentionOnDevice::AddIntegers(std::vector<Integers>* fetched) {
  if (page_ids_ == PageIds::kOnDevice) return;
  const Problem& problem = call_.problem;
  compress_attention::Arrays& arrays = on_host_.arrays;
  fetched->push_back({&arrays.block_table, problem.sequences * problem.pages_per_sequence});
  for (const int32_t** each : {&arrays.lengths, &arrays.token_counts, &arrays.early_counts,
                               &arrays.select_lengths, &arrays.first_rows}) {
    fetched->push_back({each, problem.sequences});
  }
}

ffi::Error CompressAttentionOnDevice::Plan() {
  const Problem& problem = call_.problem;
  JAX_NSA_RETURN_IF_ERROR(MakeRequest(on_host_, page_ids_, &request_));
  first_absent_ = problem.rows;
  if (request_.total_tokens == problem.rows) return ffi::Error::Success();
  if (problem.tokens > 0) {
    if (problem.tokens > kMaxTokens) {
      return Unserved(kName, "takes at most " + std::to_string(kMaxTokens) +
                                 " query rows for each sequence, got " +
                                 std::to_string(problem.tokens));
    }
    layout_ = QueryLayout::kPadded;
    first_absent_ = 0;
    return ffi::Error::Success();
  }
  first_absent_ = 0;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    if (request_.first_rows[b] != first_absent_) {
      return Unserved(kName, "takes consecutive rows of query, and first_rows[" +
                                 std::to_string(b) + "] leaves a gap");
    }
    first_absent_ += request_.token_counts[b];
  }
  return ffi::Error::Success();
}

ffi::Error CompressAttentionOnDevice::Fill(int64_t first, uint8_t absent, Context& context) const {
  const Problem& problem = call_.problem;
  const auto fill = [&](void* array, size_t row_bytes, int value) {
    const size_t size = (problem.rows - first) * row_bytes;
    return JAX_NSA_ACL_CALL(context.api(), aclrtMemsetAsync,
                            static_cast<std::byte*>(array) + first * row_bytes, size, value, size,
                            context.stream());
  };
  JAX_NSA_RETURN_IF_ERROR(
      fill(call_.arrays.attention, problem.heads * problem.value_size * kElementSize, 0));
  return fill(call_.arrays.topk_indices,
              problem.key_value_heads * problem.select_count * sizeof(int32_t), absent);
}

ffi::Error CompressAttentionOnDevice::Enqueue(const CompressAttentionApi& functions, uint8_t absent,
                                              Context& context) const {
  if (first_absent_ < call_.problem.rows) {
    JAX_NSA_RETURN_IF_ERROR(Fill(first_absent_, absent, context));
  }
  return Launch(functions, call_.problem, call_.arrays, request_, layout_, context);
}

}  // namespace jax_nsa::ascend
