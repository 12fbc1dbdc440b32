// The XLA FFI handler of the CPU kernel.

#include <memory>
#include <string_view>
#include <vector>

#include "compress_attention_call.h"
#include "cpu/compress_attention_isa.h"
#include "cpu/compress_attention_run.h"
#include "cpu/threads.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa::cpu::compressed {
namespace {

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

using Work = SharedWork<Run>;

ffi::ErrorOr<std::shared_ptr<Work>> Prepare(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                            ffi::Dictionary attributes) {
  ffi::ErrorOr<Call> call = compress_attention::Decode(args, rets, attributes);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const std::string_view isa = Attribute(attributes, "isa", std::string_view());
  const Kernel* const kernel = FindKernel(isa);
  if (kernel == nullptr) {
    return ffi::Unexpected(NoKernel(isa));
  }
  std::vector<bool> faulty;
  if (ffi::Error error = Check(*call, &faulty); error.failure()) {
    return ffi::Unexpected(std::move(error));
  }
  return std::make_shared<Work>(call->problem, call->arrays, *kernel, faulty);
}

ffi::Future Handle(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                   ffi::Dictionary attributes) {
  return DoWork(pool, [&] { return Prepare(args, rets, attributes); });
}

}  // namespace
}  // namespace jax_nsa::cpu::compressed

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_attention_cpu, jax_nsa::cpu::compressed::Handle,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attrs());
