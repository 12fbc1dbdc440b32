// What a tile leaves behind until its item's norms are known: its record, the maxima [rows] that
// its window sums [slots, rows] are relative to (attend.cuh), where `rows` are RecordRows of the
// item's.
//
// To write all of them to the device's memory would cost a tenth of the time of loading keys and
// values. Of an item that one thread block attends to, the first tiles' records stay in shared
// memory. The others, and those of items that several thread blocks have in part, go through the
// workspace, and are discarded once read.

#ifndef JAX_NSA_CUDA_RECORDS_CUH_
#define JAX_NSA_CUDA_RECORDS_CUH_

#include "cuda/params.cuh"
#include "cuda/ptx.cuh"
#include "cuda/work.cuh"

namespace jax_nsa::cuda {

// The records of one item, by the consumer warps.
class Records {
 public:
  // `shared` has room for params.shared_floats.
  __device__ Records(const Params& params, const Part& part, float* shared)
      : params_(params),
        part_(part),
        shared_(shared),
        tile_floats_(RecordRows(part.rows(params)) * (1 + params.plan.slots)),
        shared_tiles_(part.is_cut() ? 0 : Quotient(params.shared_floats, tile_floats_)) {}

  // Of a tile of this thread block's part.
  __device__ float* Own(int tile) const { return In(part_.own_region(), tile - part_.begin); }

  // Of any tile, once all parts are there.
  __device__ const float* Of(int tile) const {
    const int part = part_.PartOf(tile);
    return In(part_.Region(part), tile - part_.PartBegin(part));
  }

  // Gives up all of them, once read.
  __device__ void Discard() const {
#pragma unroll 1
    for (int part = 0; part < part_.parts; ++part) {
      const int tiles = part_.PartBegin(part + 1) - part_.PartBegin(part);
      float* records = params_.tiles(part_.Region(part));
      const auto at = [&](int tile) {
        return reinterpret_cast<uintptr_t>(records + int64_t{tile} * tile_floats_);
      };
      // Whole lines only: what lies beside may be in use.
      const uintptr_t first = (at(min(shared_tiles_, tiles)) + 127) / 128 * 128, end = at(tiles);
#pragma unroll 1
      for (uintptr_t line = first + 128 * ThreadIndex(); line + 128 <= end;
           line += 128 * kComputeThreads) {
        DiscardLine(reinterpret_cast<char*>(line));
      }
    }
  }

 private:
  __device__ float* In(int region, int tile) const {
    return (tile < shared_tiles_ ? shared_ : params_.tiles(region)) + int64_t{tile} * tile_floats_;
  }

  const Params& params_;
  const Part& part_;
  float* const shared_;
  const int tile_floats_;
  const int shared_tiles_;
};

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_RECORDS_CUH_
