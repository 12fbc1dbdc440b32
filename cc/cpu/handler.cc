// The XLA FFI handler of the CPU kernel.

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

ffi::Error Run(ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes attributes) {
  ffi::ErrorOr<Call> call = Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "no CPU kernel yet");
}

}  // namespace
}  // namespace jax_nsa

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_attention_cpu, jax_nsa::Run,
    xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<jax_nsa::Attributes>("problem"));
