// CANN's operator for compression into the cache, declared once, by CANN's own names.

#ifndef JAX_NSA_ASCEND_COMPRESS_ABI_H_
#define JAX_NSA_ASCEND_COMPRESS_ABI_H_

#include "ascend/acl_abi.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

#define JAX_NSA_ACL_COMPRESS_FUNCTIONS(F)                                               \
  F(aclnnStatus, aclnnNsaCompressWithCacheGetWorkspaceSize,                             \
    (const aclTensor* input, const aclTensor* weight, const aclTensor* slot_mapping,    \
     const aclIntArray* actual_seq_len, const aclTensor* block_table, char* layout,     \
     int64_t compress_block_size, int64_t compress_stride, int64_t actual_seq_len_type, \
     int64_t page_block_size, aclTensor* output_cache, uint64_t* workspace_size,        \
     aclOpExecutor** executor))                                                         \
  F(aclnnStatus, aclnnNsaCompressWithCache,                                             \
    (void* workspace, uint64_t workspace_size, aclOpExecutor* executor, aclrtStream stream))

struct CompressApi {
  JAX_NSA_ACL_COMPRESS_FUNCTIONS(JAX_NSA_ACL_MEMBER)

  // The name of the first function that the library lacks; null if it has all.
  const char* FindIn(void* library) {
    JAX_NSA_ACL_COMPRESS_FUNCTIONS(JAX_NSA_ACL_FIND)
    return nullptr;
  }
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_ABI_H_
