// A fuzzer's bytes, read as edits of a call frame: other sizes, types, names, attributes and
// contents.

#ifndef JAX_NSA_TESTS_EDITS_H_
#define JAX_NSA_TESTS_EDITS_H_

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <variant>
#include <vector>

#include "frame.h"
#include "xla/ffi/api/c_api.h"

namespace jax_nsa::testing {

constexpr int64_t kMostElements = 1 << 18;  // of an array: sizes that memory is there for

// Reads bytes until there are none, and then zeros.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  bool empty() const { return data_ == end_; }
  uint64_t Take() { return empty() ? 0 : *data_++; }
  size_t Below(size_t n) { return Take() % n; }
  template <class Container>
  auto& Of(Container& container) {
    return container[Below(container.size())];
  }

 private:
  const uint8_t *data_, *const end_;
};

inline void EditArray(Bytes* bytes, Frame* frame) {
  constexpr int64_t kSizes[] = {0,  1,  2,   3,   4,   6,   8,   12,  15,  16,     17,
                                32, 64, 128, 129, 192, 193, 256, 257, 272, 1 << 15};
  constexpr XLA_FFI_DataType kTypes[] = {
      XLA_FFI_DataType_F32, XLA_FFI_DataType_S32, XLA_FFI_DataType_F16, XLA_FFI_DataType_BF16,
      XLA_FFI_DataType_F64, XLA_FFI_DataType_S64, XLA_FFI_DataType_PRED};
  constexpr int32_t kContents[] = {0,  1,  2,  3,  4,  5,  16,        31,        32,      33,
                                   48, 63, -1, -2, -7, 99, INT32_MAX, INT32_MIN, 1 << 30, 340};
  std::vector<Array>& list = bytes->Below(3) ? frame->arguments : frame->results;
  if (list.empty()) return;
  const size_t at = bytes->Below(list.size());
  Array& array = list[at];
  switch (bytes->Below(8)) {
    case 0:
    case 1: {
      if (array.dims.empty()) return;
      int64_t& dim = bytes->Of(array.dims);
      const int64_t before = dim;
      dim = kSizes[bytes->Below(std::size(kSizes))];
      int64_t count = 1;
      for (int64_t d : array.dims) count *= std::max<int64_t>(1, d);
      if (count > kMostElements) dim = before;
      return;
    }
    case 2:
      if (bytes->Below(2)) {
        array.dims.push_back(1);
      } else if (!array.dims.empty()) {
        array.dims.pop_back();
      }
      return;
    case 3:
      array.type = kTypes[bytes->Below(std::size(kTypes))];
      return;
    case 4:
      list.erase(list.begin() + static_cast<int64_t>(at));
      return;
    case 5:
      list.push_back(Array(bytes->Of(list)));
      return;
    case 6:
      array.name = bytes->Below(2) ? bytes->Of(list).name : std::string("surprise");
      return;
    default:
      for (size_t i = bytes->Below(6); i > 0; --i) {
        array.contents.push_back(kContents[bytes->Below(std::size(kContents))]);
      }
      return;
  }
}

inline void EditAttribute(Bytes* bytes, Frame* frame) {
  constexpr int64_t kIntegers[] = {0,  1,  2,   3,   15,  16, 17,  32,        48,        64,
                                   72, 96, 128, 144, 255, -1, -16, INT64_MAX, INT64_MIN, INT32_MAX};
  const int64_t integer = kIntegers[bytes->Below(std::size(kIntegers))];
  const auto of_another_type = [&]() -> Scalar {
    switch (bytes->Below(4)) {
      case 0:
        return static_cast<float>(integer);
      case 1:
        return static_cast<double>(integer);
      case 2:
        return static_cast<int32_t>(integer);
      default:
        return integer > 0;
    }
  };
  auto* const problem = std::get_if<Scalars>(&frame->attributes["problem"]);
  switch (bytes->Below(8)) {
    case 0:
    case 1:
    case 2:
      if (problem && !problem->empty()) {
        auto found = problem->begin();
        std::advance(found, bytes->Below(problem->size()));
        found->second = bytes->Below(4) ? Scalar(integer) : of_another_type();
        if (bytes->Below(16) == 1) problem->erase(found);
      }
      return;
    case 3:
      frame->attributes["maps"] = std::vector<int64_t>{integer, kIntegers[bytes->Below(20)]};
      return;
    case 4:
      frame->attributes["pool_maps"] = Scalar(integer);
      return;
    case 5:
      frame->attributes["faults"] = std::string(bytes->Below(2) ? "nan" : "fail");
      return;
    case 6:
      frame->in_place.clear();
      return;
    default: {
      static const std::string kNames[] = {"operands", "results", "problem", "maps", "is_part"};
      const std::string& name = kNames[bytes->Below(5)];
      switch (bytes->Below(4)) {
        case 0:
          frame->attributes.erase(name);
          return;
        case 1:
          frame->attributes[name] = of_another_type();
          return;
        case 2:
          frame->attributes[name] = std::string("query  key\0 lengths", bytes->Below(19));
          return;
        default:
          frame->attributes[name] = std::vector<int64_t>(bytes->Below(3), integer);
          return;
      }
    }
  }
}

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_EDITS_H_
