// The Python module jax_nsa._native: which custom-call targets were compiled, for which FFI API.

#include <pybind11/pybind11.h>

#include <tuple>

#include "selection.h"
#include "xla/ffi/api/c_api.h"

// Handlers, each defined beside its kernel.
extern "C" {
XLA_FFI_Error* jax_nsa_compress_attention_cpu(XLA_FFI_CallFrame*);
}

namespace {

namespace py = pybind11;

py::tuple Target(const char* platform, XLA_FFI_Handler* handler) {
  return py::make_tuple(platform, py::capsule(reinterpret_cast<void*>(handler)));
}

// {backend: {target name: (XLA platform, handler)}}
py::dict Registrations() {
  py::dict cpu;
  cpu["jax_nsa_compress_attention_cpu"] = Target("cpu", jax_nsa_compress_attention_cpu);
  py::dict all;
  all["cpu"] = cpu;
  return all;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled kernels of jax_nsa.";
  module.def(
      "ffi_api_version", [] { return std::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI API that the handlers were compiled for.");
  module.def("registrations", &Registrations,
             "{backend: {target: (platform, handler capsule)}} of the compiled kernels.");
  module.def(
      "num_blocks",
      [](int64_t compress_block_size, int64_t compress_stride, int64_t select_block_size,
         int64_t length) {
        return jax_nsa::Window{compress_block_size, compress_stride, select_block_size}.NumBlocks(
            length);
      },
      "Select blocks of a sequence, as the kernels count them.");
}
