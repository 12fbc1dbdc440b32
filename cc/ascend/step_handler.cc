// The XLA FFI handler of a whole decode step on an NPU, under an Ascend PJRT plugin: the compressed
// branch, the branch that reads the blocks which that one chooses, and the window, in one custom
// call, so that their lengths take one wait for the stream.

#include <string>
#include <string_view>

#include "ascend/compress_attention_device.h"
#include "ascend/handlers.h"
#include "ascend/run.h"
#include "ascend/select_attention_device.h"
#include "ascend/staging.h"
#include "joint_call.h"

namespace jax_nsa::ascend {
namespace {

ffi::Error Refused(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "nsa_decode_step: " + message);
}

// Refuses blocks that are read for other rows than those that choose them.
ffi::Error CheckRows(const Problem& chooses, const select_attention::Problem& reads) {
  if (reads.rows != chooses.rows || reads.key_value_heads != chooses.key_value_heads ||
      reads.select_count != chooses.select_count) {
    return Refused("blocks are chosen for [" + std::to_string(chooses.rows) + ", " +
                   std::to_string(chooses.key_value_heads) + ", " +
                   std::to_string(chooses.select_count) + "] and read for [" +
                   std::to_string(reads.rows) + ", " + std::to_string(reads.key_value_heads) +
                   ", " + std::to_string(reads.select_count) + "]");
  }
  return ffi::Error::Success();
}

// The chosen blocks are not seen here. CANN's kernel chooses among all that a sequence's compressed
// positions reach: so each row must begin the last of them.
ffi::Error CheckLengths(const CompressAttentionOnDevice& chooses,
                        const SelectAttentionOnDevice& reads) {
  const Blocks& blocks = chooses.call().problem.blocks;
  const Request& request = chooses.request();
  for (size_t b = 0; b < request.lengths.size(); ++b) {
    const int64_t last = blocks.NumBlocks(request.lengths[b]) - 1;
    for (int64_t t = 0; t < request.token_counts[b]; ++t) {
      const int64_t row = request.first_rows[b] + t;
      if (reads.lengths()[row] > last * blocks.select_block_size) continue;
      return Refused("row " + std::to_string(row) + " of query may choose block " +
                     std::to_string(last) + " of " + std::to_string(blocks.select_block_size) +
                     " tokens, and block_table of the selected branch has room for " +
                     std::to_string(reads.lengths()[row]) + " tokens");
    }
  }
  return ffi::Error::Success();
}

ffi::Error HandleOnDevice(aclrtStream stream, int32_t ordinal, ffi::RemainingArgs args,
                          ffi::RemainingRets rets, ffi::Dictionary attributes) {
  JointCall joint(args, rets, attributes);
  CompressAttentionOnDevice compressed;
  SelectAttentionOnDevice chosen, window;
  const auto decode_next = [&joint](std::string_view prefix, auto* call) {
    const Branch branch = joint.Next(prefix);
    return call->Decode(branch.args, branch.rets, branch.attributes);
  };
  JAX_NSA_RETURN_IF_ERROR(decode_next("compressed_", &compressed));
  JAX_NSA_RETURN_IF_ERROR(decode_next("chosen_", &chosen));
  JAX_NSA_RETURN_IF_ERROR(decode_next("window_", &window));
  if (!joint.Done()) return Refused("there are arrays that belong to none of its branches");
  JAX_NSA_RETURN_IF_ERROR(CheckRows(compressed.call().problem, chosen.problem()));
  chosen.ReadBlocks(compressed.call().arrays.topk_indices);

  return RunOnStream<CompressAttentionApi>(
      stream, ordinal, [&](const CompressAttentionApi& functions, Context& context) -> ffi::Error {
        const auto select_functions = LoadOperator<SelectAttentionApi>();
        if (select_functions.has_error()) return select_functions.error();
        JAX_NSA_RETURN_IF_ERROR(FetchAndPlan(context, &compressed, &chosen, &window));
        JAX_NSA_RETURN_IF_ERROR(CheckLengths(compressed, chosen));
        // A row without a token reads block 0, as CANN's kernel would never end at -1.
        JAX_NSA_RETURN_IF_ERROR(compressed.Enqueue(functions, /*absent=*/0, context));
        JAX_NSA_RETURN_IF_ERROR(chosen.Enqueue(**select_functions, context));
        return window.Enqueue(**select_functions, context);
      });
}

}  // namespace
}  // namespace jax_nsa::ascend

JAX_NSA_ASCEND_DEVICE_HANDLER(step);
