// The stand-in's libascendcl.so: devices, streams, memory, and the state behind all libraries.
//
// One file, and longer than others: one lock guards memory, handles, streams and planned faults,
// and every function of the library is a few lines on them.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "standin.h"

namespace standin {
namespace {

// Addresses of device memory and handles: reserved, never accessible, never given out twice.
class AddressSpace {
 public:
  AddressSpace() {
    void* base =
        mmap(nullptr, kSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) std::abort();
    next_ = static_cast<std::byte*>(base);
    end_ = next_ + kSize;
  }
  // Null if all are used up. Leaves a gap behind, so that running over an end is noticed.
  std::byte* Take(size_t size) {
    const size_t step = (size + kGap + kAlignment - 1) / kAlignment * kAlignment;
    if (static_cast<size_t>(end_ - next_) < step) return nullptr;
    std::byte* taken = next_;
    next_ += step;
    return taken;
  }

 private:
  static constexpr size_t kSize = size_t{1} << 38, kGap = 512, kAlignment = 512;
  std::byte *next_, *end_;
};

struct Memory {
  size_t size;
  int device;
  std::unique_ptr<std::byte[]> bytes;
};

struct Handle {
  std::string kind;
  std::shared_ptr<void> object;  // null once it was destroyed
};

struct Stream {
  int device;
  std::deque<std::function<void(int)>> work;
};

struct PlannedFault {
  std::string function;  // empty: any
  int64_t call;          // counted down
  int status;
  bool null;
};

class State {
 public:
  State() {
    if (const char* devices = std::getenv("STANDIN_CANN_DEVICES")) num_devices = atoi(devices);
  }
  ~State() {
    std::string complaint;
    for (const auto& [pointer, memory] : device_memory) {
      complaint += "\n  leaked " + std::to_string(memory.size) + " bytes of device memory";
    }
    for (const auto& [pointer, memory] : pinned_memory) {
      complaint += "\n  leaked " + std::to_string(memory.size) + " bytes of pinned host memory";
    }
    for (const auto& [pointer, handle] : handles) {
      // CANN has no way to give back an executor that was never launched.
      if (handle.kind != "executor") complaint += "\n  leaked " + handle.kind;
    }
    if (!expects_violations) {
      for (const std::string& violation : violations) complaint += "\n  violation: " + violation;
    }
    if (complaint.empty()) return;
    std::fprintf(stderr, "stand-in CANN:%s\n", complaint.c_str());
    std::fflush(nullptr);
    _exit(70);
  }

  std::recursive_mutex mutex;
  AddressSpace addresses;
  int num_devices = 2;
  bool initialized = false;
  std::map<const std::byte*, Memory> device_memory, pinned_memory;
  std::map<const void*, Handle> handles;
  std::map<std::string, int64_t> counters;
  std::vector<std::string> violations;
  bool expects_violations = false;
  std::vector<PlannedFault> faults;
};

State& Get() {
  static State state;
  return state;
}

thread_local int current_device = -1;
thread_local std::string recent_message;

using Lock = std::lock_guard<std::recursive_mutex>;

// The bytes behind [pointer, pointer + size) of a map of memory, or null.
std::byte* Within(std::map<const std::byte*, Memory>& memories, const void* pointer, size_t size,
                  int device) {
  const auto* address = static_cast<const std::byte*>(pointer);
  auto it = memories.upper_bound(address);
  if (it == memories.begin()) return nullptr;
  --it;
  const Memory& memory = it->second;
  const size_t offset = address - it->first;
  if (offset > memory.size || size > memory.size - offset) return nullptr;
  if (device >= 0 && memory.device != device) return nullptr;
  return memory.bytes.get() + offset;
}

uint64_t Hash(const std::byte* bytes, size_t size) {
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 1099511628211u;
  return hash;
}

// A function that only gives something back does so even where it is told to fail.
#define ENTER(function)                                      \
  const Lock lock(Mutex());                                  \
  int injected_status = kSuccess;                            \
  const Fault injected = Enter(#function, &injected_status); \
  if (injected == Fault::kStatus) return injected_status
#define ENTER_GIVING_BACK(function) \
  const Lock lock(Mutex());         \
  int injected_status = kSuccess;   \
  (void)Enter(#function, &injected_status)
#define NEED_DEVICE(function)                                                 \
  if (current_device < 0) {                                                   \
    return Violation(kNoContext, #function ": the thread has set no device"); \
  }

std::string Hex(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

int FreeFrom(std::map<const std::byte*, Memory>& memories, const char* function,
             const char* counter, void* pointer) {
  if (memories.erase(static_cast<const std::byte*>(pointer)) == 0) {
    return Violation(kInvalidParameter, std::string(function) + ": " + Hex(pointer) +
                                            " is not live memory of its kind");
  }
  Count(counter, -1);
  return kSuccess;
}

int EnterDevice(const char* function, int device) {
  if (!Get().initialized) {
    return Violation(100001, std::string(function) + ": aclInit was not called");
  }
  if (device < 0 || device >= Get().num_devices) {
    return Fail(107001, "device " + std::to_string(device) + " does not exist");
  }
  return kSuccess;
}

}  // namespace

std::recursive_mutex& Mutex() { return Get().mutex; }

int Fail(int status, const std::string& message) {
  recent_message = message;
  return status;
}

int Violation(int status, const std::string& message) {
  Get().violations.push_back(message);
  return Fail(status, "violation: " + message);
}

Fault Enter(const char* function, int* status) {
  State& state = Get();
  ++state.counters[function];
  for (auto it = state.faults.begin(); it != state.faults.end(); ++it) {
    if (!it->function.empty() && it->function != function) continue;
    if (--it->call > 0) continue;
    const PlannedFault fault = *it;
    state.faults.erase(it);
    *status = Fail(fault.status, std::string("E19999: injected fault in ") + function);
    return fault.null ? Fault::kNull : Fault::kStatus;
  }
  return Fault::kNone;
}

void* NewHandle(const char* kind, std::shared_ptr<void> object) {
  void* handle = Get().addresses.Take(1);
  Get().handles[handle] = {kind, std::move(object)};
  Count(std::string("live ") + kind, 1);
  return handle;
}

std::shared_ptr<void> Find(const char* kind, const void* handle) {
  const auto it = Get().handles.find(handle);
  return it != Get().handles.end() && it->second.kind == kind ? it->second.object : nullptr;
}

bool Remove(const char* kind, const void* handle) {
  if (Find(kind, handle) == nullptr) return false;
  Get().handles.erase(handle);
  Count(std::string("live ") + kind, -1);
  return true;
}

std::byte* DeviceBytes(const void* pointer, size_t size, int device) {
  return Within(Get().device_memory, pointer, size, device);
}

int CurrentDevice() { return current_device; }

int Enqueue(void* stream, std::function<void(int)> work) {
  const auto found = std::static_pointer_cast<Stream>(Find("stream", stream));
  if (found == nullptr) return Violation(kInvalidParameter, Hex(stream) + " is not a live stream");
  if (found->device != current_device) {
    return Violation(kInvalidParameter, "the stream is not one of the thread's device");
  }
  found->work.push_back(std::move(work));
  return kSuccess;
}

void Count(const std::string& counter, int64_t increment) { Get().counters[counter] += increment; }

}  // namespace standin

using namespace standin;  // the interface below is C's

extern "C" {

STANDIN_EXPORT int aclInit(const char*) {
  ENTER(aclInit);
  if (Get().initialized) return Fail(kRepeatInitialize, "repeat initialize");
  Get().initialized = true;
  return kSuccess;
}

STANDIN_EXPORT const char* aclGetRecentErrMsg() {
  return recent_message.empty() ? nullptr : recent_message.c_str();
}

STANDIN_EXPORT int aclrtGetDeviceCount(uint32_t* count) {
  ENTER(aclrtGetDeviceCount);
  *count = static_cast<uint32_t>(Get().num_devices);
  return kSuccess;
}

STANDIN_EXPORT int aclrtGetDevice(int32_t* device) {
  ENTER(aclrtGetDevice);
  if (current_device < 0) return Fail(kNoContext, "the thread has set no device");
  *device = current_device;
  return kSuccess;
}

STANDIN_EXPORT int aclrtSetDevice(int32_t device) {
  ENTER(aclrtSetDevice);
  const int status = EnterDevice("aclrtSetDevice", device);
  if (status == kSuccess) current_device = device;
  return status;
}

STANDIN_EXPORT int aclrtCreateStream(void** stream) {
  ENTER(aclrtCreateStream);
  *stream = nullptr;
  if (injected == Fault::kNull) return kSuccess;
  NEED_DEVICE(aclrtCreateStream);
  *stream = NewHandle("stream", std::make_shared<Stream>(Stream{current_device, {}}));
  return kSuccess;
}

STANDIN_EXPORT int aclrtSynchronizeStream(void* stream) {
  ENTER(aclrtSynchronizeStream);
  NEED_DEVICE(aclrtSynchronizeStream);
  const auto found = std::static_pointer_cast<Stream>(Find("stream", stream));
  if (found == nullptr) return Violation(kInvalidParameter, Hex(stream) + " is not a live stream");
  if (found->device != current_device) {
    return Violation(kInvalidParameter, "the stream is not one of the thread's device");
  }
  const size_t violations = Get().violations.size();
  while (!found->work.empty()) {
    const auto work = std::move(found->work.front());
    found->work.pop_front();
    work(found->device);
  }
  return Get().violations.size() == violations ? kSuccess : 507000;
}

STANDIN_EXPORT int aclrtDestroyStream(void* stream) {
  ENTER_GIVING_BACK(aclrtDestroyStream);
  const auto found = std::static_pointer_cast<Stream>(Find("stream", stream));
  if (found == nullptr) return Violation(kInvalidParameter, Hex(stream) + " is not a live stream");
  if (!found->work.empty()) {
    Violation(kInvalidParameter, "aclrtDestroyStream: nobody waited for the stream's work");
  }
  Remove("stream", stream);
  return injected_status;
}

STANDIN_EXPORT int aclrtMalloc(void** pointer, size_t size, int policy) {
  ENTER(aclrtMalloc);
  *pointer = nullptr;
  if (injected == Fault::kNull) return kSuccess;
  NEED_DEVICE(aclrtMalloc);
  if (size == 0) return Violation(kInvalidParameter, "aclrtMalloc: of no bytes");
  if (policy != 0) return Violation(kInvalidParameter, "aclrtMalloc: unexpected policy");
  std::byte* address = Get().addresses.Take(size);
  if (address == nullptr) return Fail(207001, "out of device memory");
  Memory memory{size, current_device, std::make_unique<std::byte[]>(size)};
  std::memset(memory.bytes.get(), 0xFF, size);  // NaN, or index -1: it holds nothing yet
  Get().device_memory[address] = std::move(memory);
  Count("live device memory", 1);
  Count("device allocations", 1);
  *pointer = address;
  return kSuccess;
}

STANDIN_EXPORT int aclrtFree(void* pointer) {
  ENTER_GIVING_BACK(aclrtFree);
  NEED_DEVICE(aclrtFree);
  const int status = FreeFrom(Get().device_memory, "aclrtFree", "live device memory", pointer);
  return status == kSuccess ? injected_status : status;
}

STANDIN_EXPORT int aclrtMallocHost(void** pointer, size_t size) {
  ENTER(aclrtMallocHost);
  *pointer = nullptr;
  if (injected == Fault::kNull) return kSuccess;
  NEED_DEVICE(aclrtMallocHost);
  if (size == 0) return Violation(kInvalidParameter, "aclrtMallocHost: of no bytes");
  Memory memory{size, current_device, std::make_unique<std::byte[]>(size)};
  std::memset(memory.bytes.get(), 0xFF, size);
  *pointer = memory.bytes.get();
  Get().pinned_memory[memory.bytes.get()] = std::move(memory);
  Count("live pinned memory", 1);
  Count("pinned allocations", 1);
  return kSuccess;
}

STANDIN_EXPORT int aclrtFreeHost(void* pointer) {
  ENTER_GIVING_BACK(aclrtFreeHost);
  const int status = FreeFrom(Get().pinned_memory, "aclrtFreeHost", "live pinned memory", pointer);
  return status == kSuccess ? injected_status : status;
}

// Copies between pinned host memory and device memory when the stream gets there. Until then the
// source must stay as it is.
STANDIN_EXPORT int aclrtMemcpyAsync(void* destination, size_t destination_size, const void* source,
                                    size_t count, int kind, void* stream) {
  ENTER(aclrtMemcpyAsync);
  NEED_DEVICE(aclrtMemcpyAsync);
  if (kind != 1 && kind != 2) {
    return Violation(kInvalidParameter, "aclrtMemcpyAsync: unexpected kind");
  }
  if (count > destination_size) {
    return Violation(kInvalidParameter, "aclrtMemcpyAsync: count exceeds the destination");
  }
  const bool to_device = kind == 1;
  const auto host = [to_device, destination, source, count] {
    const void* pointer = to_device ? source : destination;
    return Within(Get().pinned_memory, pointer, count, -1);
  };
  const auto device = [to_device, destination, source, count](int ordinal) {
    return DeviceBytes(to_device ? destination : source, count, ordinal);
  };
  if (host() == nullptr) {
    return Violation(kInvalidParameter, "aclrtMemcpyAsync: the host side is not pinned memory");
  }
  if (device(current_device) == nullptr) {
    return Violation(kInvalidParameter,
                     "aclrtMemcpyAsync: the device side is not live device memory of that size");
  }
  Count(to_device ? "bytes to device" : "bytes to host", static_cast<int64_t>(count));
  const uint64_t hash = to_device ? Hash(host(), count) : 0;
  return Enqueue(stream, [=](int ordinal) {
    std::byte* on_host = host();
    std::byte* on_device = device(ordinal);
    if (on_host == nullptr || on_device == nullptr) {
      Violation(kInvalidParameter, "a copy runs on memory that was freed meanwhile");
    } else if (!to_device) {
      std::memcpy(on_host, on_device, count);
    } else if (Hash(on_host, count) != hash) {
      Violation(kInvalidParameter, "host memory was changed before it was copied to the device");
    } else {
      std::memcpy(on_device, on_host, count);
    }
  });
}

STANDIN_EXPORT int aclrtMemsetAsync(void* pointer, size_t size, int32_t value, size_t count,
                                    void* stream) {
  ENTER(aclrtMemsetAsync);
  NEED_DEVICE(aclrtMemsetAsync);
  if (count > size || DeviceBytes(pointer, size, current_device) == nullptr) {
    return Violation(kInvalidParameter, "aclrtMemsetAsync: not live device memory of that size");
  }
  return Enqueue(stream, [=](int ordinal) {
    if (std::byte* bytes = DeviceBytes(pointer, count, ordinal)) {
      std::memset(bytes, value, count);
    } else {
      Violation(kInvalidParameter, "aclrtMemsetAsync runs on memory that was freed meanwhile");
    }
  });
}

// What tests ask and tell.

// The `call`-th call from now of a function ("" for any) fails with `status`, or gives null.
STANDIN_EXPORT void standin_plan_fault(const char* function, int64_t call, int status, int null) {
  const Lock lock(Mutex());
  Get().faults.push_back({function, call, status, null != 0});
}

// Forgets the planned faults; how many had not come up.
STANDIN_EXPORT int standin_clear_faults() {
  const Lock lock(Mutex());
  const int left = static_cast<int>(Get().faults.size());
  Get().faults.clear();
  return left;
}

STANDIN_EXPORT int64_t standin_counter(const char* name) {
  const Lock lock(Mutex());
  return Get().counters[name];
}

STANDIN_EXPORT void standin_set_devices(int devices) {
  const Lock lock(Mutex());
  Get().num_devices = devices;
}

// Violations so far, one per line, forgotten once told. With `expected`, later ones are no
// complaint at exit.
STANDIN_EXPORT const char* standin_take_violations(int expected) {
  static thread_local std::string text;
  const Lock lock(Mutex());
  text.clear();
  for (const std::string& violation : Get().violations) text += violation + "\n";
  Get().violations.clear();
  Get().expects_violations = expected != 0;
  return text.c_str();
}

// Copies between plain host memory and device memory at once, for tests that fill it.
STANDIN_EXPORT int standin_poke(void* device_pointer, const void* source, size_t size) {
  const Lock lock(Mutex());
  std::byte* bytes = DeviceBytes(device_pointer, size, -1);
  if (bytes == nullptr) return kInvalidParameter;
  std::memcpy(bytes, source, size);
  return kSuccess;
}

STANDIN_EXPORT int standin_peek(void* destination, const void* device_pointer, size_t size) {
  const Lock lock(Mutex());
  const std::byte* bytes = DeviceBytes(device_pointer, size, -1);
  if (bytes == nullptr) return kInvalidParameter;
  std::memcpy(destination, bytes, size);
  return kSuccess;
}

}  // extern "C"
