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

  // An operand or result that may be absent, or must be there. Where both have one name, the
  // operand.
  std::optional<xla::ffi::AnyBuffer> Find(std::string_view array) const;
  std::optional<xla::ffi::AnyBuffer> FindResult(std::string_view result) const;
  xla::ffi::AnyBuffer Get(std::string_view array);

  // A scalar of the dictionary `problem`.
  int64_t Integer(std::string_view scalar);
  float Float(std::string_view scalar);

  // Expects an array of shape [*leading, *trailing], of this type, or with no empty axis.
  void Shape(std::string_view array, std::initializer_list<int64_t> trailing,
             xla::ffi::Span<const int64_t> leading = {});
  void Rank(std::string_view array, size_t rank);
  void Type(std::string_view array, xla::ffi::DataType type);
  void NotEmpty(std::string_view array);

  template <typename... Parts>
  void That(bool holds, const Parts&... otherwise) {
    if (!holds) Fail(otherwise...);
  }

  // The array's int32 or float values where it is there and all is well, else null. Checks its
  // type.
  const int32_t* Integers(std::string_view operand, std::initializer_list<int64_t> shape);
  float* Floats(std::string_view result, std::initializer_list<int64_t> trailing,
                xla::ffi::Span<const int64_t> leading);

 private:
  template <typename... Parts>
  void Fail(const Parts&... parts) {
    if (!ok()) return;
    message_.emplace();
    (Append(parts), ...);
  }

  // Not by streams: on Ubuntu 24.04 (GCC 13.3, JAX 0.11.2) those that wrote a number crashed,
  // perhaps by the locale of another copy of the standard library.
  void Append(std::string_view text) { *message_ += text; }
  template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
  void Append(Integer number) {
    *message_ += std::to_string(number);
  }

  void Name(std::string_view attribute, size_t count, std::initializer_list<std::string_view> known,
            std::vector<std::string_view>* names);

  std::string name_;
  xla::ffi::RemainingArgs args_;
  xla::ffi::RemainingRets rets_;
  xla::ffi::Dictionary attributes_;
  std::vector<std::string_view> operands_, results_;
  std::optional<xla::ffi::Dictionary> problem_;
  std::optional<std::string> message_;
};

// An attribute of the call, or `otherwise` where it has none of the name and type.
template <typename T>
T Attribute(const xla::ffi::Dictionary& attributes, std::string_view name, T otherwise) {
  const xla::ffi::ErrorOr<T> value = attributes.get<T>(name);
  return value.has_value() ? *value : otherwise;
}

xla::ffi::Error InvalidArgument(const std::string& message);

std::optional<DataType> FromFfi(xla::ffi::DataType type);
std::string ShapeString(xla::ffi::Span<const int64_t> shape);

}  // namespace jax_nsa

#endif  // JAX_NSA_FFI_CALL_H_
