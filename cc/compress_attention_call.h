// From an XLA FFI call to a call of the compressed branch, checked once for every handler.

#ifndef JAX_NSA_COMPRESS_ATTENTION_CALL_H_
#define JAX_NSA_COMPRESS_ATTENTION_CALL_H_

#include <cstdint>

#include "compress_attention.h"
#include "paged_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::compress_attention {

struct Call : PagedCall {
  Problem problem;
  Arrays arrays;
};

// Decodes and checks the buffers of one call against each other. The Python front door has checked
// them in the user's terms; this guards the kernels against any other caller.
xla::ffi::ErrorOr<Call> Decode(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                               xla::ffi::Dictionary attributes);

// The error for a sequence's fault: names the argument, the value and what is legal. `page` is the
// column of block_table, for kPageId.
xla::ffi::Error FaultError(const Call& call, Fault fault, int64_t sequence, int64_t page = 0);

}  // namespace jax_nsa::compress_attention

#endif  // JAX_NSA_COMPRESS_ATTENTION_CALL_H_
