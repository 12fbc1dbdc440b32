// The types and functions of cc/cuda/tensor_map.h for the emulated machine.

#ifndef JAX_NSA_CUDA_TENSOR_MAP_H_
#define JAX_NSA_CUDA_TENSOR_MAP_H_

#include <cstdint>

#include "paged.h"

namespace jax_nsa::cuda {

struct BoxedArray {
  DataType dtype;
  const void* memory;
  int64_t positions, heads, columns;
  int64_t position_bytes, head_bytes;
  int box_positions, box_groups;
};

struct TensorMap {
  BoxedArray array;
};

// What the driver demands.
inline bool Describe(const BoxedArray& array, TensorMap* map) {
  const bool exists = array.positions > 0 && array.heads > 0 && array.columns > 0;
  const bool aligned = reinterpret_cast<uintptr_t>(array.memory) % 16 == 0 &&
                       array.position_bytes % 16 == 0 && array.head_bytes % 16 == 0;
  if (!exists || !aligned || array.box_positions > 256) return false;
  map->array = array;
  return true;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_TENSOR_MAP_H_
