// Runs of aclnnNsaSelectedAttentionInfer on arrays that lie on the device.

#ifndef JAX_NSA_ASCEND_SELECT_ATTENTION_LAUNCH_H_
#define JAX_NSA_ASCEND_SELECT_ATTENTION_LAUNCH_H_

#include <cstdint>
#include <vector>

#include "ascend/context.h"
#include "ascend/runtime.h"
#include "ascend/select_attention_abi.h"
#include "select_attention.h"

namespace jax_nsa::ascend {

// What CANN's kernel takes, from its documentation and torch_npu's. It reads the blocks of the
// first key/value head for all of them, so only one is right.
struct SelectAttentionLimits {
  static constexpr int64_t kKeyValueHeads = 1;
  static constexpr int64_t kHeadSize = 192, kValueSize = 128;  // no others
  static constexpr int64_t kMaxGroup = 16;                     // query heads
  static constexpr int64_t kSmallPage = 64, kLargePage = 128;  // rows; no others
  static constexpr int64_t kMaxSequences = 3072;               // of one run
};

// Enqueues the operator on the context's stream, in as many runs as its limit on sequences asks
// for; does not wait. `arrays` are device pointers, of the sizes in `problem`: each sequence has
// one row of query, and `lengths` positions, at least one. Of each row's blocks the first is one
// that the sequence has begun, and none comes after the first -1: CANN's kernel would never end, or
// not see it.
ffi::Error Launch(const SelectAttentionApi& functions, const select_attention::Problem& problem,
                  const select_attention::Arrays& arrays, const std::vector<int64_t>& lengths,
                  Context& context);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_SELECT_ATTENTION_LAUNCH_H_
