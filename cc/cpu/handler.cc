// The XLA FFI handler of the CPU kernel.

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compress_attention_call.h"
#include "cpu/isa.h"
#include "cpu/run.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu {
namespace {

namespace ffi = xla::ffi;

using compress_attention::Call;

// Looks for faults before anything is read through them. Fails with the first one, or, where faults
// do not fail the call, says which sequences have one.
ffi::Error Check(const Call& call, std::vector<bool>* faulty) {
  const Problem& problem = call.problem;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    SequenceRows rows;
    int64_t page = 0;
    Fault fault = FindRows(problem, call.arrays, b, &rows);
    if (fault == Fault::kNone && rows.count > 0) {
      const int32_t* const pages = call.arrays.block_table + b * problem.pages_per_sequence;
      while (page * problem.page_size < call.arrays.lengths[b] && IsPage(problem, pages[page])) {
        ++page;
      }
      if (page * problem.page_size < call.arrays.lengths[b]) fault = Fault::kPageId;
    }
    if (fault == Fault::kNone) continue;
    if (call.faults_fail) return FaultError(call, fault, b, page);
    if (faulty->empty()) faulty->resize(problem.sequences);
    (*faulty)[b] = true;
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

// A call that threads work on. Whoever takes part keeps it alive: a thread may come late, to
// nothing left to do.
struct Work {
  Work(const Call& call, const Kernel& kernel, const std::vector<bool>& faulty)
      : run(call.problem, call.arrays, kernel, faulty) {}

  Run run;
  ffi::Promise promise;
  ffi::Error out_of_memory = OutOfMemory();  // made while there is memory
};

ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = compress_attention::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel* const kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInvalidArgument,
                   "this machine has no CPU kernel \"" + std::string(isa) + "\""));
  }
  std::vector<bool> faulty;
  if (ffi::Error error = Check(*call, &faulty); error.failure()) {
    return ffi::Unexpected(std::move(error));
  }
  return std::make_shared<Work>(*call, *kernel, faulty);
}

// Takes part in the work, and finishes the call if nothing is left.
void TakePart(Work& work, const Run::CallHelp& call_help) {
  if (!work.run.Work(call_help)) return;
  if (work.run.out_of_memory()) {
    work.promise.SetError(std::move(work.out_of_memory));
  } else {
    work.promise.SetAvailable();
  }
}

// Works with as many threads as are free. No one ever waits, as XLA runs handlers on the same
// threads. Other threads write results from here on, so that nothing may fail the call early.
void Start(ffi::ThreadPool pool, const std::shared_ptr<Work>& work) noexcept {
  // The pool can only be asked from within this call. Asking takes memory; where there is none,
  // fewer threads do the same work.
  const auto call_help = [&](int64_t threads) {
    const int64_t helpers = std::min(threads, pool.num_threads() - 1);
    try {
      for (int64_t i = 0; i < helpers; ++i) {
        pool.Schedule([work] { TakePart(*work, [](int64_t) {}); });
      }
    } catch (const std::bad_alloc&) {
    }
  };
  if (work->run.bytes() >= kSerialBytes) call_help(work->run.num_units() - 1);
  TakePart(*work, std::cref(call_help));
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
  if ((*work)->run.num_units() == 0) {
    (*work)->promise.SetAvailable();
  } else {
    Start(pool, *work);
  }
  return future;
}

}  // namespace
}  // namespace jax_nsa::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_attention_cpu, jax_nsa::cpu::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
