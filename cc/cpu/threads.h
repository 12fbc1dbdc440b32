// How an XLA FFI handler does its work with as many threads of XLA's pool as are free. No one ever
// waits, as XLA runs handlers on the same threads: a call returns a future, and whoever finishes
// the last piece of its work finishes the call.

#ifndef JAX_NSA_CPU_THREADS_H_
#define JAX_NSA_CPU_THREADS_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "cpu/help.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu {

namespace ffi = xla::ffi;

inline ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the CPU kernel ran out of memory");
}

inline ffi::Error NoKernel(std::string_view isa) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    "this machine has no CPU kernel \"" + std::string(isa) + "\"");
}

// A call that threads work on. Whoever takes part keeps it alive: a thread may come late, to
// nothing left to do. A Run has units of work and says of how many bytes; its Work does what is
// left to take, and returns true to the one caller that finishes the last.
template <class Run>
struct SharedWork {
  template <class... Args>
  explicit SharedWork(Args&&... args) : run(std::forward<Args>(args)...) {}

  // Takes part in the work, and finishes the call if nothing is left.
  void TakePart(const CallHelp& call_help) {
    if (!run.Work(call_help)) return;
    if (run.out_of_memory()) {
      promise.SetError(std::move(out_of_memory));
    } else {
      promise.SetAvailable();
    }
  }

  Run run;
  ffi::Promise promise;
  ffi::Error out_of_memory = OutOfMemory();  // made while there is memory
};

// Other threads write results from here on, so that nothing may fail the call early.
template <class Run>
void Start(ffi::ThreadPool pool, const std::shared_ptr<SharedWork<Run>>& work) noexcept {
  if (work->run.num_units() == 0) return work->promise.SetAvailable();
  // The pool can only be asked from within this call. Asking takes memory; where there is none,
  // fewer threads do the same work.
  const auto call_help = [&](int64_t threads) {
    const int64_t helpers = std::min(threads, pool.num_threads() - 1);
    try {
      for (int64_t i = 0; i < helpers; ++i) {
        pool.Schedule([work] { work->TakePart([](int64_t) {}); });
      }
    } catch (const std::bad_alloc&) {
    }
  };
  if (work->run.bytes() >= kSerialBytes) call_help(work->run.num_units() - 1);
  work->TakePart(std::cref(call_help));
}

// Does what `prepare()` makes of a call, an ffi::ErrorOr<std::shared_ptr<SharedWork<Run>>>.
template <class Prepare>
ffi::Future DoWork(ffi::ThreadPool pool, Prepare prepare) {
  const auto failed = [](ffi::Error error) {
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetError(std::move(error));
    return future;
  };
  try {
    const auto work = prepare();
    if (work.has_error()) return failed(work.error());
    ffi::Future future((*work)->promise);
    Start(pool, *work);
    return future;
  } catch (const std::bad_alloc&) {
    return failed(OutOfMemory());
  }
}

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_THREADS_H_
