// The XLA FFI handler of compression's CPU kernel.

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "compress_call.h"
#include "cpu/compress_isa.h"
#include "cpu/sizes.h"
#include "cpu/threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu::compress {
namespace {

using jax_nsa::compress::Call;
using jax_nsa::compress::RowOfToken;
using jax_nsa::compress::Write;

int64_t RowBytes(const Problem& problem, const Pair& pair) {
  return problem.heads * pair.head_size * ElementSize(problem.dtype);
}

// The work of a call, in units of one window of one input.
class Run {
 public:
  Run(const Call& call, Kernel kernel, std::vector<Write> writes)
      : call_(call), kernel_(kernel), writes_(std::move(writes)) {}

  int64_t num_units() const { return static_cast<int64_t>(writes_.size()) * call_.problem.pairs; }
  int64_t bytes() const {
    int64_t row = 0;
    for (const Pair& pair : call_.arrays.pairs) row += RowBytes(call_.problem, pair);
    return static_cast<int64_t>(writes_.size()) * call_.problem.compress_block_size * row;
  }
  static bool out_of_memory() { return false; }  // a unit takes none

  // Does units until none is left to take; true for the one caller that finishes the last.
  bool Work(const CallHelp&) {
    bool is_last = false;
    for (int64_t unit; (unit = next_++) < num_units();) {
      Do(unit);
      is_last = ++finished_ == num_units();
    }
    return is_last;
  }

 private:
  void Do(int64_t unit) const {
    const Problem& problem = call_.problem;
    const Write& write = writes_[unit / problem.pairs];
    const Pair& pair = call_.arrays.pairs[unit % problem.pairs];
    const int64_t row_bytes = RowBytes(problem, pair);
    const char* rows[kMaxBlockSize];
    for (int64_t t = 0; t < problem.compress_block_size; ++t) {
      rows[t] = static_cast<const char*>(pair.input) +
                RowOfToken(problem, call_.arrays, write.sequence, write.first + t) * row_bytes;
    }
    kernel_(problem, pair, rows, static_cast<char*>(pair.cache) + write.row * row_bytes);
  }

  const Call call_;
  const Kernel kernel_;
  const std::vector<Write> writes_;
  std::atomic<int64_t> next_{0}, finished_{0};  // units
};

using Work = SharedWork<Run>;

// Everything is checked before anything is written: no fault may fail a call that threads work on.
ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = jax_nsa::compress::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel kernel = FindKernel(isa);
  if (kernel == nullptr) return ffi::Unexpected(NoKernel(isa));
  ffi::ErrorOr<std::vector<Write>> writes = jax_nsa::compress::FindWrites(*call);
  if (writes.has_error()) return ffi::Unexpected(writes.error());
  return std::make_shared<Work>(*call, kernel, std::move(*writes));
}

ffi::Future Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  return DoWork(pool, [&] { return Prepare(args, rets, attributes); });
}

}  // namespace
}  // namespace jax_nsa::cpu::compress

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_cpu, jax_nsa::cpu::compress::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
