// The part of CANN's C interface that serves every operator, declared once. CANN is never linked:
// the functions are looked up in its libraries when the program runs. Each operator's own functions
// stand in a file of theirs, as a CANN may have some operators and lack others.
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

// A function of F(result, name, parameters) as a member of a structure: a pointer under its name.
#define JAX_NSA_ACL_MEMBER(result, name, parameters) result(*name) parameters;

// The functions of both libraries, found.
struct Api {
  JAX_NSA_ACL_RUNTIME_FUNCTIONS(JAX_NSA_ACL_MEMBER)
  JAX_NSA_ACL_TENSOR_FUNCTIONS(JAX_NSA_ACL_MEMBER)
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_ACL_ABI_H_
