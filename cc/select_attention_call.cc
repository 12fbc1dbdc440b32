#include "select_attention_call.h"

#include <optional>
#include <string>

namespace jax_nsa::select_attention {
namespace {

namespace ffi = xla::ffi;

// Reads one of the two attentions and its lse, each null where it is not wanted.
void ReadResults(FfiCall* ffi_call, const char* attention, const char* lse,
                 ffi::Span<const int64_t> leading, Problem* problem, void** attention_data,
                 float** lse_data) {
  const std::optional<FfiCall::Array> array = ffi_call->Find(attention);
  ffi_call->That(array || !ffi_call->Find(lse), "gives ", lse, " beside ", attention, " only");
  if (!array) return;
  // Parts of sequences are merged in float32.
  ffi_call->Type(*array,
                 problem->partial ? ffi::DataType::F32 : ffi_call->Get("query").element_type());
  ffi_call->Shape(*array, {problem->heads, problem->value_size}, leading);
  *attention_data = array->untyped_data();
  *lse_data = ffi_call->Floats(lse, {problem->heads}, leading);
}

// The error for a bad entry of topk_indices, in column `column` for the token and kv head.
ffi::Error BlockError(const Call& call, int64_t sequence, int64_t row, int64_t token, int64_t head,
                      int64_t column) {
  const Problem& problem = call.problem;
  const auto place = [&]() -> std::string {
    if (call.arrays.first_rows != nullptr) {  // packed: each row is counted as a sequence
      PagedSequences rows = problem;
      rows.sequences = problem.rows;
      return Place("topk_indices", rows, /*packed=*/true, call.names, row, {head, column});
    }
    if (!call.tokens_apart) {
      return Place("topk_indices", problem, /*packed=*/false, call.names, sequence, {head, column});
    }
    return Place("topk_indices", problem, /*packed=*/false, call.names, sequence,
                 {token, head, column});
  };
  const int64_t size = problem.select_block_size;
  const int64_t blocks = (call.arrays.lengths[sequence] + size - 1) / size;
  return InvalidArgument(place() + " must be in [-1, " + std::to_string(blocks - 1) +
                         "], the blocks of " + std::to_string(size) +
                         " tokens that its sequence has, got " +
                         std::to_string(ChosenBlocks(problem, call.arrays, row, head)[column]));
}

// The first fault of what a token reads for a kv head.
ffi::Error FindRowFault(const Call& call, int64_t sequence, const SequenceRows& rows, int64_t token,
                        int64_t head) {
  const int64_t row = rows.first + token;
  const int64_t limit = Limit(call.arrays, sequence, rows.count, token);
  int64_t column = 0;
  switch (CheckRow(call.problem, call.arrays, sequence, row, head, limit, &column)) {
    case RowFault::kNone:
      break;
    case RowFault::kBlock:
      return BlockError(call, sequence, row, token, head, column);
    case RowFault::kPage:
      return FaultError(call.problem, call.arrays, call.names, Fault::kPageId, sequence, column);
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::ErrorOr<Call> Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attributes) {
  FfiCall ffi_call("nsa_select_attention_infer", args, rets, attributes,
                   {"query", "key", "value", "block_table", "lengths", "topk_indices",
                    "token_counts", "first_rows"},
                   {"attention", "window_attention", "lse", "window_lse", "workspace"});
  Call call = {};
  Problem& problem = call.problem;
  Arrays& arrays = call.arrays;
  ffi::Span<const int64_t> leading;
  ReadPaged(&ffi_call, &problem, &arrays, &leading);
  problem.select_block_size = ffi_call.Integer("select_block_size");
  problem.window_size = ffi_call.Integer("window_size");
  problem.partial = ffi_call.Integer("partial") != 0;
  call.tokens_apart = ffi_call.Integer("tokens_apart") != 0;
  problem.attention_dtype = problem.partial ? DataType::kFloat32 : problem.dtype;
  if (ffi_call.Find("topk_indices")) {
    arrays.topk_indices = ReadChosen(&ffi_call, problem, leading, &problem.select_count);
    ffi_call.That(IsBlockSize(problem.select_block_size),
                  "select_block_size must be a multiple of ", kMinStride, " up to ", kMaxBlockSize,
                  ", got ", problem.select_block_size);
  }
  ReadResults(&ffi_call, "attention", "lse", leading, &problem, &arrays.attention, &arrays.lse);
  ReadResults(&ffi_call, "window_attention", "window_lse", leading, &problem,
              &arrays.window_attention, &arrays.window_lse);
  ffi_call.That((arrays.attention != nullptr) == (problem.select_count > 0),
                "gives attention where it has topk_indices, and only there");
  ffi_call.That((arrays.window_attention != nullptr) == (problem.window_size > 0),
                "gives window_attention where window_size is positive, and only there");
  ffi_call.That(problem.select_count > 0 || problem.window_size > 0,
                "needs topk_indices or a window_size");
  if (!ffi_call.ok()) return ffi::Unexpected(ffi_call.error());

  call.names.lengths = "actual_seq_kvlen";
  ReadCall(ffi_call, attributes, &call);
  return call;
}

ffi::Error FindFault(const Call& call) {
  for (int64_t b = 0; b < call.problem.sequences; ++b) {
    SequenceRows rows;
    const Fault fault = FindRows(call.problem, call.arrays, b, &rows);
    if (fault != Fault::kNone) {
      return FaultError(call.problem, call.arrays, call.names, fault, b);
    }
    for (int64_t t = 0; t < rows.count; ++t) {
      for (int64_t h = 0; h < call.problem.key_value_heads; ++h) {
        ffi::Error error = FindRowFault(call, b, rows, t, h);
        if (error.failure()) return error;
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace jax_nsa::select_attention
