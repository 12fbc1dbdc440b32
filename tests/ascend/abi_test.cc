// Holds cc/ascend/acl_abi.h to CANN's runtime headers, and to a header with the types of the other
// functions, as torch_npu knows them. Compiling it is the test.

#include <type_traits>

#include "acl/acl.h"
#include "ascend/acl_abi.h"
#include "tensor_types.h"

namespace {

namespace ours = jax_nsa::ascend;

// What a type is to a caller of a C function: enums are their integers (ours name the type, C's
// are of the same size), and our structures CANN's of the same name.
template <typename T, typename = void>
struct Passed {
  using Type = T;
};
template <typename T>
struct Passed<T, std::enable_if_t<std::is_enum_v<T>>> {
  static_assert(sizeof(T) == sizeof(int));
  using Type = int;
};

template <>
struct Passed<ours::aclTensor*> {
  using Type = ::aclTensor*;
};
template <>
struct Passed<const ours::aclTensor*> {
  using Type = const ::aclTensor*;
};
template <>
struct Passed<ours::aclIntArray*> {
  using Type = ::aclIntArray*;
};
template <>
struct Passed<const ours::aclIntArray*> {
  using Type = const ::aclIntArray*;
};

template <typename Function>
struct Signature;
template <typename Result, typename... Parameters>
struct Signature<Result (*)(Parameters...)> {
  using Type = typename Passed<Result>::Type (*)(typename Passed<Parameters>::Type...);
};

#define HOLD(result, name, parameters)                                     \
  static_assert(std::is_same_v<Signature<decltype(ours::Api::name)>::Type, \
                               Signature<decltype(&::name)>::Type>,        \
                #name);
JAX_NSA_ACL_RUNTIME_FUNCTIONS(HOLD)
#undef HOLD
#define HOLD(result, name, parameters)                                                        \
  static_assert(                                                                              \
      std::is_same_v<Signature<decltype(ours::Api::name)>::Type, Signature<::_##name>::Type>, \
      #name);
JAX_NSA_ACL_TENSOR_FUNCTIONS(HOLD)
#undef HOLD

static_assert(std::is_same_v<ours::aclError, ::aclError>);
static_assert(std::is_same_v<ours::aclrtStream, ::aclrtStream>);
#define HOLD(name) static_assert(static_cast<int>(ours::name) == static_cast<int>(::name), #name)
HOLD(ACL_FLOAT16);
HOLD(ACL_INT32);
HOLD(ACL_BOOL);
HOLD(ACL_BF16);
HOLD(ACL_FORMAT_ND);
HOLD(ACL_MEM_MALLOC_HUGE_FIRST);
HOLD(ACL_MEMCPY_HOST_TO_DEVICE);
HOLD(ACL_MEMCPY_DEVICE_TO_HOST);
HOLD(ACL_SUCCESS);
HOLD(ACL_ERROR_REPEAT_INITIALIZE);

}  // namespace
