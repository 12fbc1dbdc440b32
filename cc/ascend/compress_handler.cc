// The two XLA FFI handlers of compression into the cache on Ascend: one for buffers on an NPU,
// under an Ascend PJRT plugin, and one for buffers on the host, under JAX's CPU platform.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "ascend/compress_abi.h"
#include "ascend/compress_launch.h"
#include "ascend/handlers.h"
#include "ascend/run.h"
#include "ascend/staging.h"
#include "ascend/tensor.h"
#include "compress_call.h"

namespace jax_nsa::ascend {
namespace {

using compress::Call;
using compress::Pair;
using compress::Problem;
using compress::Write;
using Limits = CompressLimits;

constexpr char kName[] = "nsa_compress_infer";

// Decodes a call and refuses what CANN's kernel does not have, wherever the buffers are.
ffi::ErrorOr<Call> DecodeForCann(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                 ffi::Dictionary attributes) {
  const auto refuse = [](const std::string& reason) {
    return ffi::Unexpected(Unserved(kName, reason));
  };
  ffi::ErrorOr<Call> call = compress::Decode(args, rets, attributes);
  if (call.has_error()) return call;
  const Problem& problem = call->problem;
  if (problem.dtype == DataType::kFloat32) {
    return refuse("takes bfloat16 and float16, not float32");
  }
  if (problem.compress_block_size > Limits::kMaxWindow) {
    return refuse("takes windows of at most " + std::to_string(Limits::kMaxWindow) +
                  " tokens, got " + std::to_string(problem.compress_block_size));
  }
  if (problem.heads > Limits::kMaxHeads) {
    return refuse("takes at most " + std::to_string(Limits::kMaxHeads) + " heads, got " +
                  std::to_string(problem.heads));
  }
  for (int64_t i = 0; i < problem.pairs; ++i) {
    const Pair& pair = call->arrays.pairs[i];
    if (pair.bias != nullptr) return refuse("has no bias");
    if (pair.weight_dtype != problem.dtype) return refuse("takes weights of input's type only");
  }
  return call;
}

// --- Buffers on the host. ------------------------------------------------------------------------
//
// Each window that ends is gathered into a page of its own, which ends where the window does. So
// CANN's kernel, which compresses a window only if it ends with its sequence, sees all of them.

constexpr int64_t kGatheredPage = Limits::kSmallPage;
static_assert(kGatheredPage >= Limits::kMaxWindow);

// A pair as the device sees it.
Pair OnDevice(const Pair& pair) {
  Pair padded = pair;
  const int64_t granule = Limits::kHeadSizeGranule;
  padded.head_size = (pair.head_size + granule - 1) / granule * granule;
  return padded;
}

// Gathers the windows of a pair, each into a page.
void Gather(const Call& call, const std::vector<Write>& writes, const Pair& pair,
            const Pair& padded, std::byte* pages) {
  const Problem& problem = call.problem;
  const size_t head = pair.head_size * kElementSize, padded_head = padded.head_size * kElementSize;
  const int64_t size = problem.compress_block_size;
  for (const Write& write : writes) {
    for (int64_t t = 0; t < size; ++t, pages += problem.heads * padded_head) {
      const int64_t row = RowOfToken(problem, call.arrays, write.sequence, write.first + t);
      CopyRows(static_cast<const std::byte*>(pair.input) + row * problem.heads * head, head,
               problem.heads, padded_head, pages);
    }
    const size_t rest = (kGatheredPage - size) * problem.heads * padded_head;
    std::memset(pages, 0, rest);
    pages += rest;
  }
}

ffi::Error RunStaged(const CompressApi& functions, const Call& call,
                     const std::vector<Write>& writes, Context& context) {
  const int64_t count = static_cast<int64_t>(writes.size());
  Problem problem = call.problem;  // as the device sees it
  problem.sequences = problem.num_pages = count;
  problem.page_size = kGatheredPage;
  problem.pages_per_sequence = 1;
  // CANN asks for a row for each window that the pool could hold.
  problem.rows = std::max(
      count, (count * kGatheredPage - problem.compress_block_size) / problem.compress_stride + 1);
  struct Staged {
    Pair pair;
    size_t weight, input, cache;
  };
  const size_t weight_bytes = problem.compress_block_size * problem.heads * kElementSize;
  Pieces pieces;
  const size_t numbers = pieces.Add(count * sizeof(int32_t));  // the slots, and the pages
  std::vector<Staged> staged;
  for (int64_t i = 0; i < problem.pairs; ++i) {
    const Pair pair = OnDevice(call.arrays.pairs[i]);
    const size_t row = problem.heads * pair.head_size * kElementSize;
    staged.push_back({pair, pieces.Add(weight_bytes), pieces.Add(count * kGatheredPage * row), 0});
  }
  const size_t inputs_end = pieces.end();
  for (Staged& one : staged) {
    one.cache = pieces.Add(problem.rows * problem.heads * one.pair.head_size * kElementSize);
  }
  JAX_NSA_RETURN_IF_ERROR(Reserve(pieces, context));
  std::byte* const host = context.staging.data();
  std::byte* const device = context.arrays.data();

  auto* number = reinterpret_cast<int32_t*>(host + numbers);
  for (int64_t i = 0; i < count; ++i) number[i] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < problem.pairs; ++i) {
    const Pair& pair = call.arrays.pairs[i];
    std::memcpy(host + staged[i].weight, pair.weight, weight_bytes);
    Gather(call, writes, pair, staged[i].pair, host + staged[i].input);
  }
  JAX_NSA_RETURN_IF_ERROR(CopyIn(0, inputs_end, context));
  compress::Arrays arrays = {};
  arrays.slots = arrays.block_table = reinterpret_cast<const int32_t*>(device + numbers);
  const std::vector<int64_t> lengths(count, problem.compress_block_size);
  for (Staged& one : staged) {
    one.pair.weight = device + one.weight;
    one.pair.input = device + one.input;
    one.pair.cache = device + one.cache;
    JAX_NSA_RETURN_IF_ERROR(Launch(functions, problem, arrays, one.pair, lengths, context));
    const size_t used = count * problem.heads * one.pair.head_size * kElementSize;
    JAX_NSA_RETURN_IF_ERROR(CopyOut(one.cache, one.cache + used, context));
  }
  JAX_NSA_RETURN_IF_ERROR(context.Synchronize());
  for (int64_t i = 0; i < problem.pairs; ++i) {
    const Pair& pair = call.arrays.pairs[i];
    const size_t head = pair.head_size * kElementSize;
    const size_t padded_head = staged[i].pair.head_size * kElementSize;
    for (int64_t w = 0; w < count; ++w) {
      CopyRows(host + staged[i].cache + w * problem.heads * padded_head, padded_head, problem.heads,
               head, static_cast<std::byte*>(pair.cache) + writes[w].row * problem.heads * head);
    }
  }
  return ffi::Error::Success();
}

// Where faults may not fail the call, the windows of faulty sequences are dropped, and all of them
// where it is CANN that fails.
ffi::Error HandleOnHost(ffi::RemainingArgs args, ffi::RemainingRets rets,
                        ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeForCann(args, rets, attributes);
  if (call.has_error()) return call.error();
  const ffi::ErrorOr<std::vector<Write>> writes = compress::FindWrites(*call);
  if (writes.has_error()) return writes.error();
  if (writes->empty()) return ffi::Error::Success();
  ffi::Error error =
      RunOnIdleStream<CompressApi>(Attribute<int64_t>(attributes, "device", 0),
                                   [&](const CompressApi& functions, Context& context) {
                                     return RunStaged(functions, *call, *writes, context);
                                   });
  return EndOnHost(error, call->faults_fail, "no window is written", [] {});
}

// --- Buffers on the device. ----------------------------------------------------------------------

ffi::Error CheckForDevice(const Call& call) {
  const int64_t page = call.problem.page_size;
  if (page != Limits::kSmallPage && page != Limits::kLargePage) {
    return Unserved(kName,
                    "takes pages of 64 or 128 rows on the device, got " + std::to_string(page));
  }
  for (int64_t i = 0; i < call.problem.pairs; ++i) {
    const int64_t head_size = call.arrays.pairs[i].head_size;
    if (head_size % Limits::kHeadSizeGranule != 0) {
      return Unserved(
          kName, "takes heads of a multiple of 16 on the device, got " + std::to_string(head_size));
    }
  }
  return ffi::Error::Success();
}

// CANN takes lengths from the host and checks neither pages nor slots, so all integers are fetched,
// with one wait for the stream. It compresses the windows that end with their sequence: so each
// sequence is said to end with its window, or before any.
ffi::Error RunOnDevice(const CompressApi& functions, const Call& call, Context& context) {
  const Problem& problem = call.problem;
  if (problem.sequences == 0) return ffi::Error::Success();
  Call on_host = call;
  JAX_NSA_RETURN_IF_ERROR(
      FetchIntegers({{&on_host.arrays.block_table, problem.sequences * problem.pages_per_sequence},
                     {&on_host.arrays.lengths, problem.sequences},
                     {&on_host.arrays.slots, problem.sequences},
                     {&on_host.arrays.token_counts, problem.sequences}},
                    context));
  const ffi::ErrorOr<std::vector<Write>> writes = compress::FindWrites(on_host);
  if (writes.has_error()) return writes.error();
  if (writes->empty()) return ffi::Error::Success();
  std::vector<int64_t> lengths(problem.sequences, problem.compress_block_size - 1);
  for (const Write& write : *writes) {
    lengths[write.sequence] = write.first + problem.compress_block_size;
  }
  for (int64_t i = 0; i < problem.pairs; ++i) {
    JAX_NSA_RETURN_IF_ERROR(
        Launch(functions, problem, call.arrays, call.arrays.pairs[i], lengths, context));
  }
  return ffi::Error::Success();
}

ffi::Error HandleOnDevice(aclrtStream stream, int32_t ordinal, ffi::RemainingArgs args,
                          ffi::RemainingRets rets, ffi::Dictionary attributes) {
  const ffi::ErrorOr<Call> call = DecodeForCann(args, rets, attributes);
  if (call.has_error()) return call.error();
  JAX_NSA_RETURN_IF_ERROR(CheckForDevice(*call));
  return RunOnStream<CompressApi>(stream, ordinal,
                                  [&](const CompressApi& functions, Context& context) {
                                    return RunOnDevice(functions, *call, context);
                                  });
}

}  // namespace
}  // namespace jax_nsa::ascend

JAX_NSA_ASCEND_HANDLERS(compress);
