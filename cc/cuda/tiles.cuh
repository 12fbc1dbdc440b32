// How keys and values come from their pools into shared memory, a tile of positions at a time.
//
// A tile is made of runs, whose positions lie in one page. Where there is an engine for it (TMA,
// from compute capability 9.0 on), one thread asks for a run's keys and values as two boxes;
// elsewhere the lanes of a warp copy 16 bytes each, and where rows start anywhere, element by
// element.

#ifndef JAX_NSA_CUDA_TILES_CUH_
#define JAX_NSA_CUDA_TILES_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"
#include "paged.h"

namespace jax_nsa::cuda {

// Positions that lie in one page wherever they begin at a multiple of so many.
constexpr int kRun = kPageGranule;

// The keys or the values: [positions of all pages, heads, size]. Pitches are in elements.
struct Pool {
  const void* memory;
  int32_t size;
  int32_t position_pitch;
  int32_t head_pitch;
};

struct Pools {
  TensorMap key_map, value_map;
  Pool key, value;
  bool boxed;  // whether the engine copies boxes, which the maps describe
  int32_t box_positions;
  bool whole_rows;  // whether a box has all of its rows' columns, and not one group of them
  bool aligned;     // whether rows start at multiples of 16 bytes
};

// Rows in shared memory, in groups of columns of 128 bytes: a row's units of 16 bytes lie in each
// group in an order of the row's own, so that a unit of 8 neighbouring rows lies in different
// banks. The memory begins at a multiple of kSwizzle bytes.
constexpr int kSwizzle = 1024;
template <typename T, int kRows, int kColumns>
struct Swizzled {
  static constexpr int kUnit = 16 / sizeof(T), kGroup = 8 * kUnit;  // columns
  static constexpr int kGroups = kColumns / kGroup;
  static constexpr int kRowBytes = 128, kGroupBytes = kRows * kRowBytes;
  static constexpr int kBytes = kGroups * kGroupBytes;
  static_assert(kColumns % kGroup == 0 && kGroupBytes % kSwizzle == 0);

  // Where a unit lies.
  static __device__ constexpr int Place(int row, int unit) {
    return unit / 8 * kGroupBytes + row * kRowBytes + ((unit ^ row) & 7) * 16;
  }
  // The address of the unit `units` after one at `address` whose number in its group has none of
  // the bits of `units`.
  static __device__ constexpr uint32_t After(uint32_t address, int units) {
    return (address ^ (units % 8 * 16)) + units / 8 * kGroupBytes;
  }
  static __device__ T* At(char* memory, int row, int column) {
    return reinterpret_cast<T*>(memory + Place(row, column / kUnit)) + column % kUnit;
  }
  static __device__ const T* At(const char* memory, int row, int column) {
    return At(const_cast<char*>(memory), row, column);
  }
};

// A tile's rows in shared memory.
template <typename T, int kPositions, int kKeyColumns, int kValueColumns>
struct Stage {
  using Element = T;
  using Keys = Swizzled<T, kPositions, kKeyColumns>;
  using Values = Swizzled<T, kPositions, kValueColumns>;
  static constexpr int kHeadSize = kKeyColumns, kValueSize = kValueColumns;
  static constexpr int kBytes = Keys::kBytes + Values::kBytes;
  static constexpr int kPositionBytes = kBytes / kPositions;

  char* memory;

  __device__ char* keys() const { return memory; }
  __device__ char* values() const { return memory + Keys::kBytes; }

  // The keys' columns from head_size on enter the products, so they must be numbers. No copy of
  // rows touches them; a box makes them zero. Of positions first, first + step and so on.
  __device__ void ClearColumns(const Pools& pools, int first, int end, int step) const {
#pragma unroll 1
    for (int row = first; row < end; row += step) {
#pragma unroll 1
      for (int d = pools.key.size; d < kHeadSize; ++d) *Keys::At(keys(), row, d) = T(0.0f);
    }
  }
};

// Fetches what the engine must know first, ahead of time. By one thread.
__device__ inline void PrefetchMaps(const Pools& pools) {
  if (!pools.boxed) return;
  PrefetchMap(pools.key_map);
  PrefetchMap(pools.value_map);
}

// Asks for the boxes of one head's keys and values, by one thread: of pools.box_positions
// positions from `from` on in the pools, to rows from `to` on. Their bytes, kPositionBytes for each
// position, arrive at the barrier.
template <typename Stage>
__device__ inline void CopyBoxes(const Pools& pools, const Stage& stage, int to, int from, int head,
                                 uint64_t* barrier, uint64_t policy) {
  const auto copy = [&](auto rows, char* memory, const TensorMap& map) {
    using Rows = decltype(rows);
#pragma unroll
    for (int group = 0; group < Rows::kGroups; ++group) {
      CopyBox(SharedAddress(memory) + group * Rows::kGroupBytes + to * Rows::kRowBytes, map,
              group * Rows::kGroup, head, from, barrier, policy);
      if (pools.whole_rows) break;
    }
  };
  copy(typename Stage::Keys(), stage.keys(), pools.key_map);
  copy(typename Stage::Values(), stage.values(), pools.value_map);
}

// Copies some of a run's rows without waiting: those in [begin, end). Eight lanes copy 128
// neighbouring bytes at a time, so that a warp has four rows in hand. With kFull, all columns
// exist.
template <bool kFull, typename Rows, int kElement>
__device__ inline void CopyRows(const Pool& pool, char* memory, int to, int from, int head,
                                int begin, int end, uint64_t policy) {
  const int lane = threadIdx.x % 32, offset = lane % 8 * 16;
  const int bytes = pool.size * kElement, step = pool.position_pitch * kElement;
  const char* source = static_cast<const char*>(pool.memory) + int64_t{from + lane / 8} * step +
                       head * pool.head_pitch * kElement + offset;
  const uint32_t first = SharedAddress(memory) + Rows::Place(to + lane / 8, lane % 8);
#pragma unroll
  for (int r = 0; r < kRun; r += 4) {
    const int row = r + lane / 8;
    if (row < begin || row >= end) continue;
    const uint32_t place = (first ^ (r % 8 * 16)) + r * Rows::kRowBytes;
#pragma unroll
    for (int group = 0; group < Rows::kGroups; ++group) {
      if (kFull || offset + 128 * group < bytes) {
        CopyAsync16(place + group * Rows::kGroupBytes, source + int64_t{r} * step + 128 * group,
                    policy);
      }
    }
  }
}

// The same one element at a time, for rows that start anywhere. Slow.
template <typename Rows, typename T>
__device__ inline void CopyElements(const Pool& pool, char* memory, int to, int from, int head,
                                    int begin, int end) {
#pragma unroll 1
  for (int r = begin; r < end; ++r) {
    const T* source = static_cast<const T*>(pool.memory) + int64_t{from + r} * pool.position_pitch +
                      head * pool.head_pitch;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < pool.size; i += 32) {
      *Rows::At(memory, to + r, i) = source[i];
    }
  }
}

// Copies positions [begin, end) of a run, by one warp: from position `from` + begin of the pools
// on, to rows from `to` + begin on. Aligned rows are on their way then, others are there.
template <typename Stage>
__device__ inline void CopyRun(const Pools& pools, const Stage& stage, int to, int from, int head,
                               int begin, int end, uint64_t policy) {
  using T = typename Stage::Element;
  const auto copy = [&](auto full) {
    constexpr bool kFull = decltype(full)::value;
    CopyRows<kFull, typename Stage::Keys, sizeof(T)>(pools.key, stage.keys(), to, from, head, begin,
                                                     end, policy);
    CopyRows<kFull, typename Stage::Values, sizeof(T)>(pools.value, stage.values(), to, from, head,
                                                       begin, end, policy);
  };
  if (!pools.aligned) {
    CopyElements<typename Stage::Keys, T>(pools.key, stage.keys(), to, from, head, begin, end);
    CopyElements<typename Stage::Values, T>(pools.value, stage.values(), to, from, head, begin,
                                            end);
  } else if (pools.key.size == Stage::kHeadSize && pools.value.size == Stage::kValueSize) {
    copy(std::true_type());
  } else {
    copy(std::false_type());
  }
}

// How a call's pools are copied into a kernel's stages of `tile` positions, on a device that has
// the engine or not.
inline Pools MakePools(const PagedProblem& problem, const PagedArrays& arrays,
                       const KernelOf& kernel, int tile, bool has_engine) {
  const int64_t element = ElementSize(problem.dtype);
  const auto pool = [&](const void* memory, int64_t size, const Pitch& pitch) {
    return Pool{memory, static_cast<int32_t>(size), static_cast<int32_t>(pitch.row),
                static_cast<int32_t>(pitch.head)};
  };
  Pools pools = {};
  pools.key = pool(arrays.key, problem.head_size, problem.key_pitch());
  pools.value = pool(arrays.value, problem.value_size, problem.value_pitch());
  const auto aligned = [&](const Pool& pool) {
    return IsAligned(pool.memory, pool.size, problem.dtype) &&
           IsAligned(pool.memory, pool.head_pitch, problem.dtype);
  };
  pools.aligned = aligned(pools.key) && aligned(pools.value);
  pools.box_positions = problem.page_size % tile == 0 ? tile : kRun;
  // In a stage, one group's rows follow another's of the whole tile.
  const int64_t group = 128 / element;
  pools.whole_rows = pools.box_positions == tile && problem.head_size % group == 0 &&
                     problem.value_size % group == 0;
  const auto describe = [&](const Pool& pool, int64_t columns, TensorMap* map) {
    return Describe(
        {problem.dtype, pool.memory, problem.num_pages * problem.page_size, problem.key_value_heads,
         pool.size, pool.position_pitch * element, pool.head_pitch * element, pools.box_positions,
         static_cast<int>(pools.whole_rows ? columns / group : 1)},
        map);
  };
  pools.boxed = has_engine && pools.aligned &&
                describe(pools.key, kernel.head_size, &pools.key_map) &&
                describe(pools.value, kernel.value_size, &pools.value_map);
  return pools;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_TILES_CUH_
