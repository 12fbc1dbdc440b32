// The stand-in's libnnopbase.so: tensors and integer arrays.

#include "standin.h"

using namespace standin;  // the interface below is C's
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

int Destroy(const char* function, const char* kind, const void* handle) {
  const Lock lock(Mutex());
  int injected_status = kSuccess;
  (void)Enter(function, &injected_status);
  if (handle == nullptr) return kSuccess;
  if (!Remove(kind, handle)) {
    return Violation(kInvalidOperand, std::string(function) + ": not a live " + kind);
  }
  return injected_status;
}

}  // namespace

extern "C" {

STANDIN_EXPORT void* aclCreateTensor(const int64_t* view_dims, uint64_t view_rank, int dtype,
                                     const int64_t* strides, int64_t offset, int format,
                                     const int64_t* storage_dims, uint64_t storage_rank,
                                     void* data) {
  const Lock lock(Mutex());
  int status = kSuccess;
  if (Enter("aclCreateTensor", &status) != Fault::kNone) return nullptr;
  if (view_dims == nullptr || strides == nullptr || storage_dims == nullptr) {
    Violation(kNullParameter, "aclCreateTensor: null dims");
    return nullptr;
  }
  auto tensor = std::make_shared<Tensor>();
  tensor->dims.assign(view_dims, view_dims + view_rank);
  tensor->strides.assign(strides, strides + view_rank);
  tensor->storage_dims.assign(storage_dims, storage_dims + storage_rank);
  tensor->offset = offset;
  tensor->dtype = dtype;
  tensor->format = format;
  tensor->data = data;
  return NewHandle("tensor", tensor);
}

STANDIN_EXPORT int aclDestroyTensor(const void* tensor) {
  return Destroy("aclDestroyTensor", "tensor", tensor);
}

STANDIN_EXPORT void* aclCreateIntArray(const int64_t* values, uint64_t size) {
  const Lock lock(Mutex());
  int status = kSuccess;
  if (Enter("aclCreateIntArray", &status) != Fault::kNone) return nullptr;
  if (values == nullptr && size > 0) {
    Violation(kNullParameter, "aclCreateIntArray: null values");
    return nullptr;
  }
  return NewHandle("integer array", std::make_shared<std::vector<int64_t>>(values, values + size));
}

STANDIN_EXPORT int aclDestroyIntArray(const void* array) {
  return Destroy("aclDestroyIntArray", "integer array", array);
}

}  // extern "C"
