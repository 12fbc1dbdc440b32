// Runs of aclnnNsaCompressWithCache on arrays that lie on the device.

#ifndef JAX_NSA_ASCEND_COMPRESS_LAUNCH_H_
#define JAX_NSA_ASCEND_COMPRESS_LAUNCH_H_

#include <cstdint>
#include <vector>

#include "ascend/compress_abi.h"
#include "ascend/context.h"
#include "ascend/runtime.h"
#include "compress.h"

namespace jax_nsa::ascend {

// What CANN's kernel takes, from its documentation and torch_npu's.
struct CompressLimits {
  static constexpr int64_t kMaxWindow = 64;  // tokens
  static constexpr int64_t kMaxHeads = 64;
  static constexpr int64_t kHeadSizeGranule = 16;
  static constexpr int64_t kSmallPage = 64, kLargePage = 128;  // rows; no others
  static constexpr int64_t kMaxSequences = 2048;               // of one run
};

// Enqueues the operator for one pair on the context's stream, in as many runs as its limit on
// sequences asks for; does not wait. Arrays are device pointers, of the sizes in `problem`. A
// sequence whose entry of `lengths` ends a window has it compressed; slots of the others are not
// looked at. CANN checks neither slots nor pages.
ffi::Error Launch(const CompressApi& functions, const compress::Problem& problem,
                  const compress::Arrays& arrays, const compress::Pair& pair,
                  const std::vector<int64_t>& lengths, Context& context);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_LAUNCH_H_
