// Descriptions of arrays for the engine that copies boxes of them (TMA), which GPUs have from
// compute capability 9.0 on. The driver makes them; it is looked up when it is first needed, so
// that nothing is linked.

#ifndef JAX_NSA_CUDA_TENSOR_MAP_H_
#define JAX_NSA_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "paged.h"

namespace jax_nsa::cuda {

using TensorMap = CUtensorMap;

// An array [positions, heads, columns], and the boxes that are copied from it: of some positions,
// one head, and one or several groups of columns of 128 bytes; several where the array's columns
// are whole groups. Columns that the array does not have become zero. In shared memory a box's
// groups lie one after the other, and so do a group's rows, their units of 16 bytes as Swizzled has
// them (tiles.cuh).
struct BoxedArray {
  DataType dtype;
  const void* memory;
  int64_t positions, heads, columns;
  int64_t position_bytes, head_bytes;  // from one to the next
  int box_positions, box_groups;
};

// Whether the engine can copy such boxes; then `map` describes them.
inline bool Describe(const BoxedArray& array, TensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  if (encode == nullptr) return false;
  const CUtensorMapDataType type =
      array.dtype == DataType::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
      : array.dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint32_t group = array.dtype == DataType::kFloat32 ? 32 : 64;
  const auto columns = static_cast<cuuint64_t>(array.columns);
  const bool whole = array.box_groups > 1;
  const cuuint64_t sizes[] = {whole ? group : columns, static_cast<cuuint64_t>(array.positions),
                              static_cast<cuuint64_t>(array.heads), whole ? columns / group : 1};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(array.position_bytes),
                                static_cast<cuuint64_t>(array.head_bytes), 128};
  const cuuint32_t box[] = {group, static_cast<cuuint32_t>(array.box_positions), 1,
                            static_cast<cuuint32_t>(array.box_groups)};
  const cuuint32_t ones[] = {1, 1, 1, 1};
  return encode(map, type, 4, const_cast<void*>(array.memory), sizes, pitches, box, ones,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_TENSOR_MAP_H_
