#include "ascend/staging.h"

namespace jax_nsa::ascend {

ffi::Error Reserve(const Pieces& pieces, Context& context) {
  JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.arrays, pieces.end()));
  return context.Reserve(&context.staging, pieces.end());
}

ffi::Error CopyIn(size_t begin, size_t end, Context& context) {
  return JAX_NSA_ACL_CALL(context.api(), aclrtMemcpyAsync, context.arrays.data() + begin,
                          end - begin, context.staging.data() + begin, end - begin,
                          ACL_MEMCPY_HOST_TO_DEVICE, context.stream());
}

ffi::Error CopyOut(size_t begin, size_t end, Context& context) {
  return JAX_NSA_ACL_CALL(context.api(), aclrtMemcpyAsync, context.staging.data() + begin,
                          end - begin, context.arrays.data() + begin, end - begin,
                          ACL_MEMCPY_DEVICE_TO_HOST, context.stream());
}

ffi::Error FetchIntegers(const std::vector<Integers>& operands, Context& context) {
  Pieces pieces;
  for (const Integers& operand : operands) pieces.Add(operand.size * sizeof(int32_t));
  JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.staging, pieces.end()));
  pieces = Pieces();
  for (const Integers& operand : operands) {
    if (*operand.array == nullptr) continue;
    const size_t size = operand.size * sizeof(int32_t);
    std::byte* copy = context.staging.data() + pieces.Add(size);
    JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_CALL(context.api(), aclrtMemcpyAsync, copy, size,
                                             *operand.array, size, ACL_MEMCPY_DEVICE_TO_HOST,
                                             context.stream()));
    *operand.array = reinterpret_cast<const int32_t*>(copy);
  }
  return context.Synchronize();
}

}  // namespace jax_nsa::ascend
