#include "ascend/tensor.h"

#include <string>

namespace jax_nsa::ascend {

aclTensor* Arguments::AddTensor(const Dims& dims, aclDataType type, const void* data) {
  if (error_.failure()) return nullptr;
  Dims strides(dims.size(), 1);
  for (size_t axis = dims.size() - 1; axis > 0; --axis) {
    strides[axis - 1] = strides[axis] * dims[axis];
  }
  // CANN's tensors are all writable; those that hold operands are only read.
  aclTensor* created =
      api_.aclCreateTensor(dims.data(), dims.size(), type, strides.data(), /*offset=*/0,
                           ACL_FORMAT_ND, dims.data(), dims.size(), const_cast<void*>(data));
  if (created == nullptr) {
    error_ = NullError(api_, "aclCreateTensor");
  } else {
    tensors_.emplace_back(api_, created);
  }
  return created;
}

aclIntArray* Arguments::AddIntegers(const std::vector<int64_t>& values) {
  if (error_.failure()) return nullptr;
  aclIntArray* created = api_.aclCreateIntArray(values.data(), values.size());
  if (created == nullptr) {
    error_ = NullError(api_, "aclCreateIntArray");
  } else {
    arrays_.emplace_back(api_, created);
  }
  return created;
}

ffi::Error Arguments::Release() {
  for (IntArray& array : arrays_) JAX_NSA_RETURN_IF_ERROR(array.Reset());
  for (Tensor& tensor : tensors_) JAX_NSA_RETURN_IF_ERROR(tensor.Reset());
  return ffi::Error::Success();
}

ffi::Error Execute(const Execution& execution, Context& context) {
  const Api& api = context.api();
  const std::string name = execution.name;
  if (execution.executor == nullptr) return NullError(api, (name + "GetWorkspaceSize").c_str());
  // From here to the launch an error loses the executor: CANN frees it with the launch, and has no
  // other way for executors that are used once.
  const uint64_t size = execution.workspace_size;
  JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.workspace, size));
  void* const workspace = size > 0 ? context.workspace.data() : nullptr;
  return StatusError(api, execution.name,
                     execution.function(workspace, size, execution.executor, context.stream()));
}

}  // namespace jax_nsa::ascend
