#include "decode.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kFixedArgs = 5;  // query, key, value, block_table, lengths
constexpr size_t kFixedRets = 2;  // attention, topk_indices
constexpr size_t kDenseTokenArgs = 2, kRaggedTokenArgs = 3;

std::string ShapeString(ffi::Span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

// The first disagreement found, as an error; later checks keep it.
class Checks {
 public:
  // Expects an array of shape [*leading, *trailing].
  void Shape(const char* name, ffi::AnyBuffer buffer, std::initializer_list<int64_t> trailing,
             ffi::Span<const int64_t> leading = {}) {
    const ffi::Span<const int64_t> shape = buffer.dimensions();
    if (shape.size() == leading.size() + trailing.size() &&
        std::equal(leading.begin(), leading.end(), shape.begin()) &&
        std::equal(trailing.begin(), trailing.end(), shape.begin() + leading.size())) {
      return;
    }
    std::vector<int64_t> expected(leading.begin(), leading.end());
    expected.insert(expected.end(), trailing);
    Fail(name, " must have shape ", ShapeString(expected), ", got ", ShapeString(shape));
  }

  void NotEmpty(const char* name, ffi::AnyBuffer buffer) {
    for (int64_t size : buffer.dimensions()) {
      if (size < 1) {
        Fail(name, " must not be empty, got shape ", ShapeString(buffer.dimensions()));
      }
    }
  }

  void Type(const char* name, ffi::AnyBuffer buffer, ffi::DataType expected) {
    That(buffer.element_type() == expected, name, " has an unexpected element type");
  }

  template <typename... Parts>
  void That(bool holds, const Parts&... otherwise) {
    if (!holds) Fail(otherwise...);
  }

  bool ok() const { return !message_.has_value(); }
  ffi::Error error() const {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                      "nsa_compress_attention: " + message_.value_or(""));
  }

 private:
  template <typename... Parts>
  void Fail(const Parts&... parts) {
    if (!ok()) return;
    std::ostringstream message;
    (message << ... << parts);
    message_ = message.str();
  }

  std::optional<std::string> message_;
};

std::optional<DataType> FromFfi(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return DataType::kBFloat16;
    case ffi::DataType::F16:
      return DataType::kFloat16;
    case ffi::DataType::F32:
      return DataType::kFloat32;
    default:
      return std::nullopt;
  }
}

}  // namespace

ffi::ErrorOr<Call> Decode(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          const Attributes& attributes, size_t extra_results) {
  Checks checks;
  const auto fail = [&]() { return ffi::Unexpected(checks.error()); };
  const auto arg = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  const auto ret = [&](size_t i) { return **rets.get<ffi::AnyBuffer>(i); };

  const size_t token_args = args.size() < kFixedArgs ? 0 : args.size() - kFixedArgs;
  checks.That(args.size() >= kFixedArgs && (token_args == 0 || token_args == kDenseTokenArgs ||
                                            token_args == kRaggedTokenArgs),
              "takes 5, 7 or 8 operands, got ", args.size());
  const size_t own_results = rets.size() < extra_results ? 0 : rets.size() - extra_results;
  checks.That(own_results >= kFixedRets && own_results <= kFixedRets + 2,
              "gives 2 to 4 results, got ", own_results);
  if (!checks.ok()) return fail();

  const ffi::AnyBuffer query = arg(0), key = arg(1), value = arg(2), table = arg(3),
                       lengths = arg(4);
  const ffi::AnyBuffer attention = ret(0), indices = ret(1);
  const bool ragged = token_args == kRaggedTokenArgs;
  const size_t query_rank = ragged ? 3 : 4;
  const std::optional<DataType> dtype = FromFfi(query.element_type());
  checks.That(dtype.has_value(), "query must be bfloat16, float16 or float32");
  checks.That(query.dimensions().size() == query_rank, "query must have rank ", query_rank);
  checks.That(key.dimensions().size() == 3, "key must have rank 3");
  checks.That(value.dimensions().size() == 3, "value must have rank 3");
  checks.That(table.dimensions().size() == 2, "block_table must have rank 2");
  checks.That(indices.dimensions().size() == query_rank, "topk_indices has the wrong rank");
  if (!checks.ok()) return fail();

  // The sizes of an array that exists, none of them 0, have a product that cannot overflow.
  checks.NotEmpty("query", query);
  checks.NotEmpty("key", key);
  checks.NotEmpty("value", value);
  checks.NotEmpty("block_table", table);
  checks.NotEmpty("topk_indices", indices);
  const int64_t heads = query.dimensions()[query_rank - 2];
  checks.That(attributes.key_value_heads > 0 && heads % attributes.key_value_heads == 0,
              "query's heads must be a multiple of key_value_heads, got ", heads, " and ",
              attributes.key_value_heads);
  const Window window = {attributes.compress_block_size, attributes.compress_stride,
                         attributes.select_block_size};
  checks.That(window.IsLegal(), "the window's sizes do not fit each other");
  if (!checks.ok()) return fail();
  checks.That(table.dimensions()[1] <= std::numeric_limits<int32_t>::max() / key.dimensions()[1],
              "block_table names more positions than lengths can count");
  if (!checks.ok()) return fail();

  Call call = {};
  Problem& problem = call.problem;
  const ffi::Span<const int64_t> query_shape = query.dimensions();
  problem.dtype = *dtype;
  problem.attention_dtype = own_results > kFixedRets + 1 ? DataType::kFloat32 : *dtype;
  problem.sequences = table.dimensions()[0];
  problem.pages_per_sequence = table.dimensions()[1];
  problem.tokens = ragged ? 0 : query_shape[1];
  problem.rows = ragged ? query_shape[0] : query_shape[0] * query_shape[1];
  problem.heads = heads;
  problem.head_size = query_shape[query_rank - 1];
  problem.key_value_heads = attributes.key_value_heads;
  problem.num_pages = key.dimensions()[0];
  problem.page_size = key.dimensions()[1];
  problem.value_size = value.dimensions()[2] / attributes.key_value_heads;
  problem.select_count = indices.dimensions()[query_rank - 1];
  problem.scale = attributes.scale;
  problem.window = window;

  const auto at_most = [&](const char* name, int64_t size, int64_t limit) {
    checks.That(size <= limit, name, " must be at most ", limit, ", got ", size);
  };
  checks.That(kMaxGroup % problem.group() == 0, "query's heads for each of key's must divide ",
              kMaxGroup, ", got ", problem.group());
  at_most("query's head size", problem.head_size, kMaxHeadSize);
  at_most("value's head size", problem.value_size, kMaxValueSize);
  checks.That(problem.page_size % kPageGranule == 0, "page size must be a multiple of ",
              kPageGranule, ", got ", problem.page_size);
  checks.Type("key", key, query.element_type());
  checks.Type("value", value, query.element_type());
  // Parts of sequences are merged in float32.
  checks.Type("attention", attention,
              own_results > kFixedRets + 1 ? ffi::DataType::F32 : query.element_type());
  checks.Type("block_table", table, ffi::DataType::S32);
  checks.Type("lengths", lengths, ffi::DataType::S32);
  checks.Type("topk_indices", indices, ffi::DataType::S32);
  checks.Shape("key", key,
               {problem.num_pages, problem.page_size, problem.key_value_heads * problem.head_size});
  checks.Shape(
      "value", value,
      {problem.num_pages, problem.page_size, problem.key_value_heads * problem.value_size});
  checks.Shape("lengths", lengths, {problem.sequences});
  checks.That(ragged || query_shape[0] == problem.sequences,
              "query and block_table must have as many sequences");
  const ffi::Span<const int64_t> leading = query_shape.first(query_rank - 2);
  checks.Shape("attention", attention, {problem.heads, problem.value_size}, leading);
  checks.Shape("topk_indices", indices, {problem.key_value_heads, problem.select_count}, leading);
  for (size_t i = 0; i < token_args; ++i) {
    checks.Type("a token operand", arg(kFixedArgs + i), ffi::DataType::S32);
    checks.Shape("a token operand", arg(kFixedArgs + i), {problem.sequences});
  }
  const auto optional_result = [&](const char* name, size_t i,
                                   std::initializer_list<int64_t> trailing) -> float* {
    if (i >= own_results) return nullptr;
    checks.Type(name, ret(i), ffi::DataType::F32);
    checks.Shape(name, ret(i), trailing, leading);
    return checks.ok() ? ret(i).typed_data<float>() : nullptr;
  };
  float* lse = optional_result("lse", kFixedRets, {problem.heads});
  float* block_scores =
      optional_result("block_scores", kFixedRets + 1, {problem.heads, problem.max_blocks()});
  if (!checks.ok()) return fail();

  const auto integers = [&](size_t i) {
    return token_args > i ? arg(kFixedArgs + i).typed_data<int32_t>() : nullptr;
  };
  call.arrays = {
      query.untyped_data(),
      key.untyped_data(),
      value.untyped_data(),
      table.typed_data<int32_t>(),
      lengths.typed_data<int32_t>(),
      integers(0),
      integers(1),
      integers(2),
      attention.untyped_data(),
      indices.typed_data<int32_t>(),
      lse,
      block_scores,
  };
  return call;
}

ffi::Error FaultError(const Call& call, Fault fault, int64_t sequence, int64_t page) {
  const Problem& problem = call.problem;
  const Arrays& arrays = call.arrays;
  const std::string b = std::to_string(sequence);
  const auto error = [](const std::string& message) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
  };
  switch (fault) {
    case Fault::kNone:
      return ffi::Error::Success();
    case Fault::kLength:
      return error("actual_cmp_seq_kvlen[" + b + "] must be in [0, " +
                   std::to_string(problem.capacity()) + "] (" +
                   std::to_string(problem.pages_per_sequence) + " pages of " +
                   std::to_string(problem.page_size) + " rows), got " +
                   std::to_string(arrays.lengths[sequence]));
    case Fault::kTokenCount: {
      SequenceRows rows;
      FindRows(problem, arrays, sequence, &rows);
      const bool ragged = arrays.first_rows != nullptr;
      return error("actual_seq_qlen[" + b + "] must be in [0, " +
                   std::to_string(ragged ? problem.rows - rows.first : problem.tokens) + "] (" +
                   (ragged ? "what earlier sequences leave of query's " +
                                 std::to_string(problem.rows) + " rows"
                           : std::string("query's rows for each sequence")) +
                   "), got " + std::to_string(arrays.token_counts[sequence]));
    }
    case Fault::kEarlyCount: {
      // The operand says that the length was at fault, not what it was.
      const Window& window = problem.window;
      const int64_t length = arrays.lengths[sequence];
      const int64_t last = length * window.compress_stride + window.compress_block_size - 1;
      const int64_t first = length > 0 ? last - window.compress_stride + 1 : 0;
      return error("actual_sel_seq_kvlen[" + b + "] must be in [" + std::to_string(first) + ", " +
                   std::to_string(last) + "], the original lengths that compress to " +
                   "actual_cmp_seq_kvlen[" + b + "] = " + std::to_string(length));
    }
    case Fault::kPageId:
      return error(
          "block_table[" + b + ", " + std::to_string(page) + "] must be in [0, " +
          std::to_string(problem.num_pages) + "), got " +
          std::to_string(arrays.block_table[sequence * problem.pages_per_sequence + page]));
  }
  return ffi::Error(ffi::ErrorCode::kInternal, "unknown fault");
}

}  // namespace jax_nsa
