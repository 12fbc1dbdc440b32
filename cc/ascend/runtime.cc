#include "ascend/runtime.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <string_view>
#include <vector>

namespace jax_nsa::ascend {
namespace {

constexpr char kLibraryPathVariable[] = "JAX_NSA_CANN_LIBRARY_PATH";
constexpr char kHomeVariable[] = "ASCEND_HOME_PATH";

// Where to look for CANN's libraries, and what was tried in vain.
class LibrarySearch {
 public:
  LibrarySearch() {
    const char* home = std::getenv(kHomeVariable);
    if (const char* path = std::getenv(kLibraryPathVariable); path != nullptr && *path != '\0') {
      for (std::string_view left = path; !left.empty();) {
        const size_t end = std::min(left.find(':'), left.size());
        if (end > 0) directories_.emplace_back(left.substr(0, end));
        left.remove_prefix(std::min(end + 1, left.size()));
      }
      listed_ = directories_;
    } else {
      directories_.push_back("");  // the program loader's own rules
      if (home != nullptr && *home != '\0') {
        directories_.push_back(std::filesystem::path(home) / "lib64");
        listed_.push_back(directories_.back());
      }
    }
  }

  // Opens a library by its file name; null if it is nowhere.
  void* Open(const std::string& name) {
    for (const std::filesystem::path& directory : directories_) {
      if (void* library = OpenFile(directory / name)) return library;
    }
    return nullptr;
  }

  // Opens the libraries that may carry the operator, in CANN's order of precedence, until
  // `accepts` takes one.
  template <typename Accepts>
  bool OpenOperators(const Accepts& accepts) {
    for (const char* name : {"libcust_opapi.so", "libopapi.so"}) {
      if (void* library = Open(name); library != nullptr && accepts(library)) return true;
    }
    for (const std::filesystem::path& directory : listed_) {
      std::vector<std::filesystem::path> files;
      std::error_code ignored;
      for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
        const std::string name = entry.path().filename();
        if (name.rfind("libopapi_", 0) == 0 && entry.path().extension() == ".so") {
          files.push_back(entry.path());
        }
      }
      std::sort(files.begin(), files.end());
      for (const std::filesystem::path& file : files) {
        if (void* library = OpenFile(file); library != nullptr && accepts(library)) return true;
      }
    }
    return false;
  }

  const std::string& opened() const { return opened_; }
  const std::string& failures() const { return failures_; }

 private:
  void* OpenFile(const std::filesystem::path& file) {
    void* library = dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      failures_ += (failures_.empty() ? "" : "; ") + std::string(dlerror());
    } else {
      opened_ += (opened_.empty() ? "" : ", ") + file.string();
    }
    return library;
  }

  std::vector<std::filesystem::path> directories_;
  std::vector<std::filesystem::path> listed_;  // those of `directories_` that can be listed
  std::string opened_;
  std::string failures_;
};

ffi::Error Unusable(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kFailedPrecondition, message);
}

ffi::Error NotLoaded(const char* name, const LibrarySearch& search) {
  return Unusable(std::string("CANN's library ") + name + " cannot be loaded (" +
                  search.failures() +
                  "); install the CANN toolkit and source its set_env.sh, or set " + kHomeVariable +
                  " to where it is, or " + kLibraryPathVariable + " to its libraries' directories");
}

ffi::Error NotFound(const char* function, const LibrarySearch& search) {
  return Unusable(std::string("CANN is installed but has no function ") + function + " (opened " +
                  search.opened() +
                  "); install a CANN with NSA's operators for this NPU, 8.2 or newer");
}

// The functions of `api` that stand in one library, as CompressAttentionApi::FindIn.
const char* FindRuntime(void* library, Api* api) {
#define JAX_NSA_ACL_FIND_IN_API(result, name, parameters) \
  if (!FindFunction(library, #name, &api->name)) return #name;
  JAX_NSA_ACL_RUNTIME_FUNCTIONS(JAX_NSA_ACL_FIND_IN_API)
  return nullptr;
}

const char* FindTensors(void* library, Api* api) {
  JAX_NSA_ACL_TENSOR_FUNCTIONS(JAX_NSA_ACL_FIND_IN_API)
#undef JAX_NSA_ACL_FIND_IN_API
  return nullptr;
}

ffi::ErrorOr<Api> FindApi() {
  Api api = {};
  LibrarySearch search;
  const struct {
    const char* name;
    const char* (*find)(void* library, Api* api);
  } libraries[] = {{"libascendcl.so", FindRuntime}, {"libnnopbase.so", FindTensors}};
  for (const auto& [name, find] : libraries) {
    void* const library = search.Open(name);
    if (library == nullptr) return ffi::Unexpected(NotLoaded(name, search));
    if (const char* missing = find(library, &api)) {
      return ffi::Unexpected(NotFound(missing, search));
    }
  }
  return api;
}

std::string RecentMessage(const Api& api) {
  const char* message = api.aclGetRecentErrMsg();
  return message == nullptr || *message == '\0' ? "" : std::string(": ") + message;
}

}  // namespace

ffi::Error StatusError(const Api& api, const char* function, int status) {
  if (status == ACL_SUCCESS) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string(function) + " failed with status " +
                                                   std::to_string(status) + RecentMessage(api));
}

ffi::Error NullError(const Api& api, const char* function) {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string(function) + " returned null" + RecentMessage(api));
}

ffi::ErrorOr<const Api*> LoadApi() {
  static std::mutex mutex;
  static std::optional<Api> found;
  static bool initialized = false;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!found.has_value()) {
    ffi::ErrorOr<Api> functions = FindApi();
    if (functions.has_error()) return ffi::Unexpected(functions.error());
    found = *functions;
  }
  if (!initialized) {
    const aclError status = found->aclInit(nullptr);
    // Another user of CANN in this process may have initialised it. For the same reason it is
    // never finalised here; CANN advises against doing so at exit anyway.
    if (status != ACL_ERROR_REPEAT_INITIALIZE) {
      if (ffi::Error error = StatusError(*found, "aclInit", status); error.failure()) {
        return ffi::Unexpected(error);
      }
    }
    initialized = true;
  }
  return &*found;
}

void* FindSymbol(void* library, const char* name) { return dlsym(library, name); }

ffi::Error FindOperator(const std::function<const char*(void* library)>& find) {
  LibrarySearch search;
  const char* missing = nullptr;
  const bool found = search.OpenOperators([&](void* library) {
    missing = find(library);
    return missing == nullptr;
  });
  if (found) return ffi::Error::Success();
  return missing == nullptr ? NotLoaded("libopapi.so", search) : NotFound(missing, search);
}

std::optional<std::string> NpuUnavailable() {
  const ffi::ErrorOr<const Api*> api = LoadApi();
  if (api.has_error()) return api.error().message();
  uint32_t devices = 0;
  const ffi::Error error = JAX_NSA_ACL_CALL(**api, aclrtGetDeviceCount, &devices);
  if (error.failure()) return error.message();
  if (devices == 0) {
    return "CANN is installed but finds no NPU; check `npu-smi info` and the variable "
           "ASCEND_RT_VISIBLE_DEVICES";
  }
  return std::nullopt;
}

DeviceScope::~DeviceScope() {
  if (previous_.has_value()) (void)api_.aclrtSetDevice(*previous_);
}

ffi::Error DeviceScope::Enter(int32_t device) {
  int32_t current = 0;
  // A thread that never set a device has none: the call fails, and there is nothing to put back.
  if (api_.aclrtGetDevice(&current) == ACL_SUCCESS) {
    if (current == device) return ffi::Error::Success();
    previous_ = current;
  }
  return JAX_NSA_ACL_CALL(api_, aclrtSetDevice, device);
}

ffi::ErrorOr<int32_t> DeviceScope::CurrentOr(int32_t otherwise) {
  int32_t current = 0;
  if (api_.aclrtGetDevice(&current) == ACL_SUCCESS) return current;
  if (ffi::Error error = Enter(otherwise); error.failure()) return ffi::Unexpected(error);
  return otherwise;
}

}  // namespace jax_nsa::ascend
