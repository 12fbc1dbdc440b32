// The two XLA FFI handlers of the compressed branch on Ascend: one for buffers on an NPU, under an
// Ascend PJRT plugin, and one for buffers on the host, under JAX's CPU platform.

#include <algorithm>
#include <cstring>
#include <vector>

#include "ascend/compress_attention_abi.h"
#include "ascend/compress_attention_device.h"
#include "ascend/compress_attention_launch.h"
#include "ascend/compress_attention_request.h"
#include "ascend/context.h"
#include "ascend/handlers.h"
#include "ascend/run.h"
#include "ascend/runtime.h"
#include "ascend/staging.h"
#include "ascend/tensor.h"
#include "compress_attention_call.h"

namespace jax_nsa::ascend {
namespace {

size_t RowBytes(int64_t heads, int64_t size) { return heads * size * kElementSize; }

// --- Buffers on the host. ------------------------------------------------------------------------

// The pages that a call reads, renumbered in order of their first use.
struct NeededPages {
  struct Page {
    int64_t id;    // in the pool of the call
    int64_t rows;  // how many of its rows, from the first, some sequence reads
  };
  std::vector<Page> pages;
  std::vector<int32_t> block_table;  // [sequences, pages_per_sequence], in the new numbers
  int64_t pages_per_sequence;
};

NeededPages FindNeededPages(const Problem& problem, const Arrays& arrays, const Request& request) {
  NeededPages needed;
  needed.pages_per_sequence = (request.longest + problem.page_size - 1) / problem.page_size;
  needed.block_table.assign(problem.sequences * needed.pages_per_sequence, 0);
  std::vector<int32_t> number(problem.num_pages, -1);
  for (int64_t b = 0; b < problem.sequences; ++b) {
    const int32_t* table = arrays.block_table + b * problem.pages_per_sequence;
    for (int64_t p = 0; p * problem.page_size < request.lengths[b]; ++p) {
      int32_t& n = number[table[p]];
      if (n < 0) {
        n = static_cast<int32_t>(needed.pages.size());
        needed.pages.push_back({table[p], 0});
      }
      int64_t& rows = needed.pages[n].rows;
      rows =
          std::max(rows, std::min(problem.page_size, request.lengths[b] - p * problem.page_size));
      needed.block_table[b * needed.pages_per_sequence + p] = n;
    }
  }
  return needed;
}

// Copies pages out of a pool. Rows that no sequence reads become zeros: in the pool they may hold
// anything, NaN too, and a kernel may multiply them by a zero probability.
void GatherPages(const NeededPages& needed, const void* pool, int64_t page_size, size_t row_bytes,
                 std::byte* out) {
  const size_t page_bytes = page_size * row_bytes;
  for (const NeededPages::Page& page : needed.pages) {
    const size_t used = page.rows * row_bytes;
    std::memcpy(out, static_cast<const std::byte*>(pool) + page.id * page_bytes, used);
    std::memset(out + used, 0, page_bytes - used);
    out += page_bytes;
  }
}

// Copies the rows of all tokens out of an array with a row for each, or into one.
void PackRows(const Request& request, const void* array, size_t row_bytes, std::byte* packed) {
  for (size_t b = 0; b < request.first_rows.size(); ++b) {
    const size_t size = request.token_counts[b] * row_bytes;
    const size_t offset = request.first_rows[b] * row_bytes;
    std::memcpy(packed, static_cast<const std::byte*>(array) + offset, size);
    packed += size;
  }
}

void UnpackRows(const Request& request, const std::byte* packed, size_t row_bytes, void* array) {
  for (size_t b = 0; b < request.first_rows.size(); ++b) {
    const size_t size = request.token_counts[b] * row_bytes;
    const size_t offset = request.first_rows[b] * row_bytes;
    std::memcpy(static_cast<std::byte*>(array) + offset, packed, size);
    packed += size;
  }
}

ffi::Error RunStaged(const CompressAttentionApi& functions, const Call& call,
                     const Request& request, Context& context) {
  const Arrays& arrays = call.arrays;
  const NeededPages needed = FindNeededPages(call.problem, arrays, request);
  Problem problem = call.problem;  // as the device sees it
  problem.num_pages = static_cast<int64_t>(needed.pages.size());
  problem.pages_per_sequence = needed.pages_per_sequence;

  const size_t query_row = RowBytes(problem.heads, problem.head_size);
  const size_t key_row = RowBytes(problem.key_value_heads, problem.head_size);
  const size_t value_row = RowBytes(problem.key_value_heads, problem.value_size);
  const size_t attention_row = RowBytes(problem.heads, problem.value_size);
  const size_t indices_row = problem.key_value_heads * problem.select_count * sizeof(int32_t);
  const size_t table_bytes = needed.block_table.size() * sizeof(int32_t);
  const int64_t pool_rows = problem.num_pages * problem.page_size;

  Pieces pieces;
  const size_t query = pieces.Add(request.total_tokens * query_row);
  const size_t table = pieces.Add(table_bytes);
  const size_t key = pieces.Add(pool_rows * key_row);
  const size_t value = pieces.Add(pool_rows * value_row);
  const size_t attention = pieces.Add(request.total_tokens * attention_row);
  const size_t indices = pieces.Add(request.total_tokens * indices_row);
  JAX_NSA_RETURN_IF_ERROR(Reserve(pieces, context));
  std::byte* const host = context.staging.data();
  std::byte* const device = context.arrays.data();

  // Each copy starts as soon as its bytes are gathered, so the next gather runs beside it.
  PackRows(request, arrays.query, query_row, host + query);
  std::memcpy(host + table, needed.block_table.data(), table_bytes);
  JAX_NSA_RETURN_IF_ERROR(CopyIn(query, key, context));
  GatherPages(needed, arrays.key, problem.page_size, key_row, host + key);
  JAX_NSA_RETURN_IF_ERROR(CopyIn(key, value, context));
  GatherPages(needed, arrays.value, problem.page_size, value_row, host + value);
  JAX_NSA_RETURN_IF_ERROR(CopyIn(value, attention, context));

  Arrays on_device = {};
  on_device.query = device + query;
  on_device.key = device + key;
  on_device.value = device + value;
  on_device.block_table = reinterpret_cast<const int32_t*>(device + table);
  on_device.attention = device + attention;
  on_device.topk_indices = reinterpret_cast<int32_t*>(device + indices);
  JAX_NSA_RETURN_IF_ERROR(
      Launch(functions, problem, on_device, request, QueryLayout::kPacked, context));

  JAX_NSA_RETURN_IF_ERROR(CopyOut(attention, pieces.end(), context));
  JAX_NSA_RETURN_IF_ERROR(context.Synchronize());
  if (request.total_tokens < problem.rows) {  // rows without a token
    std::memset(arrays.attention, 0, problem.rows * attention_row);
    std::memset(arrays.topk_indices, 0xFF, problem.rows * indices_row);
  }
  UnpackRows(request, host + attention, attention_row, arrays.attention);
  UnpackRows(request, host + indices, indices_row, arrays.topk_indices);
  return ffi::Error::Success();
}

ffi::Error RunOnHost(const Call& call, int64_t device) {
  Request request;
  JAX_NSA_RETURN_IF_ERROR(MakeRequest(call, PageIds::kOnHost, &request));
  return RunOnIdleStream<CompressAttentionApi>(
      device, [&](const CompressAttentionApi& functions, Context& context) {
        return RunStaged(functions, call, request, context);
      });
}

// All rows of a call that could not be served: NaN and -1.
void FillWithNaN(const Call& call) {
  const Problem& problem = call.problem;
  const uint16_t nan = problem.dtype == DataType::kBFloat16 ? 0x7fc0 : 0x7e00;
  std::fill_n(static_cast<uint16_t*>(call.arrays.attention),
              problem.rows * problem.heads * problem.value_size, nan);
  std::fill_n(call.arrays.topk_indices,
              problem.rows * problem.key_value_heads * problem.select_count, -1);
}

// Where faults may not fail the call, its results become NaN: all of them, as CANN computes all
// sequences or none.
ffi::Error HandleOnHost(ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeCompressAttention(args, rets, attributes);
  if (call.has_error()) return call.error();
  ffi::Error error = RunOnHost(*call, Attribute<int64_t>(attributes, "device", 0));
  return EndOnHost(error, call->faults_fail, "NaN in place of results",
                   [&] { FillWithNaN(*call); });
}

// --- Buffers on the device. ----------------------------------------------------------------------

ffi::Error HandleOnDevice(aclrtStream stream, int32_t ordinal, ffi::RemainingArgs args,
                          ffi::RemainingRets rets, ffi::Dictionary attributes) {
  CompressAttentionOnDevice call;
  JAX_NSA_RETURN_IF_ERROR(call.Decode(args, rets, attributes));
  return RunOnStream<CompressAttentionApi>(
      stream, ordinal, [&](const CompressAttentionApi& functions, Context& context) -> ffi::Error {
        JAX_NSA_RETURN_IF_ERROR(FetchAndPlan(context, &call));
        return call.Enqueue(functions, /*absent=*/0xFF, context);
      });
}

}  // namespace
}  // namespace jax_nsa::ascend

JAX_NSA_ASCEND_HANDLERS(compress_attention);
