// A call of the compressed branch whose arrays lie on the device.

#ifndef JAX_NSA_ASCEND_COMPRESS_ATTENTION_DEVICE_H_
#define JAX_NSA_ASCEND_COMPRESS_ATTENTION_DEVICE_H_

#include <cstdint>
#include <vector>

#include "ascend/compress_attention_abi.h"
#include "ascend/compress_attention_launch.h"
#include "ascend/compress_attention_request.h"
#include "ascend/context.h"
#include "ascend/staging.h"

namespace jax_nsa::ascend {

// Decodes a call and refuses what CANN's kernel does not have, wherever the buffers are.
ffi::ErrorOr<Call> DecodeCompressAttention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                           ffi::Dictionary attributes);

// From its frame to the stream, in steps. Between them the caller fetches what they ask for.
class CompressAttentionOnDevice {
 public:
  ffi::Error Decode(ffi::RemainingArgs args, ffi::RemainingRets rets, ffi::Dictionary attributes);

  // The integers that Plan reads, to be fetched.
  void AddIntegers(std::vector<Integers>* fetched);

  // Finds what CANN is told; refuses what it cannot serve.
  ffi::Error Plan();

  // Enqueues the operator. What the indices of rows without a token become is `absent`, repeated.
  ffi::Error Enqueue(const CompressAttentionApi& functions, uint8_t absent, Context& context) const;

  const Call& call() const { return call_; }
  const Request& request() const { return request_; }

 private:
  ffi::Error Fill(int64_t first, uint8_t absent, Context& context) const;

  Call call_ = {};
  Call on_host_ = {};  // with integers that can be read
  std::vector<int32_t> constant_lengths_;
  PageIds page_ids_ = PageIds::kOnHost;
  Request request_;
  QueryLayout layout_ = QueryLayout::kPacked;
  int64_t first_absent_ = 0;  // from where on rows may have no token
};

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_COMPRESS_ATTENTION_DEVICE_H_
