// What the two XLA FFI handlers of every operator on Ascend share: HandleOnDevice for buffers on an
// NPU, under an Ascend PJRT plugin, and HandleOnHost for buffers on the host, under JAX's CPU
// platform.

#ifndef JAX_NSA_ASCEND_HANDLERS_H_
#define JAX_NSA_ASCEND_HANDLERS_H_

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "ascend/runtime.h"
#include "paged_call.h"

// Defines one or both under the names that custom calls know, once they are complete.
#define JAX_NSA_ASCEND_DEVICE_HANDLER(target)                                                      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_##target##_ascend, jax_nsa::ascend::HandleOnDevice,        \
                                xla::ffi::Ffi::Bind()                                              \
                                    .Ctx<xla::ffi::PlatformStream<jax_nsa::ascend::aclrtStream>>() \
                                    .Ctx<xla::ffi::DeviceOrdinal>()                                \
                                    .RemainingArgs()                                               \
                                    .RemainingRets()                                               \
                                    .Attrs())
#define JAX_NSA_ASCEND_HANDLERS(target)                                                         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_##target##_ascend_host, jax_nsa::ascend::HandleOnHost,  \
                                xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs()); \
  JAX_NSA_ASCEND_DEVICE_HANDLER(target)

namespace jax_nsa::ascend {

// The error for a legal call of an operator that CANN's kernel does not serve.
inline ffi::Error Unserved(const std::string& name, const std::string& reason) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    name + " on implementation \"ascend\": CANN's kernel " + reason);
}

// Refuses what none of CANN's kernels over paged keys and values reads.
inline ffi::Error CheckPagedForCann(const std::string& name, const PagedProblem& problem) {
  if (problem.dtype == DataType::kFloat32) {
    return Unserved(name, "takes bfloat16 and float16, not float32");
  }
  // CANN is told a head's size, not how far the next one lies: it would take values for keys.
  if (problem.interleaved) {
    return Unserved(name,
                    "takes keys and values in pools of their own, got kv_layout=\"interleaved\"");
  }
  return ffi::Error::Success();
}

// How a call on host buffers ends. In a program of several devices a call that fails would keep its
// device out of later collectives, in which the others wait for it. There, where faults may not
// fail, spoil() leaves results that nobody takes for right ones, `spoilt` says in what way, and the
// message goes to the standard error stream.
template <typename Spoil>
ffi::Error EndOnHost(ffi::Error error, bool faults_fail, const char* spoilt, const Spoil& spoil) {
  if (error.success() || faults_fail) return error;
  spoil();
  std::fprintf(stderr, "jax_nsa: %s: %s\n", spoilt, error.message().c_str());
  return ffi::Error::Success();
}

// Lengths reach CANN's kernels only from the host. Those that are constants of the program, one for
// each sequence; nothing where the call has none.
template <typename Integer>
ffi::ErrorOr<std::optional<std::vector<Integer>>> ConstantLengths(const ffi::Dictionary& attributes,
                                                                  int64_t sequences) {
  const auto lengths = Attribute(attributes, "host_lengths", ffi::Span<const int64_t>());
  if (lengths.size() == 0) return std::optional<std::vector<Integer>>();
  if (static_cast<int64_t>(lengths.size()) != sequences) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                                      "host_lengths must have an entry for each of " +
                                          std::to_string(sequences) + " sequences, got " +
                                          std::to_string(lengths.size())));
  }
  return std::optional(std::vector<Integer>(lengths.begin(), lengths.end()));
}

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_HANDLERS_H_
