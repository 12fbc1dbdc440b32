// From an XLA FFI call to a call of compression into the cache, checked once for every handler.

#ifndef JAX_NSA_COMPRESS_CALL_H_
#define JAX_NSA_COMPRESS_CALL_H_

#include <cstdint>
#include <vector>

#include "compress.h"
#include "paged_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::compress {

struct Call : PagedCall {
  Problem problem;
  Arrays arrays;
};

// Decodes and checks the buffers of one call against each other. The Python front door has checked
// them in the user's terms; this guards the kernels against any other caller.
xla::ffi::ErrorOr<Call> Decode(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                               xla::ffi::Dictionary attributes);

// A window that becomes a row of the cache.
struct Write {
  int64_t sequence;
  int64_t first;  // token of the window
  int64_t row;
};

// The windows that a call writes, or the error for the first fault: names the argument, the value
// and what is legal. Where faults do not fail the call, their windows are left out. For operands on
// the host.
xla::ffi::ErrorOr<std::vector<Write>> FindWrites(const Call& call);

}  // namespace jax_nsa::compress

#endif  // JAX_NSA_COMPRESS_CALL_H_
