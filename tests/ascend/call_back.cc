// A custom call that runs a function of the test's: to XLA one like those of this library, which a
// callback of JAX's is not, as every callback is another to it.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Gets the data of all operands, then of all results. Writes what went wrong into `message`.
using Function = void (*)(void** arrays, char* message, size_t size);

ffi::Error CallBack(int64_t function, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  std::vector<void*> arrays;
  for (size_t i = 0; i < operands.size(); ++i) {
    arrays.push_back(operands.get<ffi::AnyBuffer>(i)->untyped_data());
  }
  for (size_t i = 0; i < results.size(); ++i) {
    arrays.push_back((*results.get<ffi::AnyBuffer>(i))->untyped_data());
  }
  char message[256] = "";
  reinterpret_cast<Function>(function)(arrays.data(), message, sizeof message);
  return *message == '\0' ? ffi::Error::Success()
                          : ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    call_back, CallBack,
    ffi::Ffi::Bind().Attr<int64_t>("function").RemainingArgs().RemainingRets());
