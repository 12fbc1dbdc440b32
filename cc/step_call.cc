#include "step_call.h"

#include <string>

#include "ffi_call.h"
#include "joint_call.h"

namespace jax_nsa::step {

namespace ffi = xla::ffi;

ffi::ErrorOr<Call> Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attributes) {
  const auto refused = [](const char* why) {
    return ffi::Unexpected(InvalidArgument(std::string("nsa_decode_step: ") + why));
  };
  JointCall joint(args, rets, attributes);
  const Branch first = joint.Next("compressed_");
  const auto compressed = compress_attention::Decode(first.args, first.rets, first.attributes);
  if (compressed.has_error()) return ffi::Unexpected(compressed.error());
  const Branch second = joint.Next("chosen_", &first);
  const auto chosen = select_attention::Decode(second.args, second.rets, second.attributes);
  if (chosen.has_error()) return ffi::Unexpected(chosen.error());
  if (chosen->arrays.topk_indices != compressed->arrays.topk_indices) {
    return refused("the blocks that are read are not those that are chosen");
  }
  Call call = {*compressed, *chosen, std::nullopt};
  if (!joint.Done()) {
    const Branch third = joint.Next("window_");
    const auto window = select_attention::Decode(third.args, third.rets, third.attributes);
    if (window.has_error()) return ffi::Unexpected(window.error());
    call.window = *window;
  }
  if (!joint.Done()) return refused("there are arrays that belong to none of its branches");
  return call;
}

}  // namespace jax_nsa::step
