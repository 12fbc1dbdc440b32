#include "ascend/staging.h"

#include <algorithm>
#include <cstring>

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

void CopyRows(const void* from, size_t from_bytes, int64_t rows, size_t to_bytes, void* to) {
  const size_t used = std::min(from_bytes, to_bytes);
  const auto* in = static_cast<const std::byte*>(from);
  auto* out = static_cast<std::byte*>(to);
  for (int64_t i = 0; i < rows; ++i, in += from_bytes, out += to_bytes) {
    std::memcpy(out, in, used);
    std::memset(out + used, 0, to_bytes - used);
  }
}

ffi::Error FetchIntegers(const std::vector<Integers>& operands, Context& context) {
  if (operands.empty()) return ffi::Error::Success();
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
