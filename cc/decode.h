// From an FFI call to a Problem and its Arrays, checked once for every handler; and the sentence
// for each fault of a sequence.

#ifndef JAX_NSA_DECODE_H_
#define JAX_NSA_DECODE_H_

#include <cstdint>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

// What every handler binds: query, key, value, block_table, lengths, then token_counts,
// early_counts and first_rows where the call has them; attention, topk_indices, then lse and
// block_scores where wanted. A handler adds its own contexts and results.
struct Call {
  Problem problem;
  Arrays arrays;
};

// The attributes of every handler, as jax_nsa/native.py writes them.
struct Attributes {
  float scale;
  int64_t key_value_heads;
  int64_t compress_block_size;
  int64_t compress_stride;
  int64_t select_block_size;
};

// Decodes and checks the buffers of one call against each other. The Python front door has checked
// them in the user's terms; this guards the kernels against any other caller.
xla::ffi::ErrorOr<Call> Decode(xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
                               const Attributes& attributes, size_t extra_results = 0);

// The error for a sequence's fault: names the argument, the value and what is legal. `page` is the
// column of block_table, for kPageId.
xla::ffi::Error FaultError(const Call& call, Fault fault, int64_t sequence, int64_t page = 0);

}  // namespace jax_nsa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_nsa::Attributes, xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<int64_t>("key_value_heads"),
                                      xla::ffi::StructMember<int64_t>("compress_block_size"),
                                      xla::ffi::StructMember<int64_t>("compress_stride"),
                                      xla::ffi::StructMember<int64_t>("select_block_size"));

#endif  // JAX_NSA_DECODE_H_
