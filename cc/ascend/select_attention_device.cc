#include "ascend/select_attention_device.h"

#include <string>
#include <utility>

#include "ascend/handlers.h"
#include "ascend/select_attention_launch.h"

namespace jax_nsa::ascend {
namespace {

using select_attention::Call;
using select_attention::Problem;
using Limits = SelectAttentionLimits;

constexpr char kName[] = "nsa_select_attention_infer";

ffi::Error CheckForDevice(const Problem& problem) {
  const auto refuse = [](const std::string& what, int64_t got) {
    return Unserved(kName, "takes on the device " + what + ", got " + std::to_string(got));
  };
  if (problem.tokens != 1) return refuse("one row of query for each sequence", problem.tokens);
  if (problem.select_count == 0 || problem.window_size != 0) {
    return refuse("blocks and no window, which has", problem.window_size);
  }
  if (problem.key_value_heads != Limits::kKeyValueHeads) {
    return refuse("one key/value head", problem.key_value_heads);
  }
  if (problem.heads > Limits::kMaxGroup) {
    return refuse("at most " + std::to_string(Limits::kMaxGroup) + " query heads", problem.heads);
  }
  if (problem.head_size != Limits::kHeadSize) {
    return refuse("heads of " + std::to_string(Limits::kHeadSize), problem.head_size);
  }
  if (problem.value_size != Limits::kValueSize) {
    return refuse("value heads of " + std::to_string(Limits::kValueSize), problem.value_size);
  }
  if (problem.page_size != Limits::kSmallPage && problem.page_size != Limits::kLargePage) {
    return refuse("pages of 64 or 128 rows", problem.page_size);
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::ErrorOr<Call> DecodeSelectAttention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                         ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = select_attention::Decode(args, rets, attributes);
  if (call.has_error()) return call;
  ffi::Error unread = CheckPagedForCann(kName, call->problem);
  if (unread.failure()) return ffi::Unexpected(std::move(unread));
  if (call->problem.partial || call->arrays.lse != nullptr || call->arrays.window_lse != nullptr) {
    return ffi::Unexpected(Unserved(kName, "gives no log-sum-exp"));
  }
  return call;
}

ffi::Error SelectAttentionOnDevice::Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                           ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeSelectAttention(args, rets, attributes);
  if (call.has_error()) return call.error();
  JAX_NSA_RETURN_IF_ERROR(CheckForDevice(call->problem));
  const auto constant = ConstantLengths<int64_t>(attributes, call->problem.sequences);
  if (constant.has_error()) return constant.error();
  call_ = *call;
  if (constant->has_value()) {
    lengths_ = **constant;
  } else {
    fetched_lengths_ = call_.arrays.lengths;
  }
  return ffi::Error::Success();
}

void SelectAttentionOnDevice::AddIntegers(std::vector<Integers>* fetched) {
  if (fetched_lengths_ != nullptr) {
    fetched->push_back({&fetched_lengths_, call_.problem.sequences});
  }
}

ffi::Error SelectAttentionOnDevice::Plan() {
  const Problem& problem = call_.problem;
  if (fetched_lengths_ != nullptr) {
    lengths_.assign(fetched_lengths_, fetched_lengths_ + problem.sequences);
  }
  for (int64_t length : lengths_) {
    if (length < 1 || length > problem.capacity()) {
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, "lengths must be in [1, " +
                                                              std::to_string(problem.capacity()) +
                                                              "], got " + std::to_string(length));
    }
  }
  return ffi::Error::Success();
}

ffi::Error SelectAttentionOnDevice::Enqueue(const SelectAttentionApi& functions,
                                            Context& context) const {
  return Launch(functions, call_.problem, call_.arrays, lengths_, context);
}

}  // namespace jax_nsa::ascend
