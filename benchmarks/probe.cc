// What the machine can do at best: reading memory by plain vector loads, and a call through XLA's
// FFI that does nothing. Compiled by benchmarks/probe.py when it is first needed.

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace {

using Vector = uint64_t __attribute__((vector_size(64)));
constexpr int64_t kStreams = 8;  // sums side by side, so that no load waits for another

xla::ffi::Error DoNothing(xla::ffi::RemainingArgs, xla::ffi::RemainingRets) {
  return xla::ffi::Error::Success();
}

}  // namespace

extern "C" {

// The exclusive or of all 64-bit words, so that every load counts; `bytes` in whole 512s.
uint64_t read_all(const char* data, int64_t bytes) {
  Vector sums[kStreams] = {};
  for (int64_t at = 0; at < bytes; at += sizeof sums) {
    for (int64_t i = 0; i < kStreams; ++i) {
      Vector loaded;
      std::memcpy(&loaded, data + at + i * sizeof loaded, sizeof loaded);
      sums[i] ^= loaded;
    }
  }
  uint64_t result = 0;
  for (const Vector& sum : sums) {
    for (int64_t lane = 0; lane < 8; ++lane) result ^= sum[lane];
  }
  return result;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(do_nothing, DoNothing,
                              xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets());

}  // extern "C"
