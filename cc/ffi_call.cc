#include "ffi_call.h"

#include <algorithm>
#include <limits>

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

ffi::Error InvalidArgument(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

// Where a name stands among others; their number if it does not.
size_t Index(const std::vector<std::string_view>& names, std::string_view name) {
  return static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
}

}  // namespace

std::string ShapeString(ffi::Span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + "]";
}

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

FfiCall::FfiCall(std::string_view name, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 ffi::Dictionary attributes, std::initializer_list<std::string_view> known_operands,
                 std::initializer_list<std::string_view> known_results)
    : name_(name), args_(args), rets_(rets), attributes_(attributes) {
  Name("operands", args.size(), known_operands, &operands_);
  Name("results", rets.size(), known_results, &results_);
  ffi::ErrorOr<ffi::Dictionary> problem = attributes.get<ffi::Dictionary>("problem");
  That(problem.has_value(), "has no attribute problem");
  if (problem.has_value()) problem_ = *problem;
}

void FfiCall::Name(std::string_view attribute, size_t count,
                   std::initializer_list<std::string_view> known,
                   std::vector<std::string_view>* names) {
  const ffi::ErrorOr<std::string_view> text = attributes_.get<std::string_view>(attribute);
  if (text.has_error()) return Fail("has no attribute ", attribute, " that names its arrays");
  for (size_t begin = 0; begin < text->size();) {
    const size_t end = std::min(text->find(' ', begin), text->size());
    const std::string_view name = text->substr(begin, end - begin);
    That(std::find(known.begin(), known.end(), name) != known.end(), "does not know \"", name,
         "\" among its ", attribute);
    That(std::find(names->begin(), names->end(), name) == names->end(), "has \"", name,
         "\" twice among its ", attribute);
    names->push_back(name);
    begin = end + 1;
  }
  That(names->size() == count, "names ", names->size(), " ", attribute, " and has ", count);
}

ffi::Error FfiCall::error() const { return InvalidArgument(name_ + ": " + message_.value_or("")); }

std::optional<ffi::AnyBuffer> FfiCall::Find(std::string_view array) const {
  if (!ok()) return std::nullopt;
  if (const size_t i = Index(operands_, array); i < operands_.size()) {
    const ffi::ErrorOr<ffi::AnyBuffer> buffer = args_.get<ffi::AnyBuffer>(i);
    if (buffer.has_value()) return *buffer;
  }
  return FindResult(array);
}

std::optional<ffi::AnyBuffer> FfiCall::FindResult(std::string_view result) const {
  if (!ok()) return std::nullopt;
  if (const size_t i = Index(results_, result); i < results_.size()) {
    ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets_.get<ffi::AnyBuffer>(i);
    if (buffer.has_value()) return **buffer;
  }
  return std::nullopt;
}

ffi::AnyBuffer FfiCall::Get(std::string_view array) {
  static XLA_FFI_Buffer nothing = {};
  const std::optional<ffi::AnyBuffer> buffer = Find(array);
  That(buffer.has_value(), "needs ", array);
  return buffer ? *buffer : ffi::AnyBuffer(&nothing);
}

int64_t FfiCall::Integer(std::string_view scalar) {
  if (!ok()) return 0;
  const ffi::ErrorOr<int64_t> value = problem_->get<int64_t>(scalar);
  That(value.has_value(), "needs the integer ", scalar);
  return value.has_value() ? *value : 0;
}

float FfiCall::Float(std::string_view scalar) {
  if (!ok()) return 0;
  const ffi::ErrorOr<float> value = problem_->get<float>(scalar);
  That(value.has_value(), "needs the float ", scalar);
  return value.has_value() ? *value : 0;
}

void FfiCall::Shape(std::string_view array, std::initializer_list<int64_t> trailing,
                    ffi::Span<const int64_t> leading) {
  const ffi::Span<const int64_t> shape = Get(array).dimensions();
  if (shape.size() == leading.size() + trailing.size() &&
      std::equal(leading.begin(), leading.end(), shape.begin()) &&
      std::equal(trailing.begin(), trailing.end(), shape.begin() + leading.size())) {
    return;
  }
  std::vector<int64_t> expected(leading.begin(), leading.end());
  expected.insert(expected.end(), trailing);
  Fail(array, " must have shape ",
       ShapeString(ffi::Span<const int64_t>(expected.data(), expected.size())), ", got ",
       ShapeString(shape));
}

void FfiCall::Rank(std::string_view array, size_t rank) {
  That(Get(array).dimensions().size() == rank, array, " must have rank ", rank);
}

void FfiCall::Type(std::string_view array, ffi::DataType type) {
  That(Get(array).element_type() == type, array, " has an unexpected element type");
}

void FfiCall::NotEmpty(std::string_view array) {
  const ffi::Span<const int64_t> shape = Get(array).dimensions();
  for (int64_t size : shape) {
    That(size > 0, array, " must not be empty, got shape ", ShapeString(shape));
  }
}

const int32_t* FfiCall::Integers(std::string_view operand, std::initializer_list<int64_t> shape) {
  if (!Find(operand)) return nullptr;
  Type(operand, ffi::DataType::S32);
  Shape(operand, shape);
  return ok() ? Get(operand).typed_data<int32_t>() : nullptr;
}

float* FfiCall::Floats(std::string_view result, std::initializer_list<int64_t> trailing,
                       ffi::Span<const int64_t> leading) {
  if (!Find(result)) return nullptr;
  Type(result, ffi::DataType::F32);
  Shape(result, trailing, leading);
  return ok() ? Get(result).typed_data<float>() : nullptr;
}

void FfiCall::ReadPaged(PagedProblem* problem, PagedArrays* arrays,
                        ffi::Span<const int64_t>* leading) {
  const bool packed = Find("first_rows").has_value();
  const size_t query_rank = packed ? 3 : 4;
  Rank("query", query_rank);
  Rank("key", 3);
  Rank("value", 3);
  Rank("block_table", 2);
  // The sizes of an array that exists, none of them 0, have a product that cannot overflow.
  for (const char* array : {"query", "key", "value", "block_table"}) NotEmpty(array);
  if (!ok()) return;
  const ffi::AnyBuffer query = Get("query"), key = Get("key"), value = Get("value"),
                       table = Get("block_table");
  const std::optional<DataType> dtype = FromFfi(query.element_type());
  That(dtype.has_value(), "query must be bfloat16, float16 or float32");
  const ffi::Span<const int64_t> query_shape = query.dimensions();
  const int64_t heads = query_shape[query_rank - 2];
  problem->key_value_heads = Integer("key_value_heads");
  That(problem->key_value_heads > 0 && heads % problem->key_value_heads == 0,
       "query's heads must be a multiple of key_value_heads, got ", heads, " and ",
       problem->key_value_heads);
  problem->scale = Float("scale");
  problem->interleaved = Integer("interleaved") != 0;
  That(table.dimensions()[1] <= std::numeric_limits<int32_t>::max() / key.dimensions()[1],
       "block_table names more positions than lengths can count");
  if (!ok()) return;

  problem->dtype = *dtype;
  problem->sequences = table.dimensions()[0];
  problem->pages_per_sequence = table.dimensions()[1];
  problem->tokens = packed ? 0 : query_shape[1];
  problem->rows = packed ? query_shape[0] : query_shape[0] * query_shape[1];
  problem->heads = heads;
  problem->head_size = query_shape[query_rank - 1];
  problem->num_pages = key.dimensions()[0];
  problem->page_size = key.dimensions()[1];
  problem->value_size = value.dimensions()[2] / problem->key_value_heads;
  if (problem->interleaved) problem->value_size -= problem->head_size;

  const auto at_most = [&](const char* name, int64_t size, int64_t limit) {
    That(size <= limit, name, " must be at most ", limit, ", got ", size);
  };
  That(kMaxGroup % problem->group() == 0, "query's heads for each of key's must divide ", kMaxGroup,
       ", got ", problem->group());
  at_most("query's head size", problem->head_size, kMaxHeadSize);
  at_most("value's head size", problem->value_size, kMaxValueSize);
  That(problem->page_size % kPageGranule == 0, "page size must be a multiple of ", kPageGranule,
       ", got ", problem->page_size);
  at_most("page size", problem->page_size, kMaxPage);
  Type("key", query.element_type());
  Type("value", query.element_type());
  Shape("key", {problem->num_pages, problem->page_size, problem->key_pitch().row});
  Shape("value", {problem->num_pages, problem->page_size, problem->value_pitch().row});
  That(problem->value_size > 0, "value's head size must be positive, got ", problem->value_size);
  That(packed || query_shape[0] == problem->sequences,
       "query and block_table must have as many sequences");
  That(Find("lengths").has_value(), "needs lengths");
  That(!packed || Find("token_counts").has_value(), "needs token_counts beside first_rows");
  // An interleaved pool comes as key and as value.
  const size_t first_value =
      problem->interleaved ? problem->head_size * ffi::ByteWidth(key.element_type()) : 0;
  arrays->query = query.untyped_data();
  arrays->key = key.untyped_data();
  arrays->value = static_cast<const char*>(value.untyped_data()) + first_value;
  arrays->block_table = Integers("block_table", {problem->sequences, problem->pages_per_sequence});
  arrays->lengths = Integers("lengths", {problem->sequences});
  arrays->token_counts = Integers("token_counts", {problem->sequences});
  arrays->first_rows = Integers("first_rows", {problem->sequences});
  *leading = query_shape.first(query_rank - 2);
}

void ReadMaps(const ffi::Dictionary& attributes, CallersNames* names) {
  const auto maps = Attribute(attributes, "maps", ffi::Span<const int64_t>());
  names->maps.assign(maps.begin(), maps.end());
  names->pool_maps = std::max<int64_t>(1, Attribute<int64_t>(attributes, "pool_maps", 1));
  names->is_part = Attribute<int64_t>(attributes, "is_part", 0) != 0;
}

bool FaultsFail(const ffi::Dictionary& attributes) {
  return Attribute(attributes, "faults", std::string_view("fail")) != "nan";
}

std::string Place(const std::string& array, const PagedProblem& problem, bool packed,
                  const CallersNames& names, int64_t sequence,
                  std::initializer_list<int64_t> further) {
  // Each map was folded in its turn: inside a sequence, or around all of packed rows' sequences.
  std::vector<int64_t> at;
  for (size_t i = names.maps.size(); i-- > 0;) {
    const int64_t size = std::max<int64_t>(1, names.maps[i]);
    int64_t inner = 1;  // sequences of a call before this map
    if (packed) {
      inner = problem.sequences;
      for (size_t n = i; n < names.maps.size(); ++n) {
        inner /= std::max<int64_t>(1, names.maps[n]);
      }
      inner = std::max<int64_t>(1, inner);
      at.push_back(sequence / inner);
      sequence %= inner;
    } else {
      at.push_back(sequence % size);
      sequence /= size;
    }
  }
  std::string text = array + "[" + std::to_string(sequence);
  for (int64_t index : further) text += ", " + std::to_string(index);
  text += "]";
  if (names.is_part) text += " of one device's part";
  if (at.size() == 1) return text + " at index " + std::to_string(at[0]) + " of jax.vmap";
  if (at.size() > 1) {
    text += " at indices (";
    for (size_t i = 0; i < at.size(); ++i) text += (i ? ", " : "") + std::to_string(at[i]);
    text += ") of jax.vmap";
  }
  return text;
}

ffi::Error FaultError(const PagedProblem& problem, const PagedArrays& arrays,
                      const CallersNames& names, Fault fault, int64_t sequence, int64_t page) {
  const bool packed = arrays.first_rows != nullptr;
  const auto place = [&](const std::string& array, std::initializer_list<int64_t> further = {}) {
    return Place(array, problem, packed, names, sequence, further);
  };
  switch (fault) {
    case Fault::kNone:
      return ffi::Error::Success();
    case Fault::kLength:
      return InvalidArgument(place(names.lengths) + " must be in [0, " +
                             std::to_string(problem.capacity()) + "] (" +
                             std::to_string(problem.pages_per_sequence) + " pages of " +
                             std::to_string(problem.page_size) + " rows), got " +
                             std::to_string(arrays.lengths[sequence]));
    case Fault::kTokenCount: {
      SequenceRows rows;
      FindRows(problem, arrays, sequence, &rows);
      return InvalidArgument(
          place("actual_seq_qlen") + " must be in [0, " +
          std::to_string(packed ? problem.rows - rows.first : problem.tokens) + "] (" +
          (packed
               ? "what earlier sequences leave of query's " + std::to_string(problem.rows) + " rows"
               : std::string("query's rows for each sequence")) +
          "), got " + std::to_string(arrays.token_counts[sequence]));
    }
    case Fault::kPageId: {
      const int64_t pages = problem.num_pages / names.pool_maps;
      int64_t id = arrays.block_table[sequence * problem.pages_per_sequence + page];
      if (id >= 0) id -= problem.num_pages - pages;
      return InvalidArgument(place("block_table", {page}) + " must be in [0, " +
                             std::to_string(pages) + "), the pages of key and value, got " +
                             std::to_string(id));
    }
    case Fault::kOriginalLength:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, "unknown fault");
}

}  // namespace jax_nsa
