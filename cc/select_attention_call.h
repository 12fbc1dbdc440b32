// From an XLA FFI call to a call of the selected branch, checked once for every handler.

#ifndef JAX_NSA_SELECT_ATTENTION_CALL_H_
#define JAX_NSA_SELECT_ATTENTION_CALL_H_

#include <cstdint>

#include "paged_call.h"
#include "select_attention.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::select_attention {

struct Call : PagedCall {
  Problem problem;
  Arrays arrays;
  bool tokens_apart;  // whether the user's topk_indices have an axis of tokens
};

// Decodes and checks the buffers of one call against each other. The Python front door has checked
// them in the user's terms; this guards the kernels against any other caller.
xla::ffi::ErrorOr<Call> Decode(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                               xla::ffi::Dictionary attributes);

// The error for the first fault that the call has, or success: names the argument, the value and
// what is legal. For operands on the host.
xla::ffi::Error FindFault(const Call& call);

}  // namespace jax_nsa::select_attention

#endif  // JAX_NSA_SELECT_ATTENTION_CALL_H_
