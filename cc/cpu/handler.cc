// The XLA FFI handler of the CPU kernel.

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <string_view>

#include "cpu/isa.h"
#include "cpu/run.h"
#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu {
namespace {

namespace ffi = xla::ffi;

// The error of the first sequence that is at fault, checked before anything is read through it.
ffi::Error Check(const Call& call) {
  const Problem& problem = call.problem;
  SequenceRows rows;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    const Fault fault = FindRows(problem, call.arrays, b, &rows);
    if (fault != Fault::kNone) return FaultError(call, fault, b);
    if (rows.count == 0) continue;
    const int32_t* const pages = call.arrays.block_table + b * problem.pages_per_sequence;
    for (int64_t page = 0; page * problem.page_size < call.arrays.lengths[b]; ++page) {
      if (!IsPage(problem, pages[page])) return FaultError(call, Fault::kPageId, b, page);
    }
  }
  return ffi::Error::Success();
}

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

ffi::Future Start(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  Attributes attributes, std::string_view isa) {
  ffi::ErrorOr<Call> call = Decode(args, rets, attributes);
  if (call.has_error()) return Finished(call.error());
  const Kernel* const kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return Finished(ffi::Error(ffi::ErrorCode::kInvalidArgument,
                               "this machine has no CPU kernel \"" + std::string(isa) + "\""));
  }
  if (ffi::Error error = Check(*call); error.failure()) return Finished(std::move(error));

  // Whoever takes part keeps the call alive: a thread may come late, to nothing left to do. No one
  // ever waits, as XLA runs handlers on the same threads.
  struct Shared {
    Shared(const Call& call, const Kernel& kernel) : run(call.problem, call.arrays, kernel) {}
    Run run;
    ffi::Promise promise;
  };
  const auto shared = std::make_shared<Shared>(*call, *kernel);
  ffi::Future future(shared->promise);
  if (shared->run.num_units() == 0) {
    shared->promise.SetAvailable();
    return future;
  }
  const auto work = [shared](const Run::CallHelp& call_help) {
    if (!shared->run.Work(call_help)) return;
    if (shared->run.out_of_memory()) {
      shared->promise.SetError(OutOfMemory());
    } else {
      shared->promise.SetAvailable();
    }
  };
  // The pool can only be asked from within this call.
  const auto call_help = [&](int64_t threads) {
    const int64_t helpers = std::min(threads, pool.num_threads() - 1);
    for (int64_t i = 0; i < helpers; ++i) {
      pool.Schedule([work] { work([](int64_t) {}); });
    }
  };
  if (shared->run.bytes() >= kSerialBytes) call_help(shared->run.num_units() - 1);
  work(call_help);
  return future;
}

ffi::Future Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   Attributes attributes, std::string_view isa) {
  try {
    return Start(pool, args, rets, attributes, isa);
  } catch (const std::bad_alloc&) {  // before any thread has begun
    return Finished(OutOfMemory());
  }
}

}  // namespace
}  // namespace jax_nsa::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_nsa_compress_attention_cpu, jax_nsa::cpu::Handle,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<jax_nsa::Attributes>("problem")
                                  .Attr<std::string_view>("isa"));
