#include "compress_call.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

namespace jax_nsa::compress {
namespace {

namespace ffi = xla::ffi;

// Reads weight or bias, which have input's type or float32.
const void* ReadFactors(FfiCall* ffi_call, std::string_view name,
                        std::initializer_list<int64_t> shape, DataType input, DataType* dtype) {
  const FfiCall::Array array = ffi_call->Get(name);
  const std::optional<DataType> type = FromFfi(array.element_type());
  ffi_call->That(type == input || type == DataType::kFloat32, name,
                 " must have input's type or float32");
  ffi_call->Shape(array, shape);
  if (!ffi_call->ok()) return nullptr;
  *dtype = *type;
  return array.untyped_data();
}

// Reads pair `i`. The sizes that all pairs share are those of the first.
void ReadPair(FfiCall* ffi_call, const std::string& i, Problem* problem, Pair* pair) {
  const std::string bias = "bias_" + i;
  const FfiCall::Array input = ffi_call->Get("input_" + i), cache = ffi_call->Get("cache_" + i);
  ffi_call->Rank(input, 3);
  ffi_call->NotEmpty(input);
  if (!ffi_call->ok()) return;
  const ffi::Span<const int64_t> shape = input.dimensions();
  if (problem->pairs == 0) {
    const std::optional<DataType> dtype = FromFfi(input.element_type());
    ffi_call->That(dtype.has_value(), input.name, " must be bfloat16, float16 or float32");
    if (!ffi_call->ok()) return;
    problem->dtype = *dtype;
    problem->num_pages = shape[0];
    problem->page_size = shape[1];
    problem->rows = static_cast<int64_t>(cache.element_count()) / shape[2];
  }
  pair->head_size = shape[2] / problem->heads;
  ffi_call->That(pair->head_size <= kMaxCompressedHeadSize, input.name,
                 "'s head size must be at most ", kMaxCompressedHeadSize, ", got ",
                 pair->head_size);
  const int64_t width = problem->heads * pair->head_size;
  ffi_call->Shape(input, {problem->num_pages, problem->page_size, width});
  ffi_call->That(FromFfi(input.element_type()) == problem->dtype, input.name,
                 " must have input_0's type");
  ffi_call->Type(cache, input.element_type());
  ffi_call->That(static_cast<int64_t>(cache.element_count()) == problem->rows * width, cache.name,
                 " must have ", problem->rows, " rows of ", width, ", got shape ",
                 ShapeString(cache.dimensions()));
  const std::optional<FfiCall::Array> result = ffi_call->FindResult(cache.name);
  ffi_call->That(result && result->untyped_data() == cache.untyped_data(), "must give ", cache.name,
                 " in its operand's memory");
  pair->input = input.untyped_data();
  pair->cache = cache.untyped_data();
  pair->weight =
      ReadFactors(ffi_call, "weight_" + i, {problem->compress_block_size, problem->heads},
                  problem->dtype, &pair->weight_dtype);
  if (ffi_call->Find(bias)) {
    pair->bias = ReadFactors(ffi_call, bias, {problem->heads, pair->head_size}, problem->dtype,
                             &pair->bias_dtype);
  }
  ++problem->pairs;
}

// The sizes that no array tells.
void ReadSizes(FfiCall* ffi_call, Problem* problem) {
  problem->heads = ffi_call->Integer("heads");
  problem->compress_block_size = ffi_call->Integer("compress_block_size");
  problem->compress_stride = ffi_call->Integer("compress_stride");
  const int64_t size = problem->compress_block_size, stride = problem->compress_stride;
  ffi_call->That(problem->heads > 0, "heads must be positive, got ", problem->heads);
  ffi_call->That(IsBlockSize(size) && IsBlockSize(stride) && stride <= size,
                 "compress_block_size and compress_stride must be multiples of ", kMinStride,
                 " up to ", kMaxBlockSize, ", the latter not the larger, got ", size, " and ",
                 stride);
}

// Makes errors for the faults of a call's sequences.
class Faults {
 public:
  explicit Faults(const Call& call) : call_(call) {}

  // `column` is that of block_table, for kPageId.
  ffi::Error Error(SequenceFault fault, int64_t b, int64_t column) const {
    const Problem& problem = call_.problem;
    const Arrays& arrays = call_.arrays;
    switch (fault) {
      case SequenceFault::kNone:
        return ffi::Error::Success();
      case SequenceFault::kLength:
        return LengthError(problem, At(call_.names.lengths, b), arrays.lengths[b]);
      case SequenceFault::kTokenCount:
        return InvalidArgument(
            At("actual_seq_qlen", b) + " must be in [0, " +
            std::to_string(problem.compress_stride) +
            "] (compress_stride, so that at most one compress window ends), got " +
            std::to_string(arrays.token_counts[b]));
      case SequenceFault::kPageId:
        return PageError(problem, call_.names, At("block_table", b, {column}),
                         arrays.block_table[b * problem.pages_per_sequence + column], "input");
      case SequenceFault::kSlot:
        return InvalidArgument(At("slot_mapping", b) + " must be below " + std::to_string(Rows()) +
                               ", the rows of cache, got " +
                               std::to_string(AsGiven(arrays.slots[b], problem.rows, Rows())));
    }
    return ffi::Error(ffi::ErrorCode::kInternal, "unknown fault");
  }

  ffi::Error SameRow(const Write& first, const Write& second) const {
    return InvalidArgument(At("slot_mapping", second.sequence) + " must not be " +
                           At("slot_mapping", first.sequence) +
                           ", as both sequences complete a compress window, got " +
                           std::to_string(first.row % Rows()) + " for both");
  }

 private:
  std::string At(std::string_view array, int64_t b,
                 std::initializer_list<int64_t> further = {}) const {
    return Place(array, call_.problem, /*packed=*/false, call_.names, b, further);
  }

  // Rows of the cache of one mapped call: each has a cache of its own, one after the other.
  int64_t Rows() const {
    int64_t rows = call_.problem.rows;
    for (int64_t size : call_.names.maps) rows /= std::max<int64_t>(1, size);
    return std::max<int64_t>(1, rows);
  }

  const Call& call_;
};

// What is wrong with a sequence, and its window.
SequenceFault Check(const Problem& problem, const Arrays& arrays, int64_t b, int64_t* first,
                    int64_t* column) {
  const SequenceFault fault = FindWindow(problem, arrays, b, first);
  if (fault != SequenceFault::kNone || *first == kNoWindow) return fault;
  *column = FindBadPage(problem, arrays, b, *first);
  if (*column >= 0) return SequenceFault::kPageId;
  return arrays.slots[b] >= problem.rows ? SequenceFault::kSlot : SequenceFault::kNone;
}

}  // namespace

ffi::ErrorOr<Call> Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attributes) {
  FfiCall ffi_call("nsa_compress_infer", args, rets, attributes,
                   {"input_0", "weight_0", "cache_0", "bias_0", "input_1", "weight_1", "cache_1",
                    "bias_1", "block_table", "lengths", "slot_mapping", "token_counts"},
                   {"cache_0", "cache_1"});
  Call call = {};
  Problem& problem = call.problem;
  Arrays& arrays = call.arrays;
  ReadSizes(&ffi_call, &problem);
  const FfiCall::Array block_table = ffi_call.Get("block_table");
  ffi_call.Rank(block_table, 2);
  if (ffi_call.ok()) ReadPair(&ffi_call, "0", &problem, &arrays.pairs[0]);
  if (ffi_call.Find("input_1")) ReadPair(&ffi_call, "1", &problem, &arrays.pairs[1]);
  ffi_call.That(rets.size() == static_cast<size_t>(problem.pairs), "gives a cache for each input");
  ffi_call.That(ffi_call.Find("lengths").has_value(), "needs lengths");
  ffi_call.That(ffi_call.Find("slot_mapping").has_value(), "needs slot_mapping");
  ffi_call.That(IsPageSize(problem.page_size), "page size must be a multiple of ", kPageGranule,
                " up to ", kMaxPage, ", got ", problem.page_size);
  if (!ffi_call.ok()) return ffi::Unexpected(ffi_call.error());

  const ffi::Span<const int64_t> table = block_table.dimensions();
  problem.sequences = table[0];
  problem.pages_per_sequence = table[1];
  ffi_call.That(table[1] <= std::numeric_limits<int32_t>::max() / problem.page_size,
                "block_table names more positions than lengths can count");
  arrays.block_table = ffi_call.Integers("block_table", {table[0], table[1]});
  arrays.lengths = ffi_call.Integers("lengths", {problem.sequences});
  arrays.slots = ffi_call.Integers("slot_mapping", {problem.sequences});
  arrays.token_counts = ffi_call.Integers("token_counts", {problem.sequences});
  if (!ffi_call.ok()) return ffi::Unexpected(ffi_call.error());

  call.names.lengths = "actual_seq_len";
  ReadCall(ffi_call, attributes, &call);
  return call;
}

ffi::ErrorOr<std::vector<Write>> FindWrites(const Call& call) {
  const Problem& problem = call.problem;
  const Arrays& arrays = call.arrays;
  const Faults faults(call);
  std::vector<Write> named;  // the rows that windows name, in order
  for (int64_t b = 0; b < problem.sequences; ++b) {
    int64_t first, column = 0;
    const SequenceFault fault = Check(problem, arrays, b, &first, &column);
    if (fault != SequenceFault::kNone && call.faults_fail) {
      return ffi::Unexpected(faults.Error(fault, b, column));
    }
    if (NamesRow(problem, arrays, b, first)) named.push_back({b, first, arrays.slots[b]});
  }
  std::sort(named.begin(), named.end(), [](const Write& a, const Write& b) {
    return a.row != b.row ? a.row < b.row : a.sequence < b.sequence;
  });
  std::vector<Write> writes;
  for (size_t i = 0; i < named.size(); ++i) {
    const Write& write = named[i];
    const bool as_next = i + 1 < named.size() && named[i + 1].row == write.row;
    const bool as_last = i > 0 && named[i - 1].row == write.row;
    if (as_next && call.faults_fail) return ffi::Unexpected(faults.SameRow(write, named[i + 1]));
    if (as_next || as_last) continue;
    if (FindBadPage(problem, arrays, write.sequence, write.first) < 0) writes.push_back(write);
  }
  return writes;
}

}  // namespace jax_nsa::compress
