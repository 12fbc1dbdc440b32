// The Python module jax_nsa._native: which custom-call targets were compiled, for which FFI API.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "ascend/compress_abi.h"
#include "ascend/compress_attention_abi.h"
#include "ascend/compress_attention_request.h"
#include "ascend/compress_launch.h"
#include "ascend/context.h"
#include "ascend/runtime.h"
#include "ascend/select_attention_abi.h"
#include "ascend/select_attention_launch.h"
#include "cpu/isa.h"
#ifdef JAX_NSA_CUDA
#include "cuda/workspace.h"
#endif
#include "blocks.h"
#include "xla/ffi/api/c_api.h"

// Handlers, each defined beside its kernel.
extern "C" {
XLA_FFI_Error* jax_nsa_compress_attention_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_cpu(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_cpu(XLA_FFI_CallFrame*);
#ifdef JAX_NSA_CUDA
XLA_FFI_Error* jax_nsa_compress_attention_cuda(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_cuda(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_cuda(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_step_cuda(XLA_FFI_CallFrame*);
#endif
XLA_FFI_Error* jax_nsa_compress_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_attention_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_step_ascend(XLA_FFI_CallFrame*);
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
  cpu["jax_nsa_compress_cpu"] = Target("cpu", jax_nsa_compress_cpu);
  cpu["jax_nsa_select_attention_cpu"] = Target("cpu", jax_nsa_select_attention_cpu);
  py::dict ascend;
  ascend["jax_nsa_compress_attention_ascend"] = Target("ASCEND", jax_nsa_compress_attention_ascend);
  ascend["jax_nsa_compress_attention_ascend_host"] =
      Target("cpu", jax_nsa_compress_attention_ascend_host);
  ascend["jax_nsa_compress_ascend"] = Target("ASCEND", jax_nsa_compress_ascend);
  ascend["jax_nsa_compress_ascend_host"] = Target("cpu", jax_nsa_compress_ascend_host);
  ascend["jax_nsa_select_attention_ascend"] = Target("ASCEND", jax_nsa_select_attention_ascend);
  ascend["jax_nsa_select_attention_ascend_host"] =
      Target("cpu", jax_nsa_select_attention_ascend_host);
  ascend["jax_nsa_step_ascend"] = Target("ASCEND", jax_nsa_step_ascend);
  py::dict all;
  all["cpu"] = cpu;
#ifdef JAX_NSA_CUDA
  py::dict cuda;
  cuda["jax_nsa_compress_attention_cuda"] = Target("CUDA", jax_nsa_compress_attention_cuda);
  cuda["jax_nsa_compress_cuda"] = Target("CUDA", jax_nsa_compress_cuda);
  cuda["jax_nsa_select_attention_cuda"] = Target("CUDA", jax_nsa_select_attention_cuda);
  cuda["jax_nsa_step_cuda"] = Target("CUDA", jax_nsa_step_cuda);
  all["cuda"] = cuda;
#endif
  all["ascend"] = ascend;
  return all;
}

#ifdef JAX_NSA_CUDA
// The operators whose kernels need memory of their own.
const std::map<std::string, int64_t (*)(const jax_nsa::cuda::Sizes&)> kCudaWorkspaces = {
    {"compress_attention", &jax_nsa::cuda::CompressAttentionWorkspace},
    {"select_attention", &jax_nsa::cuda::SelectAttentionWorkspace},
};
#endif

// Limits of CANN's kernels by operator, for refusing a call when it is traced.
std::map<std::string, std::map<std::string, int64_t>> AscendLimits() {
  namespace ascend = jax_nsa::ascend;
  using Compress = ascend::CompressLimits;
  using Select = ascend::SelectAttentionLimits;
  return {
      {"compress",
       {{"window", Compress::kMaxWindow},
        {"heads", Compress::kMaxHeads},
        {"head_size_granule", Compress::kHeadSizeGranule},
        {"small_page", Compress::kSmallPage},
        {"large_page", Compress::kLargePage}}},
      {"compress_attention",
       {{"page", ascend::kMaxPageSize},
        {"sequences", ascend::kMaxSequences},
        {"tokens", ascend::kMaxTokens},
        {"length", ascend::kMaxLength},
        {"blocks", ascend::kMaxBlocks}}},
      {"select_attention",
       {{"heads", Select::kKeyValueHeads},
        {"group", Select::kMaxGroup},
        {"head_size", Select::kHeadSize},
        {"value_size", Select::kValueSize},
        {"small_page", Select::kSmallPage},
        {"large_page", Select::kLargePage}}},
  };
}

// Why CANN cannot serve an operator on this machine; nothing if it can.
std::optional<std::string> AscendUnavailable(const std::string& target) {
  namespace ascend = jax_nsa::ascend;
  static const std::map<std::string, std::optional<std::string> (*)()> operators = {
      {"compress_attention", &ascend::Unavailable<ascend::CompressAttentionApi>},
      {"compress", &ascend::Unavailable<ascend::CompressApi>},
      {"select_attention", &ascend::Unavailable<ascend::SelectAttentionApi>},
  };
  const auto found = operators.find(target);
  if (found == operators.end()) return "jax_nsa calls no operator of CANN for " + target;
  return found->second();
}

void AscendRelease() {
  const xla::ffi::Error error = jax_nsa::ascend::Contexts::Get().Release();
  if (error.failure()) throw std::runtime_error(error.message());
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
      "cpu_kernels",
      [] {
        py::list names;
        for (const std::string_view isa : jax_nsa::cpu::SupportedIsas()) names.append(isa);
        return names;
      },
      "Names of the CPU kernels that this machine can run, best first.");
  module.def(
      "num_blocks",
      [](int64_t compress_block_size, int64_t compress_stride, int64_t select_block_size,
         int64_t length) {
        return jax_nsa::Blocks{compress_block_size, compress_stride, select_block_size}.NumBlocks(
            length);
      },
      "Select blocks of a sequence, as the kernels count them.");
#ifdef JAX_NSA_CUDA
  module.def(
      "cuda_workspaces",
      [] {
        std::vector<std::string> targets;
        for (const auto& [target, bytes] : kCudaWorkspaces) targets.push_back(target);
        return targets;
      },
      "Targets of the operators whose CUDA kernels need a workspace.");
  module.def(
      "cuda_workspace_bytes",
      [](const std::string& target, const std::map<std::string, int64_t>& sizes) {
        return kCudaWorkspaces.at(target)(jax_nsa::cuda::Sizes(sizes));
      },
      py::arg("target"), py::arg("sizes"),
      "Size of the result named workspace, from the sizes of a call's axes and its scalars.");
#endif
  module.def("ascend_unavailable", &AscendUnavailable, py::arg("target"),
             "Why CANN or an NPU cannot serve an operator on this machine; None if it can.");
  module.def("ascend_release", &AscendRelease, py::call_guard<py::gil_scoped_release>(),
             "Gives back the device memory and streams kept for further calls.");
  module.def(
      "ascend_limits", [](const std::string& target) { return AscendLimits().at(target); },
      py::arg("target"), "Limits of CANN's kernel of an operator.");
}
