// The XLA FFI handler of the selected branch's CPU kernel.

#include <memory>
#include <string_view>

#include "cpu/select_isa.h"
#include "cpu/select_run.h"
#include "cpu/threads.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu::select {
namespace {

using select_attention::Call;

using Work = SharedWork<Run>;

// Everything is checked before anything is written: no fault may fail a call that threads work on.
ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = select_attention::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel* const kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return ffi::Unexpected(NoKernel(isa));
  }
  if (call->faults_fail) {
    if (ffi::Error error = select_attention::FindFault(*call); error.failure()) {
      return ffi::Unexpected(std::move(error));
    }
  }
  return std::make_shared<Work>(call->problem, call->arrays, *kernel);
}

ffi::Future Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  return DoWork(pool, [&] { return Prepare(args, rets, attributes); });
}

}  // namespace
}  // namespace jax_nsa::cpu::select

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_select_attention_cpu, jax_nsa::cpu::select::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
