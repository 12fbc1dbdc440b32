// The Python module jax_nsa._native: which custom-call targets were compiled, for which FFI API.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

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
#include "cuda/plan.h"
#include "cuda/select_plan.h"
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
#endif
XLA_FFI_Error* jax_nsa_compress_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_attention_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend_host(XLA_FFI_CallFrame*);
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
  py::dict all;
  all["cpu"] = cpu;
#ifdef JAX_NSA_CUDA
  py::dict cuda;
  cuda["jax_nsa_compress_attention_cuda"] = Target("CUDA", jax_nsa_compress_attention_cuda);
  cuda["jax_nsa_compress_cuda"] = Target("CUDA", jax_nsa_compress_cuda);
  cuda["jax_nsa_select_attention_cuda"] = Target("CUDA", jax_nsa_select_attention_cuda);
  all["cuda"] = cuda;
#endif
  all["ascend"] = ascend;
  return all;
}

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
        for (const jax_nsa::cpu::Kernel* kernel : jax_nsa::cpu::SupportedKernels()) {
          names.append(kernel->name);
        }
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
      "cuda_workspace_bytes",
      [](int64_t sequences, int64_t rows, bool ragged, int64_t heads, int64_t key_value_heads,
         int64_t value_size, int64_t page_size, int64_t pages_per_sequence, int64_t select_count,
         int64_t compress_block_size, int64_t compress_stride, int64_t select_block_size,
         bool aligned) {
        jax_nsa::compress_attention::Problem problem = {};
        problem.sequences = sequences;
        problem.rows = rows;
        problem.tokens = ragged ? 0 : rows / sequences;
        problem.heads = heads;
        problem.key_value_heads = key_value_heads;
        problem.value_size = value_size;
        problem.page_size = page_size;
        problem.pages_per_sequence = pages_per_sequence;
        problem.select_count = select_count;
        problem.blocks = {compress_block_size, compress_stride, select_block_size, aligned};
        return jax_nsa::cuda::WorkspaceBytes(problem);
      },
      py::kw_only(), py::arg("sequences"), py::arg("rows"), py::arg("ragged"), py::arg("heads"),
      py::arg("key_value_heads"), py::arg("value_size"), py::arg("page_size"),
      py::arg("pages_per_sequence"), py::arg("select_count"), py::arg("compress_block_size"),
      py::arg("compress_stride"), py::arg("select_block_size"), py::arg("aligned"),
      "Size of the CUDA kernel's last result, which is its workspace.");
  module.def(
      "cuda_select_workspace_bytes",
      [](int64_t rows, int64_t heads, int64_t key_value_heads, int64_t value_size,
         int64_t page_size, int64_t pages_per_sequence, int64_t select_block_size,
         int64_t select_count, int64_t window_size) {
        jax_nsa::select_attention::Problem problem = {};
        problem.rows = rows;
        problem.heads = heads;
        problem.key_value_heads = key_value_heads;
        problem.value_size = value_size;
        problem.page_size = page_size;
        problem.pages_per_sequence = pages_per_sequence;
        problem.select_block_size = select_block_size;
        problem.select_count = select_count;
        problem.window_size = window_size;
        return jax_nsa::cuda::select::WorkspaceBytes(problem);
      },
      py::kw_only(), py::arg("rows"), py::arg("heads"), py::arg("key_value_heads"),
      py::arg("value_size"), py::arg("page_size"), py::arg("pages_per_sequence"),
      py::arg("select_block_size"), py::arg("select_count"), py::arg("window_size"),
      "The same of the selected branch's kernel.");
#endif
  module.def("ascend_unavailable", &AscendUnavailable, py::arg("target"),
             "Why CANN or an NPU cannot serve an operator on this machine; None if it can.");
  module.def("ascend_release", &AscendRelease, py::call_guard<py::gil_scoped_release>(),
             "Gives back the device memory and streams kept for further calls.");
  module.def(
      "ascend_limits", [](const std::string& target) { return AscendLimits().at(target); },
      py::arg("target"), "Limits of CANN's kernel of an operator.");
}
