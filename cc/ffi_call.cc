#include "ffi_call.h"

#include <algorithm>

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

std::optional<ffi::AnyBuffer> At(const ffi::RemainingArgs& operands, size_t i) {
  const ffi::ErrorOr<ffi::AnyBuffer> buffer = operands.get<ffi::AnyBuffer>(i);
  return buffer.has_value() ? std::make_optional(*buffer) : std::nullopt;
}

std::optional<ffi::AnyBuffer> At(const ffi::RemainingRets& results, size_t i) {
  ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = results.get<ffi::AnyBuffer>(i);
  return buffer.has_value() ? std::make_optional(**buffer) : std::nullopt;
}

// What has the name among arrays.
std::optional<FfiCall::Array> Named(const std::vector<FfiCall::Array>& arrays,
                                    std::string_view name) {
  for (const FfiCall::Array& array : arrays) {
    if (array.name == name) return array;
  }
  return std::nullopt;
}

}  // namespace

ffi::Error InvalidArgument(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

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
    : name_(name), attributes_(attributes) {
  operands_ = Name("operands", args, known_operands);
  results_ = Name("results", rets, known_results);
  ffi::ErrorOr<ffi::Dictionary> problem = attributes.get<ffi::Dictionary>("problem");
  That(problem.has_value(), "has no attribute problem");
  if (problem.has_value()) problem_ = *problem;
}

template <typename List>
std::vector<FfiCall::Array> FfiCall::Name(std::string_view attribute, const List& arrays,
                                          std::initializer_list<std::string_view> known) {
  std::vector<Array> named;
  const ffi::ErrorOr<std::string_view> text = attributes_.get<std::string_view>(attribute);
  if (text.has_error()) {
    Fail("has no attribute ", attribute, " that names its arrays");
    return named;
  }
  named.reserve(arrays.size());
  size_t count = 0;
  for (size_t begin = 0; begin < text->size(); ++count) {
    const size_t end = std::min(text->find(' ', begin), text->size());
    const std::string_view name = text->substr(begin, end - begin);
    That(std::find(known.begin(), known.end(), name) != known.end(), "does not know \"", name,
         "\" among its ", attribute);
    That(!Named(named, name), "has \"", name, "\" twice among its ", attribute);
    const std::optional<ffi::AnyBuffer> buffer = At(arrays, count);
    if (buffer) named.push_back({*buffer, name});
    begin = end + 1;
  }
  That(count == arrays.size(), "names ", count, " ", attribute, " and has ", arrays.size());
  return named;
}

ffi::Error FfiCall::error() const {
  return InvalidArgument(std::string(name_) + ": " + message_.value_or(""));
}

std::optional<FfiCall::Array> FfiCall::Find(std::string_view name) const {
  if (!ok()) return std::nullopt;
  const std::optional<Array> operand = Named(operands_, name);
  return operand ? operand : Named(results_, name);
}

std::optional<FfiCall::Array> FfiCall::FindResult(std::string_view name) const {
  return ok() ? Named(results_, name) : std::nullopt;
}

FfiCall::Array FfiCall::Get(std::string_view name) {
  static XLA_FFI_Buffer nothing = {};
  const std::optional<Array> array = Find(name);
  That(array.has_value(), "needs ", name);
  return array ? *array : Array{ffi::AnyBuffer(&nothing), {}};
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

void FfiCall::Shape(const Array& array, std::initializer_list<int64_t> trailing,
                    ffi::Span<const int64_t> leading) {
  const ffi::Span<const int64_t> shape = array.dimensions();
  if (shape.size() == leading.size() + trailing.size() &&
      std::equal(leading.begin(), leading.end(), shape.begin()) &&
      std::equal(trailing.begin(), trailing.end(), shape.begin() + leading.size())) {
    return;
  }
  std::vector<int64_t> expected(leading.begin(), leading.end());
  expected.insert(expected.end(), trailing);
  Fail(array.name, " must have shape ",
       ShapeString(ffi::Span<const int64_t>(expected.data(), expected.size())), ", got ",
       ShapeString(shape));
}

void FfiCall::Rank(const Array& array, size_t rank) {
  That(array.dimensions().size() == rank, array.name, " must have rank ", rank);
}

void FfiCall::Type(const Array& array, ffi::DataType type) {
  That(array.element_type() == type, array.name, " has an unexpected element type");
}

void FfiCall::NotEmpty(const Array& array) {
  const ffi::Span<const int64_t> shape = array.dimensions();
  if (std::find(shape.begin(), shape.end(), 0) == shape.end()) return;
  Fail(array.name, " must not be empty, got shape ", ShapeString(shape));
}

const int32_t* FfiCall::Integers(std::string_view operand, std::initializer_list<int64_t> shape) {
  const std::optional<Array> array = Find(operand);
  if (!array) return nullptr;
  Type(*array, ffi::DataType::S32);
  Shape(*array, shape);
  return ok() ? array->typed_data<int32_t>() : nullptr;
}

float* FfiCall::Floats(std::string_view result, std::initializer_list<int64_t> trailing,
                       ffi::Span<const int64_t> leading) {
  const std::optional<Array> array = Find(result);
  if (!array) return nullptr;
  Type(*array, ffi::DataType::F32);
  Shape(*array, trailing, leading);
  return ok() ? array->typed_data<float>() : nullptr;
}

}  // namespace jax_nsa
