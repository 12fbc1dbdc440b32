// A call frame as XLA would hand it to a handler, whose every part may be changed.

#ifndef JAX_NSA_TESTS_FRAME_H_
#define JAX_NSA_TESTS_FRAME_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

namespace jax_nsa::testing {

struct Array {
  std::string name;
  XLA_FFI_DataType type;
  std::vector<int64_t> dims;
  std::vector<int32_t> contents = {};  // repeated through the array; zeros where there are none
};

// Scalars of the types that JAX writes, a string, an array, or a dictionary of scalars.
using Scalar = std::variant<int64_t, float, double, int32_t, bool>;
using Scalars = std::map<std::string, Scalar>;  // XLA too has them by name, in order
using Attribute = std::variant<Scalar, std::string, std::vector<int64_t>, Scalars>;

struct Frame {
  std::vector<Array> arguments, results;
  std::map<std::string, Attribute> attributes;
  std::string in_place;  // results of these names, a space after each, lie in their operand
};

inline size_t BytesOf(const Array& array) {
  size_t bytes = array.type == XLA_FFI_DataType_F32 || array.type == XLA_FFI_DataType_S32   ? 4
                 : array.type == XLA_FFI_DataType_F64 || array.type == XLA_FFI_DataType_S64 ? 8
                 : array.type == XLA_FFI_DataType_PRED                                      ? 1
                                                                                            : 2;
  for (int64_t dim : array.dims) bytes *= static_cast<size_t>(dim);
  return bytes;
}

// The memory and the C structures of a frame, for one call.
class Call {
 public:
  explicit Call(const Frame& frame) {
    std::map<std::string, char*> operands;
    for (const Array& array : frame.arguments) {
      operands[array.name] = AddBuffer(array, nullptr, &arguments_);
    }
    for (const Array& array : frame.results) {
      const auto found = operands.find(array.name);
      const bool in_place =
          found != operands.end() && frame.in_place.find(array.name + " ") != std::string::npos;
      AddBuffer(array, in_place ? found->second : nullptr, &results_);
    }
    attributes_ = AddDictionary(frame.attributes);
  }

  // Runs the handler; the error's message, empty where there is none.
  std::string Run(XLA_FFI_Handler* handler) {
    std::vector<XLA_FFI_ArgType> argument_types(arguments_.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results_.size(), XLA_FFI_RetType_BUFFER);
    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = Api();
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arguments_.size()),
                  argument_types.data(), arguments_.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results_.size()),
                  result_types.data(), results_.data()};
    frame.attrs = *attributes_;
    const std::unique_ptr<XLA_FFI_Error> error(handler(&frame));
    return error ? error->message : "";
  }

 private:
  struct Dictionary {
    std::vector<XLA_FFI_ByteSpan*> names;
    std::vector<XLA_FFI_AttrType> types;
    std::vector<void*> values;
    XLA_FFI_Attrs attrs = {};
  };

  // Memory of exactly the array's bytes, so that a sanitizer sees what leads out of it.
  char* AddBuffer(const Array& array, char* data, std::vector<void*>* list) {
    if (data == nullptr) {
      const size_t bytes = BytesOf(array);
      data = memory_.emplace_back(std::make_unique<char[]>(bytes)).get();
      for (size_t at = 0; !array.contents.empty() && at + 4 <= bytes; at += 4) {
        const int32_t value = array.contents[at / 4 % array.contents.size()];
        __builtin_memcpy(data + at, &value, 4);
      }
    }
    const std::vector<int64_t>& dims = dims_.emplace_back(array.dims);
    XLA_FFI_Buffer& buffer = buffers_.emplace_back();
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.dtype = array.type;
    buffer.data = data;
    buffer.rank = static_cast<int64_t>(dims.size());
    buffer.dims = const_cast<int64_t*>(dims.data());
    list->push_back(&buffer);
    return data;
  }

  template <class Values>
  XLA_FFI_Attrs* AddDictionary(const Values& values) {
    Dictionary& added = dictionaries_.emplace_back();
    for (const auto& [name, value] : values) {
      added.names.push_back(&spans_.emplace_back(Span(name)));
      const auto [type, pointer] = Add(value);
      added.types.push_back(type);
      added.values.push_back(pointer);
    }
    added.attrs.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
    added.attrs.size = static_cast<int64_t>(added.names.size());
    added.attrs.types = added.types.data();
    added.attrs.names = added.names.data();
    added.attrs.attrs = added.values.data();
    return &added.attrs;
  }

  using Typed = std::pair<XLA_FFI_AttrType, void*>;

  Typed Add(const Attribute& attribute) {
    if (const auto* scalar = std::get_if<Scalar>(&attribute)) return Add(*scalar);
    if (const auto* text = std::get_if<std::string>(&attribute)) {
      return {XLA_FFI_AttrType_STRING, &spans_.emplace_back(Span(*text))};
    }
    if (const auto* values = std::get_if<std::vector<int64_t>>(&attribute)) {
      const std::vector<int64_t>& kept = dims_.emplace_back(*values);
      XLA_FFI_Array& array = arrays_.emplace_back();
      array = {XLA_FFI_DataType_S64, kept.size(), const_cast<int64_t*>(kept.data())};
      return {XLA_FFI_AttrType_ARRAY, &array};
    }
    return {XLA_FFI_AttrType_DICTIONARY, AddDictionary(std::get<Scalars>(attribute))};
  }

  Typed Add(const Scalar& scalar) {
    Scalar& kept = kept_.emplace_back(scalar);
    XLA_FFI_Scalar& added = scalars_.emplace_back();
    constexpr XLA_FFI_DataType kTypes[] = {XLA_FFI_DataType_S64, XLA_FFI_DataType_F32,
                                           XLA_FFI_DataType_F64, XLA_FFI_DataType_S32,
                                           XLA_FFI_DataType_PRED};
    added.dtype = kTypes[kept.index()];
    added.value = std::visit([](auto& value) -> void* { return &value; }, kept);
    return {XLA_FFI_AttrType_SCALAR, &added};
  }

  XLA_FFI_ByteSpan Span(const std::string& text) {
    const std::string& kept = strings_.emplace_back(text);
    return {kept.data(), kept.size()};
  }

  // The part of XLA's interface that decoding calls.
  static const XLA_FFI_Api* Api() {
    static const XLA_FFI_Api api = [] {
      XLA_FFI_Api made = {};
      made.struct_size = XLA_FFI_Api_STRUCT_SIZE;
      made.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                          XLA_FFI_API_MINOR};
      made.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
        return std::make_unique<XLA_FFI_Error>(XLA_FFI_Error{args->message}).release();
      };
      made.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) {
        const std::unique_ptr<XLA_FFI_Error> error(args->error);
      };
      return made;
    }();
    return &api;
  }

  std::deque<std::unique_ptr<char[]>> memory_;
  std::deque<std::vector<int64_t>> dims_;
  std::deque<XLA_FFI_Buffer> buffers_;
  std::deque<XLA_FFI_ByteSpan> spans_;
  std::deque<XLA_FFI_Array> arrays_;
  std::deque<XLA_FFI_Scalar> scalars_;
  std::deque<Scalar> kept_;
  std::deque<std::string> strings_;
  std::deque<Dictionary> dictionaries_;
  std::vector<void*> arguments_, results_;
  XLA_FFI_Attrs* attributes_;
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_FRAME_H_
