// The selected branch's kernel: attention over chosen blocks and over the window in one launch.
//
// One thread block for each part of each item (select_plan.h). Its warps go through the part's
// tiles, each with a small ring of its own in shared memory (select_attend.cuh), and are merged
// when they are through; whoever sees all parts of an attention merges these
// (select_merge.cuh). Several thread blocks share a multiprocessor, so that one's beginning and
// end lie under another's loading.

#include <algorithm>

#include "cuda/device.h"
#include "cuda/select_attend.cuh"
#include "cuda/select_item.cuh"
#include "cuda/select_launch.h"
#include "cuda/select_merge.cuh"
#include "cuda/select_params.cuh"
#include "cuda/select_ring.cuh"

namespace jax_nsa::cuda::select {

// Thread blocks of a multiprocessor, as registers allow: 128 each thread, or 255.
template <typename T>
constexpr int kResidentBlocks = std::is_same_v<T, float> ? 2 : 4;

// What does not depend on the sequence's length is loaded while that is on its way.
template <typename T, int kHeadSize, int kValueSize>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    SelectAttention(const __grid_constant__ Params params) {
  alignas(kSwizzle) extern __shared__ char memory[];
  if (threadIdx.x == 0) PrefetchMaps(params.pools);
  const Item item = FindItem(params);
  const Team team(params);
  // A window waits at its end, chosen blocks do here. A kernel that begins early has some of them,
  // so that it never ends before the kernel that chooses them.
  const bool ids_later = params.early && item.kind == kWindow;
  if (!ids_later) AwaitKernelBefore();
  TeamTiles tiles(params, item, team);
  Faults faults(params, item);
  if (!ids_later) faults.LoadIds();
  const Row row = FindRow(params, item.row);
  if (row.state != Row::kSound) {
    FillResults<T>(params, item, row.state == Row::kFaulty);
    return;
  }
  const Queries<T, kHeadSize> queries = {memory + sizeof(Shared)};
  char* const rings = queries.memory + (queries.kTileBytes << team.warps_log2);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  bool faulty;
  auto rows = AttendPart<T, kHeadSize, kValueSize>(params, item, row, team, tiles, faults,
                                                   ids_later, queries, rings, shared.full, &faulty);
  Finish(params, item, team, rows, faulty, shared, rings);
}

struct Kernel : KernelOf {
  int query_tile_bytes, stage_bytes, sums_bytes;
};
template <typename T, int kHeadSize, int kValueSize>
Kernel MakeKernel(DataType dtype) {
  return {{dtype, kHeadSize, kValueSize,
           reinterpret_cast<const void*>(&SelectAttention<T, kHeadSize, kValueSize>)},
          Queries<T, kHeadSize>::kTileBytes,
          Stage<T, kTile, kHeadSize, kValueSize>::kBytes,
          static_cast<int>(sizeof(WarpSums<kValueSize>))};
}
const Kernel kKernels[] = {
    MakeKernel<__nv_bfloat16, 64, 64>(DataType::kBFloat16),
    MakeKernel<__nv_bfloat16, 128, 128>(DataType::kBFloat16),
    MakeKernel<__nv_bfloat16, kMaxHeadSize, kMaxValueSize>(DataType::kBFloat16),
    MakeKernel<__half, 64, 64>(DataType::kFloat16),
    MakeKernel<__half, 128, 128>(DataType::kFloat16),
    MakeKernel<__half, kMaxHeadSize, kMaxValueSize>(DataType::kFloat16),
    MakeKernel<float, kMaxHeadSize, kMaxValueSize>(DataType::kFloat32),
};

// Tiles that a team of one warp has in flight: two where two thread blocks share a multiprocessor,
// one where there are so many thread blocks that it can have four. (That is as much shared memory
// as a Hopper GPU has for the largest 16-bit kernel.)
constexpr int Stages(int64_t blocks) { return blocks > kResident ? 1 : 2; }

// Pages that a block lies in, at most.
int64_t PagesOfBlock(int64_t block, int64_t page) {
  if (block == 0 || page % block == 0) return 1;
  return block % page == 0 ? block / page : (block - kTile) / page + 2;
}

const char* Refuses(const Problem& problem) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const Plan plan = MakePlan(problem);
  if (problem.capacity() > kMost || plan.tiles[kSelected] > kMost ||
      problem.select_count * PagesOfBlock(problem.select_block_size, problem.page_size) > kMost ||
      problem.num_pages * problem.page_size * problem.key_value_heads > 2 * kMost - 1 ||
      plan.items > kMost || plan.items * plan.all_parts() > kMost) {
    return "more positions than the kernel can count";
  }
  return nullptr;
}

cudaError_t Launch(const Problem& problem, const Arrays& arrays, void* workspace,
                   int64_t workspace_bytes, bool early, cudaStream_t stream) {
  const Device* device = nullptr;
  if (cudaError_t error = FindDevice(kKernels, &device); error != cudaSuccess) return error;

  Params params = {};
  params.problem = problem;
  params.arrays = arrays;
  params.plan = MakePlan(problem);
  const Plan& plan = params.plan;
  if (plan.bytes > workspace_bytes) return cudaErrorInvalidValue;
  params.workspace = static_cast<char*>(workspace);
  params.scale_log2 = problem.scale * 1.4426950408889634f;
  params.heads = static_cast<int32_t>(problem.heads);
  params.key_value_heads = static_cast<int32_t>(problem.key_value_heads);
  params.head_size = static_cast<int32_t>(problem.head_size);
  params.value_size = static_cast<int32_t>(problem.value_size);
  params.value_columns = static_cast<int32_t>(ValueColumns(problem));
  params.group = static_cast<int32_t>(problem.group());
  params.page_size = static_cast<int32_t>(problem.page_size);
  params.capacity = static_cast<int32_t>(problem.capacity());
  params.num_pages = static_cast<int32_t>(problem.num_pages);
  params.pages_per_sequence = static_cast<int32_t>(problem.pages_per_sequence);
  params.block_size = static_cast<int32_t>(std::max<int64_t>(problem.select_block_size, kTile));
  params.block_tiles = params.block_size / kTile;
  params.max_blocks = static_cast<int32_t>(CeilDiv(problem.capacity(), params.block_size));
  params.pages_each = static_cast<int32_t>(PagesOfBlock(params.block_size, problem.page_size));
  params.select_count = static_cast<int32_t>(problem.select_count);
  params.head_items = params.key_value_heads * plan.chunks;
  params.by_head_items = Divider::By(params.head_items);
  params.by_chunks = Divider::By(plan.chunks);
  params.by_parts = Divider::By(plan.all_parts());
  params.by_tokens = Divider::By(std::max<int64_t>(problem.tokens, 1));
  params.by_page_size = Divider::By(params.page_size);
  params.by_block_tiles = Divider::By(params.block_tiles);
  params.by_pages_each = Divider::By(params.pages_each);
  for (int kind = 0; kind < kKinds; ++kind) {
    params.by_parts_of[kind] = Divider::By(std::max(plan.parts[kind], 1));
  }
  const Kernel& kernel = ChooseKernel(kKernels, problem);
  params.pools = MakePools(problem, arrays, kernel, kTile, device->has_engine);
  params.aligned_query = IsAligned(arrays.query, problem.head_size, problem.dtype);
  const int64_t blocks = plan.items * plan.all_parts();
  // As many tiles in flight whether teams are many or few, if there is room.
  const int team_warps = plan.rows > 2 * kRowTile ? 4 : plan.rows > kRowTile ? 2 : 1;
  const int teams = kWarps / team_warps;
  const auto shared_bytes = [&](int stages) {
    const int after = std::max(kernel.sums_bytes, static_cast<int>(sizeof(PartFactors)));
    return static_cast<int>(sizeof(Shared)) + team_warps * kernel.query_tile_bytes +
           std::max(teams * stages * kernel.stage_bytes, after);
  };
  params.stages = std::min(kMaxStages, Stages(blocks) * team_warps);
  while (params.stages > 1 && shared_bytes(params.stages) > device->shared_bytes) --params.stages;
  if (shared_bytes(params.stages) > device->shared_bytes) return cudaErrorInvalidConfiguration;

  // Without chosen blocks nobody would wait for the kernel before.
  params.early = early && device->starts_early && params.plan.parts[kSelected] > 0;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes(params.stages));
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = params.early ? 1 : 0;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, kernel.function, arguments);
}

}  // namespace jax_nsa::cuda::select
