// The functions of cc/cuda/ptx.cuh in plain C++, on the emulated machine.

#ifndef JAX_NSA_CUDA_PTX_CUH_
#define JAX_NSA_CUDA_PTX_CUH_

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "cuda/tensor_map.h"
#include "language.h"
#include "machine.h"

namespace jax_nsa::cuda {

inline uint32_t SharedAddress(const void* pointer) { return emulated_cuda::SharedOffset(pointer); }
inline int ThreadIndex() { return threadIdx.x; }

inline void BarrierInit(uint64_t* barrier, int arrivals) {
  emulated_cuda::InitBarrier(barrier, arrivals);
}
inline void BarrierArrive(uint64_t* barrier, int count = 1) {
  emulated_cuda::Arrive(barrier, count);
  emulated_cuda::MaybeYield(64);
}
inline void BarrierArriveAfterCopies(uint64_t* barrier) {
  emulated_cuda::ArriveAfterCopies(barrier);
  emulated_cuda::MaybeYield(64);
}
inline void BarrierArriveExpecting(uint64_t* barrier, int bytes) {
  emulated_cuda::ArriveExpecting(barrier, bytes);
  emulated_cuda::MaybeYield(64);
}
inline void BarrierWait(uint64_t* barrier, uint32_t parity) {
  emulated_cuda::WaitForPhase(barrier, parity);
}

inline uint64_t ReadOncePolicy() { return 0; }
inline void CopyAsync16(uint32_t to, const void* from, uint64_t) {
  emulated_cuda::CopyLater(to, from);
}
inline void CopyAsync16(uint32_t to, const void* from) { emulated_cuda::CopyLater(to, from); }
inline void FenceBarrierInit() {}
inline void PrefetchMap(const TensorMap&) {}
inline void CopyBox(uint32_t to, const TensorMap& map, int column, int head, int position,
                    uint64_t* barrier, uint64_t) {
  const BoxedArray& array = map.array;
  const int element = array.dtype == DataType::kFloat32 ? 4 : 2;
  emulated_cuda::Require(column >= 0 && head >= 0 && head < array.heads && position >= 0 &&
                             position + array.box_positions <= array.positions,
                         "a box beyond its array");
  // To boxes of several groups of columns, columns that fill no group do not exist.
  const int64_t unit = array.box_groups > 1 ? 128 : 1;
  const int64_t row = array.columns * element / unit * unit;
  for (int group = 0; group < array.box_groups; ++group) {
    const int64_t first = int64_t{column} * element + 128 * group;
    const int64_t exist = max(int64_t{0}, min(int64_t{128}, row - first));
    const auto* memory = static_cast<const char*>(array.memory) + head * array.head_bytes + first +
                         position * array.position_bytes;
    emulated_cuda::CopyBoxLater(
        to + group * array.box_positions * 128,
        {memory, array.box_positions, static_cast<int>(exist), array.position_bytes}, barrier);
  }
}
inline void CommitCopies() { emulated_cuda::CommitCopies(); }
template <int kLater>
void WaitForCopies() {
  emulated_cuda::WaitForCopies(kLater);
}
inline void DiscardLine(char* line) {
  emulated_cuda::Require(reinterpret_cast<uintptr_t>(line) % 128 == 0, "no whole line");
  std::memset(line, 0xff, 128);
  ++(threadIdx.x < 256 ? emulated_cuda::counts.whole_items_lines
                       : emulated_cuda::counts.cut_items_lines);
}

// Matrices of the warp's lanes.

struct LoadedMatrices {
  const char* row;
  uint32_t to[4];
};

// Lane 4g + t gets elements 2t and 2t + 1 of row g, or of column g.
template <bool kTransposed>
void LoadAll(LoadedMatrices* const (&lanes)[emulated_cuda::kLanes]) {
  for (int lane = 0; lane < emulated_cuda::kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
        std::memcpy(&pair[i], lanes[8 * matrix + row]->row + 2 * column, sizeof pair[i]);
      }
      lanes[lane]->to[matrix] = pair[0] | uint32_t{pair[1]} << 16;
    }
  }
}

template <bool kTransposed>
void LoadMatricesAs(const char* name, uint32_t (&to)[4], uint32_t row) {
  emulated_cuda::Require(row % 16 == 0, "a matrix's row is not aligned");
  LoadedMatrices own = {emulated_cuda::SharedPointer(row), {}};
  emulated_cuda::Together<&LoadAll<kTransposed>>(name, own);
  std::memcpy(to, own.to, sizeof to);
}
inline void LoadMatrices(uint32_t (&to)[4], uint32_t row) {
  LoadMatricesAs<false>("ldmatrix", to, row);
}
inline void LoadMatricesTransposed(uint32_t (&to)[4], uint32_t row) {
  LoadMatricesAs<true>("ldmatrix.trans", to, row);
}

template <typename T>
float Number(uint32_t bits) {
  T number;
  number.bits = static_cast<uint16_t>(bits);
  return static_cast<float>(number);
}

struct Multiplied {
  float* sum;
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void MultiplyAll(Multiplied* const (&lanes)[emulated_cuda::kLanes]) {
  float a[16][16], b[16][8], sum[16][8];
  const auto element = [](int lane, int i) {  // of a and of sum: a row, and a column of 8
    return std::pair<int, int>(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
  };
  for (int lane = 0; lane < emulated_cuda::kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const Multiplied& own = *lanes[lane];
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = element(lane, i);
      sum[row][column] = own.sum[i];
      for (int half = 0; half < 2; ++half) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = Number<T>(own.a[i] >> 16 * half);
        b[2 * t + i / 2 * 8 + half][g] = Number<T>(own.b[i / 2] >> 16 * half);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < emulated_cuda::kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = element(lane, i);
      lanes[lane]->sum[i] = sum[row][column];
    }
  }
}

template <typename T>
void MultiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Multiplied own = {sum, a, {b0, b1}};
  emulated_cuda::Together<&MultiplyAll<T>>("mma", own);
}

// Subnormal numbers are 0 to it.
inline float Exp2(float x) {
  const float y = std::exp2(std::fabs(x) < FLT_MIN ? 0.0f : x);
  return y < FLT_MIN ? 0.0f : y;
}

inline float Inverse(float x) { return 1.0f / x; }

template <typename T>
uint32_t Pack(float low, float high) {
  return T(low).bits | uint32_t{T(high).bits} << 16;
}

// Kernels that may begin early do so in any case (machine.h).
inline void LetNextKernelBegin() {}

inline void SyncConsumers() { emulated_cuda::Sync(1, 256); }
template <int kRegisters>
void ShrinkRegisters() {}
template <int kRegisters>
void GrowRegisters() {}
inline void StoreRelease(uint64_t* to, uint64_t value) {
  *to = value;
  ++emulated_cuda::counts.flags;
  emulated_cuda::MaybeYield(2);
}
inline void AwaitAcquire(const uint64_t* from, uint64_t value) {
  emulated_cuda::WaitForValue(from, value);
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_PTX_CUH_
