#include "ascend/launch.h"

#include <cstdio>
#include <vector>

namespace jax_nsa::ascend {
namespace {

using Dims = std::vector<int64_t>;

ffi::Error MakeTensor(const Api& api, const Dims& dims, aclDataType type, const void* data,
                      Tensor* tensor) {
  Dims strides(dims.size(), 1);
  for (size_t axis = dims.size() - 1; axis > 0; --axis) {
    strides[axis - 1] = strides[axis] * dims[axis];
  }
  // CANN's tensors are all writable; those that hold operands are only read.
  aclTensor* created =
      api.aclCreateTensor(dims.data(), dims.size(), type, strides.data(), /*offset=*/0,
                          ACL_FORMAT_ND, dims.data(), dims.size(), const_cast<void*>(data));
  if (created == nullptr) return NullError(api, "aclCreateTensor");
  *tensor = Tensor(api, created);
  return ffi::Error::Success();
}

ffi::Error MakeIntArray(const Api& api, const std::vector<int64_t>& values, IntArray* array) {
  aclIntArray* created = api.aclCreateIntArray(values.data(), values.size());
  if (created == nullptr) return NullError(api, "aclCreateIntArray");
  *array = IntArray(api, created);
  return ffi::Error::Success();
}

}  // namespace

ffi::Error Launch(const CompressAttentionApi& functions, const Problem& problem,
                  const Arrays& arrays, const Request& request, QueryLayout layout,
                  Context& context) {
  const Api& api = context.api();
  const aclDataType dtype = problem.dtype == DataType::kBFloat16 ? ACL_BF16 : ACL_FLOAT16;
  const auto token_dims = [&](Dims row) {
    const Dims leading = layout == QueryLayout::kPacked ? Dims{request.total_tokens}
                                                        : Dims{problem.sequences, problem.tokens};
    row.insert(row.begin(), leading.begin(), leading.end());
    return row;
  };

  Tensor query, key, value, table, mask, attention, indices;
  JAX_NSA_RETURN_IF_ERROR(
      MakeTensor(api, token_dims({problem.heads, problem.head_size}), dtype, arrays.query, &query));
  JAX_NSA_RETURN_IF_ERROR(MakeTensor(
      api, {problem.num_pages, problem.page_size, problem.key_value_heads * problem.head_size},
      dtype, arrays.key, &key));
  JAX_NSA_RETURN_IF_ERROR(MakeTensor(
      api, {problem.num_pages, problem.page_size, problem.key_value_heads * problem.value_size},
      dtype, arrays.value, &value));
  JAX_NSA_RETURN_IF_ERROR(MakeTensor(api, {problem.sequences, problem.pages_per_sequence},
                                     ACL_INT32, arrays.block_table, &table));
  JAX_NSA_RETURN_IF_ERROR(MakeTensor(api, token_dims({problem.heads, problem.value_size}), dtype,
                                     arrays.attention, &attention));
  JAX_NSA_RETURN_IF_ERROR(MakeTensor(api,
                                     token_dims({problem.key_value_heads, problem.select_count}),
                                     ACL_INT32, arrays.topk_indices, &indices));
  if (request.causal) {
    // The kernel takes the mask's presence as the wish for causal tokens and derives the rest from
    // the lengths. All zeros says the same to one that would read it: nothing else is masked.
    const Dims dims = {request.most_tokens, request.longest};
    const size_t size = dims[0] * dims[1];
    JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.mask, size));
    JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_CALL(api, aclrtMemsetAsync, context.mask.data(), size, 0,
                                             size, context.stream()));
    JAX_NSA_RETURN_IF_ERROR(MakeTensor(api, dims, ACL_BOOL, context.mask.data(), &mask));
  }

  // Token counts are always passed: without them some CANN versions read uninitialised memory.
  IntArray token_counts, lengths, select_lengths;
  JAX_NSA_RETURN_IF_ERROR(MakeIntArray(api, request.token_counts, &token_counts));
  JAX_NSA_RETURN_IF_ERROR(MakeIntArray(api, request.lengths, &lengths));
  if (!request.select_lengths.empty()) {
    JAX_NSA_RETURN_IF_ERROR(MakeIntArray(api, request.select_lengths, &select_lengths));
  }

  char layout_name[5];
  std::snprintf(layout_name, sizeof layout_name, "%s",
                layout == QueryLayout::kPacked ? "TND" : "BSND");
  uint64_t workspace_size = 0;
  aclOpExecutor* executor = nullptr;
  JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_OPERATOR_CALL(
      api, functions, aclnnNsaCompressAttentionInferGetWorkspaceSize, query.get(), key.get(),
      value.get(), mask.get(), table.get(), token_counts.get(), lengths.get(), select_lengths.get(),
      /*topk_mask=*/nullptr, problem.heads, problem.key_value_heads,
      problem.blocks.select_block_size, problem.select_count, problem.blocks.compress_block_size,
      problem.blocks.compress_stride, problem.scale, layout_name, problem.page_size,
      /*sparse_mode=*/0, attention.get(), indices.get(), &workspace_size, &executor));
  if (executor == nullptr) {
    return NullError(api, "aclnnNsaCompressAttentionInferGetWorkspaceSize");
  }
  // From here to the launch an error loses the executor: CANN frees it with the launch, and has no
  // other way for executors that are used once.
  JAX_NSA_RETURN_IF_ERROR(context.Reserve(&context.workspace, workspace_size));
  JAX_NSA_RETURN_IF_ERROR(
      JAX_NSA_ACL_OPERATOR_CALL(api, functions, aclnnNsaCompressAttentionInfer,
                                workspace_size ? context.workspace.data() : nullptr, workspace_size,
                                executor, context.stream()));

  for (IntArray* array : {&token_counts, &lengths, &select_lengths}) {
    JAX_NSA_RETURN_IF_ERROR(array->Reset());
  }
  for (Tensor* tensor : {&query, &key, &value, &table, &mask, &attention, &indices}) {
    JAX_NSA_RETURN_IF_ERROR(tensor->Reset());
  }
  return ffi::Error::Success();
}

}  // namespace jax_nsa::ascend
