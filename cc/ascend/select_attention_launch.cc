#include "ascend/select_attention_launch.h"

#include <algorithm>
#include <cstddef>

#include "ascend/tensor.h"

namespace jax_nsa::ascend {
namespace {

using select_attention::Arrays;
using select_attention::Problem;

// The arrays from sequence `first` on.
Arrays From(const Problem& problem, const Arrays& arrays, int64_t first) {
  const auto advance = [&](const void* array, int64_t row_elements) {
    return static_cast<const std::byte*>(array) + first * row_elements * kElementSize;
  };
  Arrays rest = arrays;
  rest.query = advance(arrays.query, problem.heads * problem.head_size);
  rest.attention =
      const_cast<std::byte*>(advance(arrays.attention, problem.heads * problem.value_size));
  rest.block_table += first * problem.pages_per_sequence;
  rest.topk_indices += first * problem.select_count;
  return rest;
}

ffi::Error RunOnce(const SelectAttentionApi& functions, const Problem& problem,
                   const Arrays& arrays, const std::vector<int64_t>& lengths, Context& context) {
  const Api& api = context.api();
  const aclDataType dtype = AclType(problem.dtype);
  const int64_t sequences = static_cast<int64_t>(lengths.size());
  Arguments arguments(api);
  const auto* query =
      arguments.AddTensor({sequences, 1, problem.heads, problem.head_size}, dtype, arrays.query);
  const auto* key = arguments.AddTensor(
      {problem.num_pages, problem.page_size, 1, problem.head_size}, dtype, arrays.key);
  const auto* value = arguments.AddTensor(
      {problem.num_pages, problem.page_size, 1, problem.value_size}, dtype, arrays.value);
  const auto* indices =
      arguments.AddTensor({sequences, 1, 1, problem.select_count}, ACL_INT32, arrays.topk_indices);
  const auto* table =
      arguments.AddTensor({sequences, problem.pages_per_sequence}, ACL_INT32, arrays.block_table);
  auto* attention = arguments.AddTensor({sequences, 1, problem.heads, problem.value_size}, dtype,
                                        arrays.attention);
  // Token counts are always passed: without them some CANN versions read uninitialised memory.
  const auto* token_counts = arguments.AddIntegers(std::vector<int64_t>(lengths.size(), 1));
  const auto* kv_lengths = arguments.AddIntegers(lengths);
  JAX_NSA_RETURN_IF_ERROR(arguments.error());

  char layout[] = "BSND";
  Execution execution = {"aclnnNsaSelectedAttentionInfer",
                         functions.aclnnNsaSelectedAttentionInfer};
  JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_OPERATOR_CALL(
      api, functions, aclnnNsaSelectedAttentionInferGetWorkspaceSize, query, key, value, indices,
      /*attention_mask=*/nullptr, table, token_counts, kv_lengths, layout, problem.heads,
      problem.key_value_heads, problem.select_block_size, problem.select_count, problem.page_size,
      problem.scale, /*sparse_mode=*/0, attention, &execution.workspace_size, &execution.executor));
  JAX_NSA_RETURN_IF_ERROR(Execute(execution, context));
  return arguments.Release();
}

}  // namespace

ffi::Error Launch(const SelectAttentionApi& functions, const Problem& problem, const Arrays& arrays,
                  const std::vector<int64_t>& lengths, Context& context) {
  const int64_t sequences = static_cast<int64_t>(lengths.size());
  for (int64_t first = 0; first < sequences; first += SelectAttentionLimits::kMaxSequences) {
    const int64_t end = std::min(sequences, first + SelectAttentionLimits::kMaxSequences);
    JAX_NSA_RETURN_IF_ERROR(RunOnce(functions, problem, From(problem, arrays, first),
                                    {lengths.begin() + first, lengths.begin() + end}, context));
  }
  return ffi::Error::Success();
}

}  // namespace jax_nsa::ascend
