// CANN on this machine: its libraries loaded and initialised once, its errors as FFI errors, and
// owners of what it hands out.

#ifndef JAX_NSA_ASCEND_RUNTIME_H_
#define JAX_NSA_ASCEND_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "ascend/acl_abi.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::ascend {

namespace ffi = xla::ffi;

// Returns from the enclosing function the error that `expression` gives, if it gives one.
#define JAX_NSA_RETURN_IF_ERROR(expression) \
  if (::xla::ffi::Error error_ = (expression); error_.failure()) return error_

// Calls a function of CANN that gives a status, and makes an Error of it.
#define JAX_NSA_ACL_CALL(api, function, ...) \
  ::jax_nsa::ascend::StatusError(api, #function, (api).function(__VA_ARGS__))

// Calls a function of one operator, likewise.
#define JAX_NSA_ACL_OPERATOR_CALL(api, functions, function, ...) \
  ::jax_nsa::ascend::StatusError(api, #function, (functions).function(__VA_ARGS__))

// The outcome of a call: on failure names the function, the status and what CANN says about it.
ffi::Error StatusError(const Api& api, const char* function, int status);

// The error for a function that returned null where it returns a new object.
ffi::Error NullError(const Api& api, const char* function);

// Loads the libraries of CANN that every operator needs and initialises it: once in the process,
// and for good, as CANN keeps threads and state that outlive any handle. What failed is tried again
// on the next call. Each library is looked for by the program loader's rules, then in
// $ASCEND_HOME_PATH/lib64; with JAX_NSA_CANN_LIBRARY_PATH set (directories, colon-separated) only
// there.
ffi::ErrorOr<const Api*> LoadApi();

// Looks through the libraries that carry operators, in CANN's order of precedence, until `find`
// takes one: it returns null, or the name of a function that the library lacks.
ffi::Error FindOperator(const std::function<const char*(void* library)>& find);

// dlsym; null if there is none.
void* FindSymbol(void* library, const char* name);

// A function of a library by its name, into the pointer; false if it has none.
template <typename Function>
bool FindFunction(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(FindSymbol(library, name));
  return *function != nullptr;
}

// For a member FindIn(library): returns the name of a function that the library lacks.
#define JAX_NSA_ACL_FIND(result, name, parameters) \
  if (!::jax_nsa::ascend::FindFunction(library, #name, &name)) return #name;

// The functions of one operator, found once in the process. All of them come from one library; a
// CANN that lacks this operator still serves the others. What failed is tried again.
template <typename Operator>
ffi::ErrorOr<const Operator*> LoadOperator() {
  static std::mutex mutex;
  static std::optional<Operator> found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!found.has_value()) {
    Operator functions = {};
    ffi::Error error = FindOperator([&](void* library) { return functions.FindIn(library); });
    if (error.failure()) return ffi::Unexpected(error);
    found = functions;
  }
  return &*found;
}

// Why CANN or an NPU cannot be used on this machine, with the remedy; nothing if they can.
std::optional<std::string> NpuUnavailable();

// The same for one operator of CANN.
template <typename Operator>
std::optional<std::string> Unavailable() {
  if (const ffi::ErrorOr<const Api*> api = LoadApi(); api.has_error()) return api.error().message();
  const ffi::ErrorOr<const Operator*> functions = LoadOperator<Operator>();
  return functions.has_error() ? functions.error().message() : NpuUnavailable();
}

// Makes a device the calling thread's current one, which CANN asks of every thread, and puts back
// the one it had: the thread may belong to a caller that uses CANN for itself.
class DeviceScope {
 public:
  explicit DeviceScope(const Api& api) : api_(api) {}
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  ffi::Error Enter(int32_t device);
  // The thread's current device; if it has none, enters `otherwise`.
  ffi::ErrorOr<int32_t> CurrentOr(int32_t otherwise);

 private:
  const Api& api_;
  std::optional<int32_t> previous_;
};

// Owns one object of CANN. `Kind` says what its pointer is and how it is given back.
template <typename Kind>
class Owned {
 public:
  using Pointer = typename Kind::Pointer;

  Owned() = default;
  Owned(const Api& api, Pointer pointer) : api_(&api), pointer_(pointer) {}
  Owned(Owned&& other) noexcept
      : api_(other.api_), pointer_(std::exchange(other.pointer_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    if (this != &other) {
      (void)Reset();
      api_ = other.api_;
      pointer_ = std::exchange(other.pointer_, nullptr);
    }
    return *this;
  }
  ~Owned() { (void)Reset(); }

  // Gives the object back. The destructor does so too, but cannot report what went wrong.
  ffi::Error Reset() {
    if (pointer_ == nullptr) return ffi::Error::Success();
    return Kind::GiveBack(*api_, std::exchange(pointer_, nullptr));
  }

  Pointer get() const { return pointer_; }

 private:
  const Api* api_ = nullptr;
  Pointer pointer_ = nullptr;
};

struct StreamKind {
  using Pointer = aclrtStream;
  static ffi::Error GiveBack(const Api& api, Pointer stream) {
    return JAX_NSA_ACL_CALL(api, aclrtDestroyStream, stream);
  }
};

struct TensorKind {
  using Pointer = aclTensor*;
  static ffi::Error GiveBack(const Api& api, Pointer tensor) {
    return JAX_NSA_ACL_CALL(api, aclDestroyTensor, tensor);
  }
};

struct IntArrayKind {
  using Pointer = aclIntArray*;
  static ffi::Error GiveBack(const Api& api, Pointer array) {
    return JAX_NSA_ACL_CALL(api, aclDestroyIntArray, array);
  }
};

struct DeviceMemoryKind {
  using Pointer = void*;
  static constexpr char kAllocate[] = "aclrtMalloc";
  static ffi::Error Allocate(const Api& api, size_t size, Pointer* pointer) {
    return JAX_NSA_ACL_CALL(api, aclrtMalloc, pointer, size, ACL_MEM_MALLOC_HUGE_FIRST);
  }
  static ffi::Error GiveBack(const Api& api, Pointer pointer) {
    return JAX_NSA_ACL_CALL(api, aclrtFree, pointer);
  }
};

// Host memory that the device can copy from and to while the host goes on.
struct PinnedMemoryKind {
  using Pointer = void*;
  static constexpr char kAllocate[] = "aclrtMallocHost";
  static ffi::Error Allocate(const Api& api, size_t size, Pointer* pointer) {
    return JAX_NSA_ACL_CALL(api, aclrtMallocHost, pointer, size);
  }
  static ffi::Error GiveBack(const Api& api, Pointer pointer) {
    return JAX_NSA_ACL_CALL(api, aclrtFreeHost, pointer);
  }
};

using Stream = Owned<StreamKind>;
using Tensor = Owned<TensorKind>;
using IntArray = Owned<IntArrayKind>;

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_RUNTIME_H_
