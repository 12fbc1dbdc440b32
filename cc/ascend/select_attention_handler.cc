// The two XLA FFI handlers of the selected branch on Ascend: one for buffers on an NPU, under an
// Ascend PJRT plugin, and one for buffers on the host, under JAX's CPU platform.

#include <algorithm>
#include <cstring>
#include <vector>

#include "ascend/handlers.h"
#include "ascend/run.h"
#include "ascend/select_attention_abi.h"
#include "ascend/select_attention_device.h"
#include "ascend/select_attention_launch.h"
#include "ascend/select_attention_readings.h"
#include "ascend/staging.h"
#include "ascend/tensor.h"
#include "select_attention_call.h"

namespace jax_nsa::ascend {
namespace {

using select_attention::Arrays;
using select_attention::Call;
using select_attention::Problem;
using Limits = SelectAttentionLimits;

// --- Buffers on the host. ------------------------------------------------------------------------
//
// What a row of query reads for a key/value head is gathered on the host, its blocks one after
// another and then each head apart, and CANN's kernel is told to read all of it. So whatever the
// blocks, the window, the pages and the heads are, the kernel sees one key/value head and blocks in
// ascending order.

constexpr int64_t kGatheredBlock = 64;  // positions

// The readings as the device sees them: CANN's sequences, as many for each reading as its query
// heads exceed what the kernel takes at once.
Problem OnDevice(const Problem& call, const Readings& readings) {
  Problem problem = call;
  const int64_t count = static_cast<int64_t>(readings.all().size());
  problem.heads = std::min(call.group(), Limits::kMaxGroup);
  problem.sequences = problem.rows = count * (call.group() / problem.heads);
  problem.tokens = problem.key_value_heads = 1;
  problem.head_size = Limits::kHeadSize;
  problem.value_size = Limits::kValueSize;
  problem.num_pages = readings.num_pages();
  problem.page_size = kGatheredPage;
  problem.pages_per_sequence = (readings.longest() + kGatheredPage - 1) / kGatheredPage;
  problem.select_block_size = kGatheredBlock;
  problem.select_count = (readings.longest() + kGatheredBlock - 1) / kGatheredBlock;
  problem.window_size = 0;
  return problem;
}

ffi::Error RunStaged(const SelectAttentionApi& functions, const Call& call,
                     const Readings& readings, Context& context) {
  const Problem& host_problem = call.problem;
  const Problem problem = OnDevice(host_problem, readings);
  const int64_t group = host_problem.group(), parts = group / problem.heads;
  const size_t query_bytes = host_problem.head_size * kElementSize;
  const size_t attention_bytes = host_problem.value_size * kElementSize;
  Pieces pieces;
  const size_t query = pieces.Add(problem.rows * problem.heads * problem.head_size * kElementSize);
  const size_t table = pieces.Add(problem.sequences * problem.pages_per_sequence * sizeof(int32_t));
  const size_t indices = pieces.Add(problem.rows * problem.select_count * sizeof(int32_t));
  const int64_t pool_rows = problem.num_pages * problem.page_size;
  const size_t key = pieces.Add(pool_rows * problem.head_size * kElementSize);
  const size_t value = pieces.Add(pool_rows * problem.value_size * kElementSize);
  const size_t attention =
      pieces.Add(problem.rows * problem.heads * problem.value_size * kElementSize);
  JAX_NSA_RETURN_IF_ERROR(Reserve(pieces, context));
  std::byte* const host = context.staging.data();
  std::byte* const device = context.arrays.data();

  // Each copy starts as soon as its bytes are gathered, so the next gather runs beside it.
  std::vector<int64_t> lengths;
  auto* next_query = reinterpret_cast<uint16_t*>(host + query);
  auto* next_page = reinterpret_cast<int32_t*>(host + table);
  auto* next_index = reinterpret_cast<int32_t*>(host + indices);
  for (const Reading& reading : readings.all()) {
    const int64_t first_head = (reading.row * host_problem.key_value_heads + reading.head) * group;
    CopyRows(static_cast<const std::byte*>(call.arrays.query) + first_head * query_bytes,
             query_bytes, group, problem.head_size * kElementSize, next_query);
    next_query += group * problem.head_size;
    for (int64_t part = 0; part < parts; ++part) {
      lengths.push_back(reading.size);
      for (int64_t p = 0; p < problem.pages_per_sequence; ++p) {
        *next_page++ =
            p * kGatheredPage < reading.size ? static_cast<int32_t>(reading.first_page + p) : 0;
      }
      for (int64_t i = 0; i < problem.select_count; ++i) {
        *next_index++ = i * kGatheredBlock < reading.size ? static_cast<int32_t>(i) : -1;
      }
    }
  }
  JAX_NSA_RETURN_IF_ERROR(CopyIn(query, key, context));
  for (const Reading& reading : readings.all()) {
    Gather(host_problem, reading, call.arrays.key, host_problem.head_size, problem.head_size,
           host + key);
  }
  JAX_NSA_RETURN_IF_ERROR(CopyIn(key, value, context));
  for (const Reading& reading : readings.all()) {
    Gather(host_problem, reading, call.arrays.value, host_problem.value_size, problem.value_size,
           host + value);
  }
  JAX_NSA_RETURN_IF_ERROR(CopyIn(value, attention, context));

  Arrays arrays = {};
  arrays.query = device + query;
  arrays.key = device + key;
  arrays.value = device + value;
  arrays.block_table = reinterpret_cast<const int32_t*>(device + table);
  arrays.topk_indices = reinterpret_cast<const int32_t*>(device + indices);
  arrays.attention = device + attention;
  JAX_NSA_RETURN_IF_ERROR(Launch(functions, problem, arrays, lengths, context));
  JAX_NSA_RETURN_IF_ERROR(CopyOut(attention, pieces.end(), context));
  JAX_NSA_RETURN_IF_ERROR(context.Synchronize());
  const auto* result = reinterpret_cast<const uint16_t*>(host + attention);
  for (const Reading& reading : readings.all()) {
    const int64_t first_head = (reading.row * host_problem.key_value_heads + reading.head) * group;
    CopyRows(result, problem.value_size * kElementSize, group, attention_bytes,
             static_cast<std::byte*>(reading.attention) + first_head * attention_bytes);
    result += group * problem.value_size;
  }
  return ffi::Error::Success();
}

// Where faults may not fail the call, faulty rows become NaN, and all of them where it is CANN that
// fails.
ffi::Error HandleOnHost(ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeSelectAttention(args, rets, attributes);
  if (call.has_error()) return call.error();
  Readings readings(*call);
  ffi::Error error = readings.Collect();
  if (error.success() && !readings.all().empty()) {
    error = RunOnIdleStream<SelectAttentionApi>(
        Attribute<int64_t>(attributes, "device", 0),
        [&](const SelectAttentionApi& functions, Context& context) {
          return RunStaged(functions, *call, readings, context);
        });
  }
  return EndOnHost(error, call->faults_fail, "NaN in place of results",
                   [&] { readings.FillWithNaN(); });
}

// --- Buffers on the device. ----------------------------------------------------------------------

ffi::Error HandleOnDevice(aclrtStream stream, int32_t ordinal, ffi::RemainingArgs args,
                          ffi::RemainingRets rets, ffi::Dictionary attributes) {
  SelectAttentionOnDevice call;
  JAX_NSA_RETURN_IF_ERROR(call.Decode(args, rets, attributes));
  return RunOnStream<SelectAttentionApi>(
      stream, ordinal, [&](const SelectAttentionApi& functions, Context& context) -> ffi::Error {
        JAX_NSA_RETURN_IF_ERROR(FetchAndPlan(context, &call));
        return call.Enqueue(functions, context);
      });
}

}  // namespace
}  // namespace jax_nsa::ascend

JAX_NSA_ASCEND_HANDLERS(select_attention);
