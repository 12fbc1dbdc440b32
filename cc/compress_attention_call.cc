#include "compress_attention_call.h"

#include <string>

namespace jax_nsa::compress_attention {

namespace ffi = xla::ffi;

ffi::ErrorOr<Call> Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attributes) {
  FfiCall ffi_call("nsa_compress_attention_infer", args, rets, attributes,
                   {"query", "key", "value", "block_table", "lengths", "token_counts",
                    "early_counts", "select_lengths", "first_rows"},
                   {"attention", "topk_indices", "lse", "block_scores", "workspace"});
  Call call = {};
  Problem& problem = call.problem;
  Arrays& arrays = call.arrays;
  ffi::Span<const int64_t> leading;
  ReadPaged(&ffi_call, &problem, &arrays, &leading);

  problem.blocks = {ffi_call.Integer("compress_block_size"), ffi_call.Integer("compress_stride"),
                    ffi_call.Integer("select_block_size"), ffi_call.Integer("aligned") != 0};
  problem.forced = {ffi_call.Integer("init_blocks"), ffi_call.Integer("local_blocks")};
  problem.causal = ffi_call.Integer("causal") != 0;
  ffi_call.That(problem.blocks.IsLegal(), "the blocks' sizes do not fit each other");
  ffi_call.That(problem.forced.first >= 0 && problem.forced.last >= 0,
                "init_blocks and local_blocks must be at least 0");
  if (!ffi_call.ok()) return ffi::Unexpected(ffi_call.error());

  const bool scores = ffi_call.Find("block_scores").has_value();
  ffi_call.That(!scores || ffi_call.Find("lse"), "gives block_scores beside lse only");
  // Parts of sequences are merged in float32.
  problem.attention_dtype = scores ? DataType::kFloat32 : problem.dtype;
  const FfiCall::Array attention = ffi_call.Get("attention");
  ffi_call.Type(attention, scores ? ffi::DataType::F32 : ffi_call.Get("query").element_type());
  ffi_call.Shape(attention, {problem.heads, problem.value_size}, leading);
  arrays.attention = attention.untyped_data();
  arrays.topk_indices = ReadChosen(&ffi_call, problem, leading, &problem.select_count);
  arrays.early_counts = ffi_call.Integers("early_counts", {problem.sequences});
  arrays.select_lengths = ffi_call.Integers("select_lengths", {problem.sequences});
  ffi_call.That(!problem.blocks.aligned || ffi_call.Find("select_lengths"),
                "needs select_lengths where blocks are aligned");
  arrays.lse = ffi_call.Floats("lse", {problem.heads}, leading);
  arrays.block_scores =
      ffi_call.Floats("block_scores", {problem.heads, problem.max_blocks()}, leading);
  if (!ffi_call.ok()) return ffi::Unexpected(ffi_call.error());

  call.names.lengths = "actual_cmp_seq_kvlen";
  call.names.original_lengths = "actual_sel_seq_kvlen";
  ReadCall(ffi_call, attributes, &call);
  return call;
}

ffi::Error FaultError(const Call& call, Fault fault, int64_t sequence, int64_t page) {
  if (fault != Fault::kOriginalLength) {
    return jax_nsa::FaultError(call.problem, call.arrays, call.names, fault, sequence, page);
  }
  const auto place = [&](std::string_view array) {
    return Place(array, call.problem, call.arrays.first_rows != nullptr, call.names, sequence);
  };
  // Where only early_counts came, it says that the length was at fault, not what it was.
  const Blocks& blocks = call.problem.blocks;
  const int64_t length = call.arrays.lengths[sequence];
  const int64_t first = length > 0 ? blocks.OriginalLength(length) : 0;
  std::string message = place(call.names.original_lengths) + " must be in [" +
                        std::to_string(first) + ", " +
                        std::to_string(blocks.OriginalLength(length + 1) - 1) +
                        "], the original lengths that compress to " + place(call.names.lengths) +
                        " = " + std::to_string(length);
  if (call.arrays.select_lengths) {
    message += ", got " + std::to_string(call.arrays.select_lengths[sequence]);
  }
  return InvalidArgument(message);
}

}  // namespace jax_nsa::compress_attention
