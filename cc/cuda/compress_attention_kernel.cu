// The kernel: attention, importance and selection in one launch.
//
// One persistent thread block for each multiprocessor goes through its share of the work
// (compress_attention_plan.h, compress_attention_work.cuh). Four warps fill a ring of stages in
// shared memory (compress_attention_pipeline.cuh); eight warps each take 16 rows of a tile of 32
// positions (compress_attention_attend.cuh), and when a part of an item is through they merge it
// with the others and select (compress_attention_merge.cuh, compress_attention_selection.cuh).

#include "cuda/compress_attention_attend.cuh"
#include "cuda/compress_attention_launch.h"
#include "cuda/compress_attention_merge.cuh"
#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_pipeline.cuh"
#include "cuda/compress_attention_records.cuh"
#include "cuda/compress_attention_selection.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/device.h"
#include "cuda/flags.cuh"

namespace jax_nsa::cuda::compressed {

// Shared memory, before the ring's stages.
struct alignas(kSwizzle) Shared {
  union {
    MergeScratch merge;
    SelectionScratch selection;
  };
  ConsumerState state;
  Barriers barriers;
  Share share;
  Part cut[2];  // parts of cut items that are left for the share's end, by the number of the region
};

template <typename T, int kHeadSize, int kValueSize, bool kJoint>
__device__ void Compute(const Params& params, const Ring<T, kHeadSize, kValueSize>& ring,
                        WorkList work, Shared& shared) {
  const int warp = threadIdx.x / 32;
  RingPosition start;
  Part part;
  int left = 0;  // a bit for each part in shared.cut
#pragma unroll 1
  while (true) {
    const bool more = work.Next(&part);
    if (!more && left == 0) return;
    if (more && !part.sequence.loads()) {
      FillTokens(params, part, 0, part.sequence.owned, part.sequence.is_faulty());
      continue;
    }
    if (!more) {
      // First the part whose item others finish: they wait for it.
      const int region = left / 2;
      left -= 1 << region;
      part = shared.cut[region];
    }
    // When the share is through, the ring's memory is free for records, too.
    const bool is_joint = kJoint && part.IsJoint();
    const Records records(params, part, is_joint,
                          more ? ring.behind(params.stages) : ring.behind(0),
                          more ? params.shared_floats : params.ring_floats);
    if (more) {
      // The warps that share rows take turns with the tiles.
      const int row_groups = RowGroups(part.rows(params));
      const int own_group = warp & (row_groups - 1), own_turn = warp / row_groups;
      const int turns = min(kConsumers / row_groups, params.stages);
      WarpRows<T, kHeadSize, kValueSize> rows(params, part, own_group * kRowTile);
      bool faulty = false;
      RingPosition position = start;
      position.Advance(own_turn, params.stages);
      // A stage is empty once kConsumers warps have arrived. Where fewer warps read it, each counts
      // for several.
      const int releases = kConsumers / row_groups;
#pragma unroll 1
      for (int tile = part.begin + own_turn; own_turn < turns && tile < part.end; tile += turns) {
        const int stage = position.stage;
        BarrierWait(&ring.barriers->full[stage], position.parity);
        // This phase is long over; without the wait, synccheck takes the barrier for misused.
        BarrierWait(&ring.barriers->empty[stage], position.parity ^ 1);
        faulty |= ring.barriers->faulty[stage] != 0;
        rows.Attend(ring[stage], tile * kTile, part.sequence.length, shared.state.weights,
                    &ring.barriers->empty[stage], releases, records.Own(tile));
        position.Advance(turns, params.stages);
      }
      start.Advance(part.end - part.begin, params.stages);
      if (part.is_last() || is_joint) {
        const int region = part.own_region() & 1;
        left |= 1 << region;
        if (ThreadIndex() == 0) shared.cut[region] = part;
      }
      MergeWarps(params, part, rows, faulty, shared.state, shared.merge);
      if (part.is_cut()) {
        if (!part.is_last() && ThreadIndex() == 0) RaiseFlag(part, params.flags());
        continue;
      }
    } else {
      AwaitParts(params, part, is_joint);
      MergeNorms(params, part, shared.state, [&] { records.Fetch(records.FirstBatch()); });
      if (part.is_last()) BarrierArrive(&ring.barriers->norms);
      SyncConsumers();
      if (!is_joint) LowerFlags(part, part.parts - 1, params.flags());
    }
    FinishItem<T, kJoint>(params, part, records, shared.state, shared.selection,
                          &ring.barriers->records);
  }
}

template <typename T, int kHeadSize, int kValueSize, bool kJoint>
__global__ void __launch_bounds__(kThreads, 1)
    CompressAttention(const __grid_constant__ Params params) {
  alignas(kSwizzle) extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Ring<T, kHeadSize, kValueSize> ring = {memory + sizeof(Shared), &shared.barriers};
  // The first warps have the sequences' lengths to wait for, the last ones begin with the rest.
  const int first_length = LoadFirstLength(params);
  InitRing(params, ring);
  if (threadIdx.x == kComputeThreads) PrefetchMaps(params.pools);
  if (threadIdx.x == 0) LowerOwnFlags(params);
  FindShare(params, first_length, shared.share);
  const WorkList work(params, shared.share);
  if (threadIdx.x / 32 >= kConsumers) {
    ShrinkRegisters<72>();
    const bool has_last = Load<T, kHeadSize, kValueSize>(params, ring, work);
    // The first of these threads has now asked for the share's last tiles.
    if (threadIdx.x == kComputeThreads) LetNextKernelBegin();
    if (has_last) {
      BarrierWait(&ring.barriers->norms, 0);
      const Part& last = shared.cut[0];
      FinishAttention<T>(params, last, kJoint && last.IsJoint(), shared.state,
                         &ring.barriers->records);
    }
  } else {
    GrowRegisters<216>();
    if (threadIdx.x < kWeightPairs) {
      shared.state.weights[threadIdx.x] = WeightPair(params, threadIdx.x);
    }
    SyncConsumers();
    Compute<T, kHeadSize, kValueSize, kJoint>(params, ring, work, shared);
  }
}

struct Kernel : KernelOf {
  int stage_bytes;
};
// Those for plans with joint items are kernels of their own: what they do more would make the
// others slower.
template <bool kJoint>
struct KernelFor : Kernel {};
template <typename T, int kHeadSize, int kValueSize, bool kJoint>
KernelFor<kJoint> MakeKernel(DataType dtype) {
  return {{{dtype, kHeadSize, kValueSize,
            reinterpret_cast<const void*>(&CompressAttention<T, kHeadSize, kValueSize, kJoint>)},
           Stage<T, kTile, kHeadSize, kValueSize>::kBytes}};
}
template <bool kJoint>
const KernelFor<kJoint> kKernels[] = {
    MakeKernel<__nv_bfloat16, 64, 64, kJoint>(DataType::kBFloat16),
    MakeKernel<__nv_bfloat16, 128, 128, kJoint>(DataType::kBFloat16),
    MakeKernel<__nv_bfloat16, kMaxHeadSize, kMaxValueSize, kJoint>(DataType::kBFloat16),
    MakeKernel<__half, 64, 64, kJoint>(DataType::kFloat16),
    MakeKernel<__half, 128, 128, kJoint>(DataType::kFloat16),
    MakeKernel<__half, kMaxHeadSize, kMaxValueSize, kJoint>(DataType::kFloat16),
    MakeKernel<float, kMaxHeadSize, kMaxValueSize, kJoint>(DataType::kFloat32),
};

// So many positions, rows or blocks can be counted in 32 bits, and twice as many still fit.
constexpr int64_t kMost = int64_t{1} << 30;

// Memory is kept busy if each multiprocessor waits for so many bytes of keys and values.
constexpr int kBusyBytes = 64 << 10;

// If records are no more bytes than this, the L2 cache writes them to memory in as little time as
// it takes to discard them.
constexpr int64_t kFewRecordBytes = 2 << 20;

const char* Refuses(const Problem& problem) {
  if (problem.capacity() > kMost || MaxEntries(problem) > kMost ||
      problem.num_pages * problem.page_size * problem.key_value_heads > 2 * kMost ||
      problem.rows > kMost) {
    return "more positions than the kernel can count";
  }
  return nullptr;
}

cudaError_t Launch(const Problem& problem, const Arrays& arrays, void* workspace,
                   int64_t workspace_bytes, cudaStream_t stream) {
  const Device* device = nullptr;
  if (cudaError_t error = FindDevice(kKernels<false>, &device); error != cudaSuccess) return error;

  Params params = {};
  params.problem = problem;
  params.arrays = arrays;
  params.plan =
      MakePlan(problem, device->multiprocessors < kMaxCtas ? device->multiprocessors : kMaxCtas);
  if (params.plan.bytes > workspace_bytes) return cudaErrorInvalidValue;
  if (params.plan.joint) {
    if (cudaError_t error = FindDevice(kKernels<true>, &device); error != cudaSuccess) return error;
  }
  params.workspace = static_cast<char*>(workspace);
  params.scale_log2 = problem.scale * 1.4426950408889634f;
  params.heads = static_cast<int32_t>(problem.heads);
  params.key_value_heads = static_cast<int32_t>(problem.key_value_heads);
  params.head_size = static_cast<int32_t>(problem.head_size);
  params.value_size = static_cast<int32_t>(problem.value_size);
  params.value_columns = static_cast<int32_t>(CeilDiv(problem.value_size, 4) * 4);
  while (1 << params.group_log2 < problem.group()) ++params.group_log2;
  while (1 << params.tokens_log2 < params.plan.tokens_per_chunk) ++params.tokens_log2;
  const Blocks& blocks = problem.blocks;
  params.block_positions = static_cast<int32_t>(blocks.strides_per_select_block());
  params.last_position = static_cast<int32_t>(blocks.LastPosition(0));
  params.first_block_rest = 2 * params.block_positions - 1 - params.last_position;
  params.taps = static_cast<int32_t>(blocks.num_taps());
  params.init_blocks = static_cast<int32_t>(std::min(problem.forced.first, kMost));
  params.local_blocks = static_cast<int32_t>(std::min(problem.forced.last, kMost));
  params.max_blocks = static_cast<int32_t>(problem.max_blocks());
  params.sequences = static_cast<int32_t>(problem.sequences);
  params.sequences_each = static_cast<int32_t>(CeilDiv(problem.sequences, kThreads));
  params.tokens = static_cast<int32_t>(problem.tokens);
  params.capacity = static_cast<int32_t>(problem.capacity());
  params.lengths_only = arrays.token_counts == nullptr && arrays.first_rows == nullptr &&
                        arrays.early_counts == nullptr && !blocks.aligned;
  params.items_each =
      problem.tokens > 0 ? static_cast<int32_t>(params.plan.items / problem.sequences) : 0;
  params.by_items_each = Divider::By(std::max(params.items_each, 1));
  params.page_size = static_cast<int32_t>(problem.page_size);
  params.by_page_size = Divider::By(params.page_size);
  params.by_block_positions = Divider::By(params.block_positions);
  params.by_select_block_size = Divider::By(static_cast<int>(blocks.select_block_size));
  // NumBlocks grows by one with every block_positions positions, first at `length` + 1.
  int64_t length = 1;
  while (blocks.NumBlocks(length + 1) == blocks.NumBlocks(1)) ++length;
  params.num_blocks_rest =
      static_cast<int32_t>(blocks.NumBlocks(length + 1) * params.block_positions - (length + 1));
  const Kernel& kernel = params.plan.joint
                             ? static_cast<const Kernel&>(ChooseKernel(kKernels<true>, problem))
                             : ChooseKernel(kKernels<false>, problem);
  params.pools = MakePools(problem, arrays, kernel, kTile, device->has_engine);
  params.aligned_query = IsAligned(arrays.query, problem.head_size, problem.dtype);
  params.by_record_rows = Divider::By(1 + params.plan.block_sums);
  const int room = device->shared_bytes - static_cast<int>(sizeof(Shared));
  if (room < kernel.stage_bytes) return cudaErrorInvalidConfiguration;
  // At least so many stages that memory is kept busy. More of them where the records of a whole
  // item leave room, unless an item has so many rows that each stage is work for longer anyway.
  const int64_t records =
      sizeof(float) * params.plan.whole_tiles * (params.plan.record_floats + kRecordGap);
  for (params.stages = 1; params.stages < kMaxStages;) {
    const int64_t rest = room - 2 * int64_t{params.stages} * kernel.stage_bytes;
    const bool busy = params.stages * kernel.stage_bytes >= kBusyBytes;
    if (rest < 0 || (busy && (rest < records || params.plan.rows > kRowTile))) break;
    params.stages *= 2;
  }
  params.ring_floats = room / static_cast<int>(sizeof(float));
  params.shared_floats =
      (room - params.stages * kernel.stage_bytes) / static_cast<int>(sizeof(float));

  // Each batch may begin with the last tile of the one before.
  params.batch_tiles =
      std::min(kMaxBatchTiles,
               params.ring_floats / 2 /
                   BatchTileFloats(static_cast<int>(problem.group()), params.plan.block_sums));
  if (params.batch_tiles < (params.taps > 1 ? 2 : 1)) return cudaErrorInvalidConfiguration;

  const int64_t tiles = CeilDiv(problem.capacity(), kTile) * params.plan.items;
  params.discards = tiles * params.plan.record_floats > kFewRecordBytes / 4;

  void* arguments[] = {&params};
  // Cooperative, so that a thread block that waits for others cannot keep them from running.
  return cudaLaunchCooperativeKernel(kernel.function, dim3(params.plan.ctas), dim3(kThreads),
                                     arguments, device->shared_bytes, stream);
}

}  // namespace jax_nsa::cuda::compressed
