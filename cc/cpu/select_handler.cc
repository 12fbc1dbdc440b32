// The XLA FFI handler of the selected branch's CPU kernel.

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "cpu/select_isa.h"
#include "cpu/select_run.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu::select {
namespace {

namespace ffi = xla::ffi;

using select_attention::Call;

ffi::Future Finished(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (error.success()) {
    promise.SetAvailable();
  } else {
    promise.SetError(std::move(error));
  }
  return future;
}

ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the CPU kernel ran out of memory");
}

// A call that threads work on. Whoever takes part keeps it alive: a thread may come late, to
// nothing left to do.
struct Work {
  Work(const Call& call, const Kernel& kernel) : run(call.problem, call.arrays, kernel) {}

  Run run;
  ffi::Promise promise;
  ffi::Error out_of_memory = OutOfMemory();  // made while there is memory
};

// Everything is checked before anything is written: no fault may fail a call that threads work on.
ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = select_attention::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel* const kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInvalidArgument,
                   "this machine has no CPU kernel \"" + std::string(isa) + "\""));
  }
  if (call->faults_fail) {
    if (ffi::Error error = select_attention::FindFault(*call); error.failure()) {
      return ffi::Unexpected(std::move(error));
    }
  }
  return std::make_shared<Work>(*call, *kernel);
}

// Takes part in the work, and finishes the call if nothing is left.
void TakePart(Work& work) {
  if (!work.run.Work()) return;
  if (work.run.out_of_memory()) {
    work.promise.SetError(std::move(work.out_of_memory));
  } else {
    work.promise.SetAvailable();
  }
}

// Works with as many threads as are free. No one ever waits, as XLA runs handlers on the same
// threads.
void Start(ffi::ThreadPool pool, const std::shared_ptr<Work>& work) noexcept {
  if (work->run.bytes() >= kSerialBytes) {
    const int64_t helpers = std::min(work->run.num_units(), pool.num_threads()) - 1;
    // Asking takes memory; where there is none, fewer threads do the same work.
    try {
      for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { TakePart(*work); });
    } catch (const std::bad_alloc&) {
    }
  }
  TakePart(*work);
}

ffi::Future Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  const auto prepare = [&]() -> ffi::ErrorOr<std::shared_ptr<Work>> {
    try {
      return Prepare(args, rets, attributes);
    } catch (const std::bad_alloc&) {
      return ffi::Unexpected(OutOfMemory());
    }
  };
  const ffi::ErrorOr<std::shared_ptr<Work>> work = prepare();
  if (work.has_error()) return Finished(work.error());
  ffi::Future future((*work)->promise);
  Start(pool, *work);
  return future;
}

}  // namespace
}  // namespace jax_nsa::cpu::select

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_select_attention_cpu, jax_nsa::cpu::select::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
