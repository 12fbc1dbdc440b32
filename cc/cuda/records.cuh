// What a tile leaves behind until its item's norms are known: its record, the maxima [rows] that
// its window sums [slots, rows] are relative to (attend.cuh), where `rows` are RecordRows of the
// item's.
//
// To write all of them to the device's memory would cost a tenth of the time of loading keys and
// values. Of an item that one thread block attends to, the first tiles' records stay in shared
// memory. The others, and those of items that several thread blocks have in part, go through the
// workspace, and are discarded once read, unless they are few.

#ifndef JAX_NSA_CUDA_RECORDS_CUH_
#define JAX_NSA_CUDA_RECORDS_CUH_

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/work.cuh"

namespace jax_nsa::cuda {

// Tiles of a cut item whose window sums are added up at a time, at most.
constexpr int kBatchTiles = 128;

// The records of one item.
class Records {
 public:
  // `shared` has room for `shared_floats`. Where the item is cut, it is read in batches through
  // this room; where it is not, the room holds its first tiles' records.
  __device__ Records(const Params& params, const Part& part, float* shared, int shared_floats)
      : params_(params),
        part_(part),
        shared_(shared),
        rows_(RecordRows(part.rows(params))),
        tile_floats_(RecordFloats(rows_, params.plan.slots)),
        shared_tiles_(part.is_cut() ? 0 : Quotient(shared_floats, tile_floats_ + kRecordGap)),
        batch_floats_(shared_floats / 2 & ~3) {}

  // Of a tile of this thread block's part.
  __device__ float* Own(int tile) const { return In(part_.own_region(), tile - part_.begin); }

  // Of any tile, once all parts are there.
  __device__ const float* Of(int tile) const {
    if (!part_.is_cut()) return Own(tile);
    const int part = part_.PartOf(tile);
    return In(part_.Region(part), tile - part_.PartBegin(part));
  }

  // Tiles of a batch, at most: all that there are, if the item is not cut.
  __device__ int BatchTiles() const {
    if (!part_.is_cut()) return part_.sequence.tiles;
    return min(kBatchTiles, Quotient(batch_floats_, BatchTileFloats()));
  }

  // Begins to fetch a cut item's batch: of the records of tiles [first, end), the rows of `token`.
  // Two batches fit at a time. By all consumers.
  __device__ void Fetch(int batch, int token, int first, int end) const {
    const int thread = ThreadIndex();
    const int quads_log2 = max(params_.group_log2, 2) - 2, rows_each = 1 + params_.plan.slots;
    const int first_part = part_.PartOf(first), last_part = part_.PartOf(end - 1);
    // So many lanes for each part: a warp, or more while there are fewer parts than warps.
    const int parts = last_part - first_part + 1;
    const int lanes_log2 = kComputeThreadsLog2 - (parts > 4 ? 3 : parts > 2 ? 2 : parts - 1);
    const int lane = thread & ((1 << lanes_log2) - 1);
    const int quad = lane & ((1 << quads_log2) - 1), pitch = BatchTileFloats();
    const uint32_t to = SharedAddress(shared_ + (batch & 1) * batch_floats_ + 4 * quad);
#pragma unroll 1
    for (int part = first_part + (thread >> lanes_log2); part <= last_part;
         part += kComputeThreads >> lanes_log2) {
      const int part_begin = part_.PartBegin(part);
      const int begin = max(first, part_begin), last = min(end, part_.PartBegin(part + 1));
      const float* from = params_.tiles(part_.Region(part)) + (begin - part_begin) * tile_floats_ +
                          FirstRow(token) + 4 * quad;
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

  // Where a tile's record begins for a token: its rows, or those beside them that share 16 bytes.
  // Of a cut item, the tile is one of the batch that begins with tile `first` and has come.
  __device__ const float* Read(int batch, int first, int token, int tile) const {
    if (!part_.is_cut()) return Own(tile) + FirstRow(token);
    return shared_ + (batch & 1) * batch_floats_ + (tile - first) * BatchTileFloats();
  }
  // From its maxima to its first slot's sums, and from there to the next slot's.
  __device__ int slot_floats() const { return part_.is_cut() ? Width() : rows_; }

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
  // Rows of a batch's records: a token's, and those beside it that share 16 bytes.
  __device__ int Width() const { return max(params_.group(), 4); }
  __device__ int BatchTileFloats() const {
    return RecordFloats(Width(), params_.plan.slots) + kRecordGap;
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
  const int batch_floats_;
};

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_RECORDS_CUH_
