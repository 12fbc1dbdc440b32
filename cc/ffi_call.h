// From an XLA FFI call to named arrays and scalars, checked.

#ifndef JAX_NSA_FFI_CALL_H_
#define JAX_NSA_FFI_CALL_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "paged.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

// The arrays and attributes of one call, as jax_nsa/native.py writes them. Arrays are found by
// name: the attributes `operands` and `results` name them in order. The first disagreement found
// is kept as the error; what is read after it is empty.
class FfiCall {
 public:
  // `name` is how messages call the operator. Names that are not in `known`, or twice, are refused.
  FfiCall(std::string_view name, xla::ffi::RemainingArgs args, xla::ffi::RemainingRets rets,
          xla::ffi::Dictionary attributes, std::initializer_list<std::string_view> known_operands,
          std::initializer_list<std::string_view> known_results);

  bool ok() const { return !message_.has_value(); }
  xla::ffi::Error error() const;

  struct Array : xla::ffi::AnyBuffer {
    std::string_view name;
  };

  // An operand or result that may be absent, or must be there. Where both have one name, the
  // operand.
  std::optional<Array> Find(std::string_view name) const;
  std::optional<Array> FindResult(std::string_view name) const;
  Array Get(std::string_view name);

  // A scalar of the dictionary `problem`.
  int64_t Integer(std::string_view scalar);
  float Float(std::string_view scalar);

  // Expects an array to be of shape [*leading, *trailing], of this type, or to have no empty axis.
  void Shape(const Array& array, std::initializer_list<int64_t> trailing,
             xla::ffi::Span<const int64_t> leading = {});
  void Rank(const Array& array, size_t rank);
  void Type(const Array& array, xla::ffi::DataType type);
  void NotEmpty(const Array& array);

  template <typename... Text>
  void That(bool holds, const Text&... otherwise) {
    if (!holds) Fail(otherwise...);
  }

  // The array's int32 or float values where it is there and all is well, else null. Checks its
  // type.
  const int32_t* Integers(std::string_view operand, std::initializer_list<int64_t> shape);
  float* Floats(std::string_view result, std::initializer_list<int64_t> trailing,
                xla::ffi::Span<const int64_t> leading);

 private:
  template <typename... Text>
  void Fail(const Text&... text) {
    if (!ok()) return;
    message_.emplace();
    (Append(text), ...);
  }

  // Not by streams: on Ubuntu 24.04 (GCC 13.3, JAX 0.11.2) those that wrote a number crashed,
  // perhaps by the locale of another copy of the standard library.
  void Append(std::string_view text) { *message_ += text; }
  template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
  void Append(Integer number) {
    *message_ += std::to_string(number);
  }

  // Reads the names of `arrays`, RemainingArgs or RemainingRets.
  template <typename List>
  std::vector<Array> Name(std::string_view attribute, const List& arrays,
                          std::initializer_list<std::string_view> known);

  std::string_view name_;
  xla::ffi::Dictionary attributes_;
  std::vector<Array> operands_, results_;
  std::optional<xla::ffi::Dictionary> problem_;
  std::optional<std::string> message_;
};

// An attribute of the call, where it has one of the name and type.
template <typename T>
std::optional<T> FindAttribute(const xla::ffi::Dictionary& attributes, std::string_view name) {
  // XLA writes a message about what is not there, which takes half a microsecond.
  if (!attributes.contains(name)) return std::nullopt;
  const xla::ffi::ErrorOr<T> value = attributes.get<T>(name);
  return value.has_value() ? std::make_optional(*value) : std::nullopt;
}

// The same, or `otherwise`.
template <typename T>
T Attribute(const xla::ffi::Dictionary& attributes, std::string_view name, T otherwise) {
  return FindAttribute<T>(attributes, name).value_or(otherwise);
}

xla::ffi::Error InvalidArgument(const std::string& message);

std::optional<DataType> FromFfi(xla::ffi::DataType type);
std::string ShapeString(xla::ffi::Span<const int64_t> shape);

}  // namespace jax_nsa

#endif  // JAX_NSA_FFI_CALL_H_
