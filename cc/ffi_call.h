// From an XLA FFI call to named arrays and scalars, checked; and the sentence for each fault of a
// sequence. What an operator's user calls its arrays is passed in.

#ifndef JAX_NSA_FFI_CALL_H_
#define JAX_NSA_FFI_CALL_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
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

  // Reads and checks the operands of a call over paged caches: query, key, value, block_table,
  // lengths, and token_counts and first_rows where they are there. Rows of results are those of
  // query: `*leading` is its shape without heads and head size.
  void ReadPaged(PagedProblem* problem, PagedArrays* arrays,
                 xla::ffi::Span<const int64_t>* leading);

 private:
  template <typename... Parts>
  void Fail(const Parts&... parts) {
    if (!ok()) return;
    std::ostringstream message;
    (message << ... << parts);
    message_ = message.str();
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

std::optional<DataType> FromFfi(xla::ffi::DataType type);
std::string ShapeString(xla::ffi::Span<const int64_t> shape);

// What the user called the arrays of a call, for messages about values that only the running
// program knows.
struct CallersNames {
  std::string lengths;           // original or compressed
  std::string original_lengths;  // where an operator has both
  // Sizes of the jax.vmaps that were folded into the sequences, the innermost first, and how many
  // mapped calls' pools lie one after the other in one.
  std::vector<int64_t> maps;
  int64_t pool_maps = 1;
  bool is_part = false;  // whether the call is what one device has of a larger one
};

// Reads the attributes `maps`, `pool_maps` and `is_part`.
void ReadMaps(const xla::ffi::Dictionary& attributes, CallersNames* names);

// Whether faults fail the call; otherwise the sequence's results become NaN and -1.
bool FaultsFail(const xla::ffi::Dictionary& attributes);

// "name[b]" or "name[b, further]" of a sequence as the user counts them, and where it was mapped:
// " at index 2 of jax.vmap".
std::string Place(const std::string& array, const PagedProblem& problem, bool packed,
                  const CallersNames& names, int64_t sequence,
                  std::initializer_list<int64_t> further = {});

// The error for a sequence's fault but kOriginalLength: names the argument, the value and what is
// legal. `page` is the column of block_table, for kPageId.
xla::ffi::Error FaultError(const PagedProblem& problem, const PagedArrays& arrays,
                           const CallersNames& names, Fault fault, int64_t sequence,
                           int64_t page = 0);

}  // namespace jax_nsa

#endif  // JAX_NSA_FFI_CALL_H_
