// One run of aclnnNsaCompressAttentionInfer on arrays that lie on the device.

#ifndef JAX_NSA_ASCEND_COMPRESS_ATTENTION_LAUNCH_H_
#define JAX_NSA_ASCEND_COMPRESS_ATTENTION_LAUNCH_H_

#include "ascend/compress_attention_abi.h"
#include "ascend/compress_attention_request.h"
#include "ascend/context.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

// How the tokens of query and of the results lie.
enum class QueryLayout {
  kPacked,  // CANN's TND: row after row, no padding
  kPadded,  // CANN's BSND: `problem.tokens` rows for each sequence
};

// Enqueues the operator on the context's stream; does not wait. `arrays` are device pointers, of
// the sizes in `problem`; the host's integers are in `request`.
ffi::Error Launch(const CompressAttentionApi& functions, const Problem& problem,
                  const Arrays& arrays, const Request& request, QueryLayout layout,
                  Context& context);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_ATTENTION_LAUNCH_H_
