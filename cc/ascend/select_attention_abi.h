// CANN's operator for the selected branch, declared once, by CANN's own names.

#ifndef JAX_NSA_ASCEND_SELECT_ATTENTION_ABI_H_
#define JAX_NSA_ASCEND_SELECT_ATTENTION_ABI_H_

#include "ascend/acl_abi.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

#define JAX_NSA_ACL_SELECT_ATTENTION_FUNCTIONS(F)                                                  \
  F(aclnnStatus, aclnnNsaSelectedAttentionInferGetWorkspaceSize,                                   \
    (const aclTensor* query, const aclTensor* key, const aclTensor* value,                         \
     const aclTensor* topk_indices, const aclTensor* attention_mask, const aclTensor* block_table, \
     const aclIntArray* actual_q_seq_len, const aclIntArray* actual_kv_seq_len, char* layout,      \
     int64_t num_heads, int64_t num_key_value_heads, int64_t select_block_size,                    \
     int64_t select_block_count, int64_t page_block_size, double scale_value, int64_t sparse_mode, \
     aclTensor* output, uint64_t* workspace_size, aclOpExecutor** executor))                       \
  F(aclnnStatus, aclnnNsaSelectedAttentionInfer,                                                   \
    (void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream))

struct SelectAttentionApi {
  JAX_NSA_ACL_SELECT_ATTENTION_FUNCTIONS(JAX_NSA_ACL_MEMBER)

  // The name of the first function that the library lacks; null if it has all.
  const char* FindIn(void* library) {
    JAX_NSA_ACL_SELECT_ATTENTION_FUNCTIONS(JAX_NSA_ACL_FIND)
    return nullptr;
  }
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_SELECT_ATTENTION_ABI_H_
