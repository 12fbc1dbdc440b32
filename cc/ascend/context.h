// What a stream needs around it: memory that grows and is kept, so that a warm call allocates
// nothing; and where contexts wait for the next call.

#ifndef JAX_NSA_ASCEND_CONTEXT_H_
#define JAX_NSA_ASCEND_CONTEXT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "ascend/runtime.h"

namespace jax_nsa::ascend {

// Memory of one kind that keeps the largest size asked for.
template <typename Kind>
class Buffer {
 public:
  // Gives at least `size` bytes, losing what was there. The memory so far must be out of use.
  ffi::Error Reserve(const Api& api, size_t size) {
    if (size <= capacity_) return ffi::Error::Success();
    // Sequences grow a little with every step: leave room, or each step would allocate anew.
    const size_t capacity = std::max(size, capacity_ + capacity_ / 2);
    JAX_NSA_RETURN_IF_ERROR(Release());
    void* pointer = nullptr;
    JAX_NSA_RETURN_IF_ERROR(Kind::Allocate(api, capacity, &pointer));
    if (pointer == nullptr) return NullError(api, Kind::kAllocate);
    memory_ = Owned<Kind>(api, pointer);
    capacity_ = capacity;
    return ffi::Error::Success();
  }

  ffi::Error Release() {
    capacity_ = 0;
    return memory_.Reset();
  }

  std::byte* data() const { return static_cast<std::byte*>(memory_.get()); }
  size_t capacity() const { return capacity_; }

 private:
  Owned<Kind> memory_;
  size_t capacity_ = 0;
};

// A stream on a device and the memory for what runs on it, one call after another. The device
// must be the calling thread's in every member function.
class Context {
 public:
  // On a stream of its own.
  static ffi::ErrorOr<std::unique_ptr<Context>> Create(const Api& api, int32_t device);
  // On somebody else's stream.
  Context(const Api& api, int32_t device, aclrtStream stream)
      : api_(api), device_(device), stream_(stream) {}
  ~Context() { (void)Close(); }

  // Waits for the stream and gives everything back.
  ffi::Error Close();

  ffi::Error Synchronize();

  // Makes room in one of the buffers below. Freeing device memory does not wait for the work that
  // uses it, so growing waits first.
  template <typename Kind>
  ffi::Error Reserve(Buffer<Kind>* buffer, size_t size) {
    if (size > buffer->capacity() && buffer->capacity() > 0) {
      JAX_NSA_RETURN_IF_ERROR(Synchronize());
    }
    return buffer->Reserve(api_, size);
  }

  const Api& api() const { return api_; }
  int32_t device() const { return device_; }
  aclrtStream stream() const { return stream_; }

  Buffer<DeviceMemoryKind> arrays, mask, workspace;
  Buffer<PinnedMemoryKind> staging;
  std::mutex mutex;  // held through a call on somebody else's stream

 private:
  const Api& api_;
  const int32_t device_;
  aclrtStream stream_;
  Stream own_stream_;
};

// All contexts of the process.
class Contexts {
 public:
  static Contexts& Get();

  // For a call that brings no stream: an idle context of the device, or a new one. As many exist
  // as ever ran at once.
  ffi::ErrorOr<std::unique_ptr<Context>> Take(const Api& api, int32_t device);
  // Makes a taken context idle. One that saw an error is destroyed instead.
  void PutBack(std::unique_ptr<Context> context);

  // For a call on somebody else's stream: always the same context, for calls in turn.
  std::shared_ptr<Context> ForStream(const Api& api, int32_t device, aclrtStream stream);

  // Gives back the memory and the streams of all contexts that no call has taken. When it returns
  // nothing is kept for a stream that has no call running, so its owner may destroy it. For the end
  // of the program, while CANN still stands; calls may follow all the same.
  ffi::Error Release();

 private:
  std::mutex release_mutex_;  // one release at a time: the next returns when all is given back
  std::mutex mutex_;
  std::vector<std::unique_ptr<Context>> idle_;
  std::map<std::pair<int32_t, aclrtStream>, std::shared_ptr<Context>> by_stream_;
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_CONTEXT_H_
