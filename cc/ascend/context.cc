#include "ascend/context.h"

namespace jax_nsa::ascend {

ffi::ErrorOr<std::unique_ptr<Context>> Context::Create(const Api& api, int32_t device) {
  aclrtStream stream = nullptr;
  ffi::Error error = JAX_NSA_ACL_CALL(api, aclrtCreateStream, &stream);
  if (error.success() && stream == nullptr) error = NullError(api, "aclrtCreateStream");
  if (error.failure()) return ffi::Unexpected(error);
  auto context = std::make_unique<Context>(api, device, stream);
  context->own_stream_ = Stream(api, stream);
  return context;
}

ffi::Error Context::Synchronize() {
  return JAX_NSA_ACL_CALL(api_, aclrtSynchronizeStream, stream_);
}

ffi::Error Context::Close() {
  ffi::Error first = ffi::Error::Success();
  const auto keep_first = [&](const ffi::Error& error) {
    if (first.success() && error.failure()) first = error;
  };
  const bool in_use = arrays.capacity() > 0 || mask.capacity() > 0 || workspace.capacity() > 0 ||
                      staging.capacity() > 0;
  if (in_use) keep_first(Synchronize());
  keep_first(arrays.Release());
  keep_first(mask.Release());
  keep_first(workspace.Release());
  keep_first(staging.Release());
  keep_first(own_stream_.Reset());
  return first;
}

Contexts& Contexts::Get() {
  // Never destroyed: at static destruction CANN may be gone, and calls may still be running.
  static Contexts* const contexts = std::make_unique<Contexts>().release();
  return *contexts;
}

ffi::ErrorOr<std::unique_ptr<Context>> Contexts::Take(const Api& api, int32_t device) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The latest first: its memory is the likeliest to be large enough.
    for (auto it = idle_.rbegin(); it != idle_.rend(); ++it) {
      if ((*it)->device() != device) continue;
      std::unique_ptr<Context> context = std::move(*it);
      idle_.erase(std::next(it).base());
      return context;
    }
  }
  return Context::Create(api, device);
}

void Contexts::PutBack(std::unique_ptr<Context> context) {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(context));
}

std::shared_ptr<Context> Contexts::ForStream(const Api& api, int32_t device, aclrtStream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Context>& context = by_stream_[{device, stream}];
  if (context == nullptr) context = std::make_shared<Context>(api, device, stream);
  return context;
}

ffi::Error Contexts::Release() {
  const std::lock_guard<std::mutex> release_lock(release_mutex_);
  std::vector<std::shared_ptr<Context>> contexts;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::unique_ptr<Context>& context : idle_) contexts.push_back(std::move(context));
    for (auto& [key, context] : by_stream_) contexts.push_back(std::move(context));
    idle_.clear();
    by_stream_.clear();
  }
  ffi::Error first = ffi::Error::Success();
  for (const std::shared_ptr<Context>& context : contexts) {
    const std::lock_guard<std::mutex> lock(context->mutex);
    DeviceScope scope(context->api());
    ffi::Error error = scope.Enter(context->device());
    if (error.success()) error = context->Close();
    if (first.success() && error.failure()) first = error;
  }
  return first;
}

}  // namespace jax_nsa::ascend
