// A call of the selected branch whose arrays lie on the device.

#ifndef JAX_NSA_ASCEND_SELECT_ATTENTION_DEVICE_H_
#define JAX_NSA_ASCEND_SELECT_ATTENTION_DEVICE_H_

#include <cstdint>
#include <vector>

#include "ascend/context.h"
#include "ascend/select_attention_abi.h"
#include "ascend/staging.h"
#include "select_attention_call.h"

namespace jax_nsa::ascend {

// Decodes a call and refuses what CANN's kernel does not have, wherever the buffers are.
ffi::ErrorOr<select_attention::Call> DecodeSelectAttention(ffi::RemainingArgs args,
                                                           ffi::RemainingRets rets,
                                                           ffi::Dictionary attributes);

// From its frame to the stream, in steps. Between them the caller fetches what they ask for. The
// program has made blocks, pages and lengths safe before the call (jax_nsa/backends/ascend); here
// blocks and pages cannot be read without a wait for what computes them.
class SelectAttentionOnDevice {
 public:
  ffi::Error Decode(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes);

  // The integers that Plan reads, to be fetched.
  void AddIntegers(std::vector<Integers>* fetched);

  // Finds what CANN is told; refuses what it cannot serve.
  ffi::Error Plan();

  // Takes the blocks from another place.
  void ReadBlocks(const int32_t* topk_indices) { call_.arrays.topk_indices = topk_indices; }

  // Enqueues the operator.
  ffi::Error Enqueue(const SelectAttentionApi& functions, Context& context) const;

  const select_attention::Problem& problem() const { return call_.problem; }
  // Positions of each row of query.
  const std::vector<int64_t>& lengths() const { return lengths_; }

 private:
  select_attention::Call call_ = {};
  const int32_t* fetched_lengths_ = nullptr;  // null where they are constants of the program
  std::vector<int64_t> lengths_;
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_SELECT_ATTENTION_DEVICE_H_
