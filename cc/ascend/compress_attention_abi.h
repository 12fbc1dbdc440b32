// CANN's operator for the compressed branch, declared once, by CANN's own names.

#ifndef JAX_NSA_ASCEND_COMPRESS_ATTENTION_ABI_H_
#define JAX_NSA_ASCEND_COMPRESS_ATTENTION_ABI_H_

#include "ascend/acl_abi.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

#define JAX_NSA_ACL_COMPRESS_ATTENTION_FUNCTIONS(F)                                                \
  F(aclnnStatus, aclnnNsaCompressAttentionInferGetWorkspaceSize,                                   \
    (const aclTensor* query, const aclTensor* key, const aclTensor* value,                         \
     const aclTensor* attention_mask, const aclTensor* block_table,                                \
     const aclIntArray* actual_q_seq_len, const aclIntArray* actual_cmp_kv_seq_len,                \
     const aclIntArray* actual_sel_kv_seq_len, const aclTensor* topk_mask, int64_t num_heads,      \
     int64_t num_key_value_heads, int64_t select_block_size, int64_t select_block_count,           \
     int64_t compress_block_size, int64_t compress_block_stride, double scale_value, char* layout, \
     int64_t page_block_size, int64_t sparse_mode, const aclTensor* output,                        \
     const aclTensor* topk_output, uint64_t* workspace_size, aclOpExecutor** executor))            \
  F(aclnnStatus, aclnnNsaCompressAttentionInfer,                                                   \
    (void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream))

struct CompressAttentionApi {
  JAX_NSA_ACL_COMPRESS_ATTENTION_FUNCTIONS(JAX_NSA_ACL_MEMBER)

  // The name of the first function that the library lacks; null if it has all.
  const char* FindIn(void* library) {
    JAX_NSA_ACL_COMPRESS_ATTENTION_FUNCTIONS(JAX_NSA_ACL_FIND)
    return nullptr;
  }
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_ATTENTION_ABI_H_
