// From an XLA FFI call to the calls of a decode step, of which the second reads the blocks that the
// first one chooses.

#ifndef JAX_NSA_STEP_CALL_H_
#define JAX_NSA_STEP_CALL_H_

#include <optional>

#include "compress_attention_call.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::step {

struct Call {
  compress_attention::Call compressed;
  select_attention::Call chosen;                 // perhaps with the window
  std::optional<select_attention::Call> window;  // where it has pools of its own
};

// Decodes each call as its operator does (joint_call.h). The chosen blocks are no operand of the
// second call, but the first one's result.
xla::ffi::ErrorOr<Call> Decode(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                               xla::ffi::Dictionary attributes);

}  // namespace jax_nsa::step

#endif  // JAX_NSA_STEP_CALL_H_
