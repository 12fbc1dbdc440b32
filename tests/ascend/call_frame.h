// Calls an XLA FFI handler without XLA: builds what XLA would hand it. For tests that need a
// handler on device pointers and a stream, which no JAX platform here can give.

#ifndef CALL_FRAME_H_
#define CALL_FRAME_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
  XLA_FFI_Error_Code code;
};

class CallFrame {
 public:
  // What follows is of the call whose attributes have this prefix, of several that are one.
  void Begin(const std::string& prefix) { call_ = &calls_[prefix_ = prefix]; }

  void AddArgument(const std::string& name, XLA_FFI_DataType type, std::vector<int64_t> dims,
                   void* data) {
    arguments_.push_back(AddBuffer(type, std::move(dims), data));
    call_->operands += (call_->operands.empty() ? "" : " ") + name;
  }
  void AddResult(const std::string& name, XLA_FFI_DataType type, std::vector<int64_t> dims,
                 void* data) {
    results_.push_back(AddBuffer(type, std::move(dims), data));
    call_->results += (call_->results.empty() ? "" : " ") + name;
  }
  // Attributes; those of the dictionary "problem" separately.
  void SetInteger(const std::string& name, int64_t value) {
    Integer(attributes_, prefix_ + name, value);
  }
  void SetIntegers(const std::string& name, std::vector<int64_t> values) {
    arrays_.push_back(std::move(values));
    array_attributes_.push_back(
        {XLA_FFI_DataType_S64, arrays_.back().size(), arrays_.back().data()});
    attributes_[prefix_ + name] = {XLA_FFI_AttrType_ARRAY, &array_attributes_.back()};
  }
  void SetString(const std::string& name, const std::string& value) {
    strings_.push_back(value);
    string_attributes_.push_back({strings_.back().data(), strings_.back().size()});
    attributes_[prefix_ + name] = {XLA_FFI_AttrType_STRING, &string_attributes_.back()};
  }
  void SetProblemInteger(const std::string& name, int64_t value) {
    Integer(call_->problem, name, value);
  }
  void SetProblemFloat(const std::string& name, float value) {
    floats_.push_back(value);
    scalars_.push_back({XLA_FFI_DataType_F32, &floats_.back()});
    call_->problem[name] = {XLA_FFI_AttrType_SCALAR, &scalars_.back()};
  }
  void SetStream(void* stream, int32_t device_ordinal) { context_ = {stream, device_ordinal}; }

  // Runs the handler; null on success.
  std::unique_ptr<XLA_FFI_Error> Run(XLA_FFI_Handler* handler) {
    std::deque<Dictionary> problems;
    std::deque<XLA_FFI_ByteSpan> names;
    for (const auto& [prefix, call] : calls_) {
      const auto add_names = [&](const char* attribute, const std::string& its) {
        names.push_back({its.data(), its.size()});
        attributes_[prefix + attribute] = {XLA_FFI_AttrType_STRING, &names.back()};
      };
      add_names("operands", call.operands);
      add_names("results", call.results);
      attributes_[prefix + "problem"] = {XLA_FFI_AttrType_DICTIONARY,
                                         problems.emplace_back(call.problem).attrs()};
    }
    Dictionary attributes(attributes_);
    std::vector<void*> arguments = Pointers(arguments_), results = Pointers(results_);
    std::vector<XLA_FFI_ArgType> argument_types(arguments.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);

    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = Api();
    frame.ctx = reinterpret_cast<decltype(frame.ctx)>(&context_);
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args.struct_size = XLA_FFI_Args_STRUCT_SIZE;
    frame.args.size = static_cast<int64_t>(arguments.size());
    frame.args.types = argument_types.data();
    frame.args.args = arguments.data();
    frame.rets.struct_size = XLA_FFI_Rets_STRUCT_SIZE;
    frame.rets.size = static_cast<int64_t>(results.size());
    frame.rets.types = result_types.data();
    frame.rets.rets = results.data();
    frame.attrs = *attributes.attrs();
    return std::unique_ptr<XLA_FFI_Error>(handler(&frame));
  }

 private:
  // What XLA's opaque context of an execution stands for here.
  struct Context {
    void* stream;
    int32_t device_ordinal;
  };

  struct Attribute {
    XLA_FFI_AttrType type;
    void* value;
  };
  using Attributes = std::map<std::string, Attribute>;  // XLA too has them by name, in order

  // What one call of the frame is told by names.
  struct Call {
    std::string operands, results;
    Attributes problem;
  };

  struct Buffer {
    std::vector<int64_t> dims;
    XLA_FFI_Buffer buffer;
  };

  class Dictionary {
   public:
    explicit Dictionary(const Attributes& attributes) {
      for (const auto& [name, attribute] : attributes) {
        spans_.push_back({name.data(), name.size()});
        names_.push_back(&spans_.back());
        types_.push_back(attribute.type);
        values_.push_back(attribute.value);
      }
      attrs_.struct_size = XLA_FFI_Attrs_STRUCT_SIZE;
      attrs_.size = static_cast<int64_t>(types_.size());
      attrs_.types = types_.data();
      attrs_.names = names_.data();
      attrs_.attrs = values_.data();
    }
    XLA_FFI_Attrs* attrs() { return &attrs_; }

   private:
    std::deque<XLA_FFI_ByteSpan> spans_;
    std::vector<XLA_FFI_ByteSpan*> names_;
    std::vector<XLA_FFI_AttrType> types_;
    std::vector<void*> values_;
    XLA_FFI_Attrs attrs_ = {};
  };

  Buffer* AddBuffer(XLA_FFI_DataType type, std::vector<int64_t> dims, void* data) {
    Buffer& added = buffers_.emplace_back();
    added.dims = std::move(dims);
    added.buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    added.buffer.dtype = type;
    added.buffer.data = data;
    added.buffer.rank = static_cast<int64_t>(added.dims.size());
    added.buffer.dims = added.dims.data();
    return &added;
  }

  void Integer(Attributes& attributes, const std::string& name, int64_t value) {
    integers_.push_back(value);
    scalars_.push_back({XLA_FFI_DataType_S64, &integers_.back()});
    attributes[name] = {XLA_FFI_AttrType_SCALAR, &scalars_.back()};
  }

  static std::vector<void*> Pointers(const std::vector<Buffer*>& buffers) {
    std::vector<void*> pointers;
    for (Buffer* buffer : buffers) pointers.push_back(&buffer->buffer);
    return pointers;
  }

  // The part of XLA's interface that handlers of this library call.
  static const XLA_FFI_Api* Api() {
    static const XLA_FFI_Api api = [] {
      XLA_FFI_Api api = {};
      api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
      api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                         XLA_FFI_API_MINOR};
      api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
        return std::make_unique<XLA_FFI_Error>(XLA_FFI_Error{args->message, args->errc}).release();
      };
      api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) {
        const std::unique_ptr<XLA_FFI_Error> error(args->error);
      };
      api.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* args) -> XLA_FFI_Error* {
        args->stream = reinterpret_cast<Context*>(args->ctx)->stream;
        return nullptr;
      };
      api.XLA_FFI_DeviceOrdinal_Get = [](XLA_FFI_DeviceOrdinal_Get_Args* args) -> XLA_FFI_Error* {
        args->device_ordinal = reinterpret_cast<Context*>(args->ctx)->device_ordinal;
        return nullptr;
      };
      return api;
    }();
    return &api;
  }

  Context context_ = {};
  std::deque<Buffer> buffers_;
  std::vector<Buffer*> arguments_, results_;
  std::map<std::string, Call> calls_;  // by the prefix of their attributes
  std::string prefix_;
  Call* call_ = &calls_[prefix_];
  std::deque<int64_t> integers_;
  std::deque<float> floats_;
  std::deque<std::vector<int64_t>> arrays_;
  std::deque<XLA_FFI_Scalar> scalars_;
  std::deque<XLA_FFI_Array> array_attributes_;
  std::deque<std::string> strings_;
  std::deque<XLA_FFI_ByteSpan> string_attributes_;
  Attributes attributes_;
};

#endif  // CALL_FRAME_H_
