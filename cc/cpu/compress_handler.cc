// The XLA FFI handler of compression's CPU kernel.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "compress_call.h"
#include "cpu/compress_isa.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu::compress {
namespace {

namespace ffi = xla::ffi;

using jax_nsa::compress::Call;
using jax_nsa::compress::RowOfToken;
using jax_nsa::compress::Write;

// Work that reads less is not given to other threads: waking them costs more.
constexpr int64_t kSerialBytes = 256 << 10;

int64_t RowBytes(const Problem& problem, const Pair& pair) {
  return problem.heads * pair.head_size * (problem.dtype == DataType::kFloat32 ? 4 : 2);
}

// A call that threads work on, in units of one window of one input. Whoever takes part keeps it
// alive: a thread may come late, to nothing left to do.
struct Work {
  Call call;
  Kernel kernel;
  std::vector<Write> writes;
  std::atomic<int64_t> next{0}, finished{0};  // units
  ffi::Promise promise;

  int64_t num_units() const { return static_cast<int64_t>(writes.size()) * call.problem.pairs; }
  int64_t bytes() const {
    int64_t row = 0;
    for (const Pair& pair : call.arrays.pairs) row += RowBytes(call.problem, pair);
    return static_cast<int64_t>(writes.size()) * call.problem.compress_block_size * row;
  }

  void Do(int64_t unit) const {
    const Problem& problem = call.problem;
    const Write& write = writes[unit / problem.pairs];
    const Pair& pair = call.arrays.pairs[unit % problem.pairs];
    const int64_t row_bytes = RowBytes(problem, pair);
    const char* rows[kMaxBlockSize];
    for (int64_t t = 0; t < problem.compress_block_size; ++t) {
      rows[t] = static_cast<const char*>(pair.input) +
                RowOfToken(problem, call.arrays, write.sequence, write.first + t) * row_bytes;
    }
    kernel(problem, pair, rows, static_cast<char*>(pair.cache) + write.row * row_bytes);
  }
};

ffi::Error OutOfMemory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the CPU kernel ran out of memory");
}

// Everything is checked before anything is written: no fault may fail a call that threads work on.
ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = jax_nsa::compress::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInvalidArgument,
                   "this machine has no CPU kernel \"" + std::string(isa) + "\""));
  }
  ffi::ErrorOr<std::vector<Write>> writes = jax_nsa::compress::FindWrites(*call);
  if (writes.has_error()) return ffi::Unexpected(writes.error());
  auto work = std::make_shared<Work>();
  work->call = *call;
  work->kernel = kernel;
  work->writes = std::move(*writes);
  return work;
}

// Takes part in the work, and finishes the call if nothing is left.
void TakePart(Work& work) {
  for (int64_t unit; (unit = work.next++) < work.num_units();) {
    work.Do(unit);
    if (++work.finished == work.num_units()) work.promise.SetAvailable();
  }
}

// Works with as many threads as are free. No one ever waits, as XLA runs handlers on the same
// threads.
void Start(ffi::ThreadPool pool, const std::shared_ptr<Work>& work) noexcept {
  if (work->num_units() == 0) return work->promise.SetAvailable();
  if (work->bytes() >= kSerialBytes) {
    const int64_t helpers = std::min(work->num_units(), pool.num_threads()) - 1;
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
  if (work.has_error()) {
    ffi::Promise promise;
    promise.SetError(work.error());
    return ffi::Future(promise);
  }
  ffi::Future future((*work)->promise);
  Start(pool, *work);
  return future;
}

}  // namespace
}  // namespace jax_nsa::cpu::compress

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_cpu, jax_nsa::cpu::compress::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
