// A stand-in for CANN, for tests: its C interface, as CANN's documentation and headers describe it,
// computed on the CPU, and strict. This is what its three libraries share; the state is in
// libascendcl.so.
//
// What CANN leaves undefined is a violation here: recorded, refused with a status where the call
// can still be refused, and fatal at exit.

#ifndef STANDIN_H_
#define STANDIN_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define STANDIN_EXPORT __attribute__((visibility("default")))

namespace standin {

inline constexpr int kSuccess = 0;
inline constexpr int kRepeatInitialize = 100002;
inline constexpr int kInvalidParameter = 107000;  // the runtime's
inline constexpr int kNoContext = 107002;
inline constexpr int kNullParameter = 161001;  // the operators'
inline constexpr int kInvalidOperand = 161002;

// Every function of the interface holds it; work on streams runs under it too.
STANDIN_EXPORT std::recursive_mutex& Mutex();

// Sets what aclGetRecentErrMsg answers on this thread; returns `status`.
STANDIN_EXPORT int Fail(int status, const std::string& message);

// As Fail, and records a breach of CANN's rules.
STANDIN_EXPORT int Violation(int status, const std::string& message);

// What a test wants of this call of a function.
enum class Fault { kNone, kStatus, kNull };
STANDIN_EXPORT Fault Enter(const char* function, int* status);

// Objects behind opaque pointers: tensors, integer arrays, executors, streams. A pointer is never
// given out twice and cannot be dereferenced.
STANDIN_EXPORT void* NewHandle(const char* kind, std::shared_ptr<void> object);
STANDIN_EXPORT std::shared_ptr<void> Find(const char* kind, const void* handle);
STANDIN_EXPORT bool Remove(const char* kind, const void* handle);

// The bytes behind device memory, if all of them are live memory of `device`; else null. Device
// pointers themselves cannot be dereferenced.
STANDIN_EXPORT std::byte* DeviceBytes(const void* pointer, size_t size, int device);

// The device that the calling thread has set; -1 if none.
STANDIN_EXPORT int CurrentDevice();

// Puts work at a stream's end: it runs when someone waits for the stream. Gives the stream's
// device to it. A status, after a violation if the stream is not one of the current device.
STANDIN_EXPORT int Enqueue(void* stream, std::function<void(int device)> work);

// Adds to a counter that tests can read.
STANDIN_EXPORT void Count(const std::string& counter, int64_t increment);

struct Tensor {
  std::vector<int64_t> dims, strides, storage_dims;
  int64_t offset;
  int dtype, format;
  const void* data;
};

}  // namespace standin

#endif  // STANDIN_H_
