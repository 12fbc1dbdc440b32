// CallFrame for Python's ctypes.

#include <cstring>

#include "call_frame.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT CallFrame* frame_new() { return std::make_unique<CallFrame>().release(); }
EXPORT void frame_delete(CallFrame* frame) { const std::unique_ptr<CallFrame> owned(frame); }

EXPORT void frame_begin(CallFrame* frame, const char* prefix) { frame->Begin(prefix); }
EXPORT void frame_buffer(CallFrame* frame, const char* name, int result, int type, int64_t rank,
                         const int64_t* dims, void* data) {
  std::vector<int64_t> shape(dims, dims + rank);
  const auto dtype = static_cast<XLA_FFI_DataType>(type);
  result ? frame->AddResult(name, dtype, std::move(shape), data)
         : frame->AddArgument(name, dtype, std::move(shape), data);
}
EXPORT void frame_integer(CallFrame* frame, const char* name, int64_t value) {
  frame->SetInteger(name, value);
}
EXPORT void frame_integers(CallFrame* frame, const char* name, int64_t size,
                           const int64_t* values) {
  frame->SetIntegers(name, std::vector<int64_t>(values, values + size));
}
EXPORT void frame_string(CallFrame* frame, const char* name, const char* value) {
  frame->SetString(name, value);
}
EXPORT void frame_problem_integer(CallFrame* frame, const char* name, int64_t value) {
  frame->SetProblemInteger(name, value);
}
EXPORT void frame_problem_float(CallFrame* frame, const char* name, float value) {
  frame->SetProblemFloat(name, value);
}
EXPORT void frame_stream(CallFrame* frame, void* stream, int32_t device_ordinal) {
  frame->SetStream(stream, device_ordinal);
}
// The error's code and, in `message`, what it says; 0 on success.
EXPORT int frame_run(CallFrame* frame, XLA_FFI_Handler* handler, char* message, size_t size) {
  const std::unique_ptr<XLA_FFI_Error> error = frame->Run(handler);
  if (error == nullptr) return XLA_FFI_Error_Code_OK;
  std::strncpy(message, error->message.c_str(), size - 1);
  message[size - 1] = '\0';
  return error->code;
}
