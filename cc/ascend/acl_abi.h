// The part of CANN's C interface that is called here, declared once. CANN is never linked: the
// functions are looked up in its libraries when the program runs.
//
// Names are CANN's own, so that a reader finds them in its documentation.

#ifndef JAX_NSA_ASCEND_ACL_ABI_H_
#define JAX_NSA_ASCEND_ACL_ABI_H_

#include <cstddef>
#include <cstdint>

namespace jax_nsa::ascend {

using aclError = int;
using aclnnStatus = int32_t;
using aclrtStream = void*;
struct aclTensor;
struct aclIntArray;
struct aclOpExecutor;

enum aclDataType : int { ACL_FLOAT16 = 1, ACL_INT32 = 3, ACL_BOOL = 12, ACL_BF16 = 27 };
enum aclFormat : int { ACL_FORMAT_ND = 2 };
enum aclrtMemMallocPolicy : int { ACL_MEM_MALLOC_HUGE_FIRST = 0 };
enum aclrtMemcpyKind : int { ACL_MEMCPY_HOST_TO_DEVICE = 1, ACL_MEMCPY_DEVICE_TO_HOST = 2 };

inline constexpr int ACL_SUCCESS = 0;  // of aclError and aclnnStatus alike
inline constexpr aclError ACL_ERROR_REPEAT_INITIALIZE = 100002;

// F(result, name, parameters) for each function of one library.

// libascendcl.so
#define JAX_NSA_ACL_RUNTIME_FUNCTIONS(F)                                                      \
  F(aclError, aclInit, (const char* config_path))                                             \
  F(const char*, aclGetRecentErrMsg, ())                                                      \
  F(aclError, aclrtGetDeviceCount, (uint32_t* count))                                         \
  F(aclError, aclrtGetDevice, (int32_t* device))                                              \
  F(aclError, aclrtSetDevice, (int32_t device))                                               \
  F(aclError, aclrtCreateStream, (aclrtStream * stream))                                      \
  F(aclError, aclrtSynchronizeStream, (aclrtStream stream))                                   \
  F(aclError, aclrtDestroyStream, (aclrtStream stream))                                       \
  F(aclError, aclrtMalloc, (void** device_pointer, size_t size, aclrtMemMallocPolicy policy)) \
  F(aclError, aclrtFree, (void* device_pointer))                                              \
  F(aclError, aclrtMallocHost, (void** host_pointer, size_t size))                            \
  F(aclError, aclrtFreeHost, (void* host_pointer))                                            \
  F(aclError, aclrtMemcpyAsync,                                                               \
    (void* destination, size_t destination_size, const void* source, size_t count,            \
     aclrtMemcpyKind kind, aclrtStream stream))                                               \
  F(aclError, aclrtMemsetAsync,                                                               \
    (void* device_pointer, size_t size, int32_t value, size_t count, aclrtStream stream))

// libnnopbase.so
#define JAX_NSA_ACL_TENSOR_FUNCTIONS(F)                                                           \
  F(aclTensor*, aclCreateTensor,                                                                  \
    (const int64_t* view_dims, uint64_t view_rank, aclDataType data_type, const int64_t* strides, \
     int64_t offset, aclFormat format, const int64_t* storage_dims, uint64_t storage_rank,        \
     void* device_pointer))                                                                       \
  F(aclnnStatus, aclDestroyTensor, (const aclTensor* tensor))                                     \
  F(aclIntArray*, aclCreateIntArray, (const int64_t* values, uint64_t size))                      \
  F(aclnnStatus, aclDestroyIntArray, (const aclIntArray* array))

// libopapi.so, or another of the libraries that carry operators.
#define JAX_NSA_ACL_OPERATOR_FUNCTIONS(F)                                                          \
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

#define JAX_NSA_ACL_FUNCTIONS(F)   \
  JAX_NSA_ACL_RUNTIME_FUNCTIONS(F) \
  JAX_NSA_ACL_TENSOR_FUNCTIONS(F)  \
  JAX_NSA_ACL_OPERATOR_FUNCTIONS(F)

// The functions, found: one pointer each, under its own name.
struct Api {
#define JAX_NSA_ACL_MEMBER(result, name, parameters) result(*name) parameters;
  JAX_NSA_ACL_FUNCTIONS(JAX_NSA_ACL_MEMBER)
#undef JAX_NSA_ACL_MEMBER
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_ACL_ABI_H_
