#include "ascend/compress_launch.h"

#include <algorithm>

#include "ascend/tensor.h"

namespace jax_nsa::ascend {
namespace {

constexpr int64_t kLengthOfEach = 1;  // CANN's actSeqLenType: lengths are not cumulative

ffi::Error RunOnce(const CompressApi& functions, const compress::Problem& problem,
                   const compress::Arrays& arrays, const compress::Pair& pair, int64_t first,
                   const std::vector<int64_t>& lengths, Context& context) {
  const Api& api = context.api();
  const aclDataType dtype = AclType(problem.dtype);
  const int64_t sequences = static_cast<int64_t>(lengths.size());
  Arguments arguments(api);
  const auto* input = arguments.AddTensor(
      {problem.num_pages, problem.page_size, problem.heads, pair.head_size}, dtype, pair.input);
  const auto* weight =
      arguments.AddTensor({problem.compress_block_size, problem.heads}, dtype, pair.weight);
  const auto* slots = arguments.AddTensor({sequences}, ACL_INT32, arrays.slots + first);
  const auto* table = arguments.AddTensor({sequences, problem.pages_per_sequence}, ACL_INT32,
                                          arrays.block_table + first * problem.pages_per_sequence);
  auto* cache =
      arguments.AddTensor({problem.rows, problem.heads, pair.head_size}, dtype, pair.cache);
  const auto* actual_lengths = arguments.AddIntegers(lengths);
  JAX_NSA_RETURN_IF_ERROR(arguments.error());

  char layout[] = "TND";
  Execution execution = {"aclnnNsaCompressWithCache", functions.aclnnNsaCompressWithCache};
  JAX_NSA_RETURN_IF_ERROR(JAX_NSA_ACL_OPERATOR_CALL(
      api, functions, aclnnNsaCompressWithCacheGetWorkspaceSize, input, weight, slots,
      actual_lengths, table, layout, problem.compress_block_size, problem.compress_stride,
      kLengthOfEach, problem.page_size, cache, &execution.workspace_size, &execution.executor));
  JAX_NSA_RETURN_IF_ERROR(Execute(execution, context));
  return arguments.Release();
}

}  // namespace

ffi::Error Launch(const CompressApi& functions, const compress::Problem& problem,
                  const compress::Arrays& arrays, const compress::Pair& pair,
                  const std::vector<int64_t>& lengths, Context& context) {
  const int64_t sequences = static_cast<int64_t>(lengths.size());
  for (int64_t first = 0; first < sequences; first += CompressLimits::kMaxSequences) {
    const int64_t end = std::min(sequences, first + CompressLimits::kMaxSequences);
    JAX_NSA_RETURN_IF_ERROR(RunOnce(functions, problem, arrays, pair, first,
                                    {lengths.begin() + first, lengths.begin() + end}, context));
  }
  return ffi::Error::Success();
}

}  // namespace jax_nsa::ascend
