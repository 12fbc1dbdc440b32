// Arrays on their way between the host and a device.

#ifndef JAX_NSA_ASCEND_STAGING_H_
#define JAX_NSA_ASCEND_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ascend/context.h"
#include "ascend/runtime.h"

namespace jax_nsa::ascend {

// Arrays laid one after the other in one piece of memory. The same offsets serve the device and
// its staging memory on the host, so neighbours travel in one copy.
class Pieces {
 public:
  size_t Add(size_t size) {
    const size_t offset = end_;
    end_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  size_t end() const { return end_; }

 private:
  static constexpr size_t kAlignment = 512;
  size_t end_ = 0;
};

// Makes room for them in the context's device memory and its staging memory.
ffi::Error Reserve(const Pieces& pieces, Context& context);

// Enqueues a copy of the bytes [begin, end) of the staging memory to the device, or back.
ffi::Error CopyIn(size_t begin, size_t end, Context& context);
ffi::Error CopyOut(size_t begin, size_t end, Context& context);

// Copies `rows` rows of `from_bytes` each into as many of `to_bytes`, padded with zeros or cut.
void CopyRows(const void* from, size_t from_bytes, int64_t rows, size_t to_bytes, void* to);

// An array of integers, null where a call has none.
struct Integers {
  const int32_t** array;
  int64_t size;
};

// Points arrays on the device to copies on the host, which takes one wait for the stream; where
// there are none, none. The copies are the context's, until its next call.
ffi::Error FetchIntegers(const std::vector<Integers>& operands, Context& context);

// Fetches, with one wait, the integers that calls ask for by AddIntegers, and has each Plan with
// them.
template <typename... Calls>
ffi::Error FetchAndPlan(Context& context, Calls*... calls) {
  std::vector<Integers> integers;
  (calls->AddIntegers(&integers), ...);
  JAX_NSA_RETURN_IF_ERROR(FetchIntegers(integers, context));
  ffi::Error error = ffi::Error::Success();
  static_cast<void>(((error = calls->Plan()).success() && ...));
  return error;
}

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_STAGING_H_
