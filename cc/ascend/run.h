// How the handlers of every operator reach CANN: loaded, on a device, with a stream's context.

#ifndef JAX_NSA_ASCEND_RUN_H_
#define JAX_NSA_ASCEND_RUN_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "ascend/context.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

// Runs body(functions, context) on a stream of ours. The context must be out of use when it
// returns success; after an error its memory is given back.
template <typename Operator, typename Body>
ffi::Error RunOnIdleStream(int64_t device, const Body& body) {
  const ffi::ErrorOr<const Api*> api = LoadApi();
  if (api.has_error()) return api.error();
  const auto functions = LoadOperator<Operator>();
  if (functions.has_error()) return functions.error();
  DeviceScope scope(**api);
  JAX_NSA_RETURN_IF_ERROR(scope.Enter(static_cast<int32_t>(device)));
  ffi::ErrorOr<std::unique_ptr<Context>> taken =
      Contexts::Get().Take(**api, static_cast<int32_t>(device));
  if (taken.has_error()) return taken.error();
  std::unique_ptr<Context> context = std::move(*taken);
  JAX_NSA_RETURN_IF_ERROR(body(**functions, *context));
  Contexts::Get().PutBack(std::move(context));
  return ffi::Error::Success();
}

// Runs body(functions, context) on XLA's stream.
template <typename Operator, typename Body>
ffi::Error RunOnStream(aclrtStream stream, int32_t ordinal, const Body& body) {
  const ffi::ErrorOr<const Api*> api = LoadApi();
  if (api.has_error()) return api.error();
  const auto functions = LoadOperator<Operator>();
  if (functions.has_error()) return functions.error();
  // The plugin's thread has made the stream's device current; only a thread that has none gets
  // the one XLA names.
  DeviceScope scope(**api);
  const ffi::ErrorOr<int32_t> device = scope.CurrentOr(ordinal);
  if (device.has_error()) return device.error();
  const std::shared_ptr<Context> context = Contexts::Get().ForStream(**api, *device, stream);
  const std::lock_guard<std::mutex> lock(context->mutex);
  return body(**functions, *context);
}

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_RUN_H_
