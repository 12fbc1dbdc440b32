// Where the records of tiles lie (compress_attention_plan.h), which are kept until the rows'
// greatest scores and totals are known for the whole item.
//
// Writing all of them to the device's memory would cost a tenth of the time that loading keys and
// values takes. So as many as there is room for stay in shared memory, if the item is not cut. The
// others go through the workspace and are discarded from the L2 cache once read, unless they are
// few.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_RECORDS_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_RECORDS_CUH_

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// Tiles whose block sums of one token are added up at a time.
struct Batch {
  int number;
  int token;       // of the chunk
  int first, end;  // tiles
  int fetched;     // the first tile that is fetched: first - 1 where a block lies in two batches
};

// The records of one item.
class Records {
 public:
  // `shared` has room for `shared_floats`. Where the item is cut, it is read in batches through
  // this room, or the part is if the item is joint; where it is not, the room holds its first
  // tiles' records.
  __device__ Records(const Params& params, const Part& part, bool is_joint, float* shared,
                     int shared_floats)
      : params_(params),
        part_(part),
        shared_(shared),
        rows_(RecordRows(part.rows(params))),
        tile_floats_(RecordFloats(rows_, params.plan.block_sums)),
        shared_tiles_(part.is_cut() ? 0 : Quotient(shared_floats, tile_floats_ + kRecordGap)),
        begin_(is_joint ? part.begin : 0),
        end_(is_joint ? part.end : part.sequence.tiles) {}

  // Of a tile of this thread block's part.
  __device__ float* Own(int tile) const { return In(part_.own_region(), tile - part_.begin); }

  // The batches of an item, or of the part if the item is joint, token by token. An item that is
  // not cut is a batch for each token.
  __device__ Batch FirstBatch() const { return BatchFrom(0, 0, begin_); }
  __device__ Batch After(const Batch& batch) const {
    const bool more = batch.end < end_;
    return BatchFrom(batch.number + 1, more ? batch.token : batch.token + 1,
                     more ? batch.end : begin_);
  }

  // Begins to fetch a cut item's batch: the rows of its token. Two batches fit at a time. By all
  // consumers.
  __device__ void Fetch(const Batch& batch) const {
    const int thread = ThreadIndex(), first = batch.fetched, end = batch.end;
    const int quads_log2 = max(params_.group_log2, 2) - 2, rows_each = 1 + params_.plan.block_sums;
    const int first_part = part_.PartOf(first), last_part = part_.PartOf(end - 1);
    // So many lanes for each part: a warp, or more while there are fewer parts than warps.
    const int parts = last_part - first_part + 1;
    const int lanes_log2 = kComputeThreadsLog2 - (parts > 4 ? 3 : parts > 2 ? 2 : parts - 1);
    const int lane = thread & ((1 << lanes_log2) - 1);
    const int quad = lane & ((1 << quads_log2) - 1);
    const int pitch = BatchTileFloats(params_.group(), params_.plan.block_sums);
    const uint32_t to = SharedAddress(In(batch, first) + 4 * quad);
#pragma unroll 1
    for (int part = first_part + (thread >> lanes_log2); part <= last_part;
         part += kComputeThreads >> lanes_log2) {
      const int part_begin = part_.PartBegin(part);
      const int begin = max(first, part_begin), last = min(end, part_.PartBegin(part + 1));
      const float* from = params_.tiles(part_.Region(part)) + (begin - part_begin) * tile_floats_ +
                          FirstRow(batch.token) + 4 * quad;
      const uint32_t place = to + 4 * (begin - first) * pitch;
      const int rows = (last - begin) * rows_each;
#pragma unroll 4
      for (int i = lane >> quads_log2; i < rows; i += 1 << (lanes_log2 - quads_log2)) {
        const int tile = params_.by_record_rows(i), row = i - tile * rows_each;
        CopyAsync16(place + 4 * (tile * pitch + (row * 4 << quads_log2)), from + i * rows_);
      }
    }
    CommitCopies();
  }

  // Where a tile's record begins for a batch's token: its rows, or those beside them that share 16
  // bytes. Of a cut item, the tile is one of the batch's, which has come.
  __device__ const float* Read(const Batch& batch, int tile) const {
    if (!part_.is_cut()) return Own(tile) + FirstRow(batch.token);
    return In(batch, tile);
  }
  // The distance from what Read returns, the maxima, to the first block's sums, and from one
  // block's to the next one's.
  __device__ int block_floats() const {
    return part_.is_cut() ? BatchRows(params_.group()) : rows_;
  }

  // Gives up all of them, once read, by `threads` threads of which this is one.
  __device__ void Discard(int thread, int threads) const {
#pragma unroll 1
    for (int part = 0; part < part_.parts; ++part) {
      const int tiles = part_.PartBegin(part + 1) - part_.PartBegin(part);
      if (tiles <= shared_tiles_) continue;
      float* records = params_.tiles(part_.Region(part));
      const auto at = [&](int tile) {
        return reinterpret_cast<uintptr_t>(records + int64_t{tile} * tile_floats_);
      };
      // Whole lines only: what lies beside may be in use.
      const uintptr_t first = (at(shared_tiles_) + 127) / 128 * 128, end = at(tiles);
#pragma unroll 1
      for (uintptr_t line = first + 128 * thread; line + 128 <= end; line += 128 * threads) {
        DiscardLine(reinterpret_cast<char*>(line));
      }
    }
  }

 private:
  __device__ Batch BatchFrom(int number, int token, int first) const {
    if (!part_.is_cut()) return {number, token, begin_, end_, begin_};
    const int fetched = first > 0 && params_.taps > 1 ? first - 1 : first;
    const int end = min(fetched + params_.batch_tiles, end_);
    return {number, token, first, end, fetched};
  }
  // Where a tile of a batch lies.
  __device__ float* In(const Batch& batch, int tile) const {
    const int index = (batch.number & 1) * params_.batch_tiles + tile - batch.fetched;
    return shared_ + index * BatchTileFloats(params_.group(), params_.plan.block_sums);
  }
  __device__ int FirstRow(int token) const { return token * params_.group() & ~3; }

  __device__ float* In(int region, int tile) const {
    if (tile < shared_tiles_) return shared_ + tile * (tile_floats_ + kRecordGap);
    return params_.tiles(region) + int64_t{tile} * tile_floats_;
  }

  const Params& params_;
  const Part& part_;
  float* const shared_;
  const int rows_;
  const int tile_floats_;
  const int shared_tiles_;
  const int begin_, end_;  // tiles of which there are batches
};

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_RECORDS_CUH_
