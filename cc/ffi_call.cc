#include "ffi_call.h"

#include <algorithm>

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

// Where a name stands among others; their number if it does not.
size_t Index(const std::vector<std::string_view>& names, std::string_view name) {
  return static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
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
  if (std::find(shape.begin(), shape.end(), 0) == shape.end()) return;
  Fail(array, " must not be empty, got shape ", ShapeString(shape));
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

}  // namespace jax_nsa
