#include "ascend/compress_attention_launch.h"

#include <cstdio>

#include "ascend/tensor.h"

namespace jax_nsa::ascend {

ffi::Error Launch(const CompressAttentionApi& functions, const Problem& problem,
                  const Arrays& arrays, const Request& request, QueryLayout layout,
                  Context& context) {
  const Api& api = context.api();
  const aclDataType dtype = AclType(problem.dtype);
  const auto token_dims = [&](Dims row) {
    const Dims leading = layout == QueryLayout::kPacked ? Dims{request.total_tokens}
                                                        : Dims{problem.sequences, problem.tokens};
    row.insert(row.begin(), leading.begin(), leading.end());
    return row;
  };

  Arguments arguments(api);
  const auto* query =
      arguments.AddTensor(token_dims({problem.heads, problem.head_size}), dtype, arrays.query);
  const auto* key = arguments.AddTensor(
      {problem.num_pages, problem.page_size, problem.key_value_heads * problem.head_size}, dtype,
      arrays.key);
  const auto* value = arguments.AddTensor(
      {problem.num_pages, problem.page_size, problem.key_value_heads * problem.value_size}, dtype,
      arrays.value);
  const auto* table = arguments.AddTensor({problem.sequences, problem.pages_per_sequence},
                                          ACL_INT32, arrays.block_table);
  const auto* attention =
      arguments.AddTensor(token_dims({problem.heads, problem.value_size}), dtype, arrays.attention);
  const auto* indices = arguments.AddTensor(
      token_dims({problem.key_value_heads, problem.select_count}), ACL_INT32, arrays.topk_indices);
  const aclTensor* mask = nullptr;
  if (request.causal) {
    // The kernel takes the mask's presence as the wish for causal tokens and derives the rest from
    // the lengths. All zeros says the same to one that would read it: nothing else is masked.
    const Dims dims = {request.most_tokens, request.longest};
    const size_t size = dims[0] * dims[1];
    JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.mask, size));
    JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_CALL(api, aclrtMemsetAsync, context.mask.data(), size, 0,
                                             size, context.stream()));
    mask = arguments.AddTensor(dims, ACL_BOOL, context.mask.data());
  }
  // Token counts are always passed: without them some CANN versions read uninitialised memory.
  const auto* token_counts = arguments.AddIntegers(request.token_counts);
  const auto* lengths = arguments.AddIntegers(request.lengths);
  const aclIntArray* select_lengths =
      request.select_lengths.empty() ? nullptr : arguments.AddIntegers(request.select_lengths);
  JAX_NSA_RETURN_IF_ERROR(arguments.error());

  char layout_name[5];
  std::snprintf(layout_name, sizeof layout_name, "%s",
                layout == QueryLayout::kPacked ? "TND" : "BSND");
  Execution execution = {"aclnnNsaCompressAttentionInfer",
                         functions.aclnnNsaCompressAttentionInfer};
  JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_OPERATOR_CALL(
      api, functions, aclnnNsaCompressAttentionInferGetWorkspaceSize, query, key, value, mask,
      table, token_counts, lengths, select_lengths, /*topk_mask=*/nullptr, problem.heads,
      problem.key_value_heads, problem.blocks.select_block_size, problem.select_count,
      problem.blocks.compress_block_size, problem.blocks.compress_stride, problem.scale,
      layout_name, problem.page_size, /*sparse_mode=*/0, attention, indices,
      &execution.workspace_size, &execution.executor));
  JAX_NSA_RETURN_IF_ERROR(Execute(execution, context));
  return arguments.Release();
}

}  // namespace jax_nsa::ascend
