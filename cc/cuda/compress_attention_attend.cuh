// What one warp does with a tile of 32 positions: attention (attend.cuh) and block sums of its 16
// rows.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_

#include <type_traits>

#include "cuda/attend.cuh"
#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_pipeline.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda::compressed {

// The weights of the block sums, as the matrix instruction takes them: entry o + kWeightsBefore
// has those at offsets o and o - 1 as a pair of bfloat16. Offsets are those of Blocks::Weight.
constexpr int kWeightsBefore = kTile, kWeightPairs = 3 * kTile;

__device__ inline uint32_t WeightPair(const Params& params, int entry) {
  const Blocks& blocks = params.problem.blocks;
  const auto weight = [&](int offset) {
    const bool counts = 0 <= offset && offset < params.taps;
    return counts ? static_cast<float>(static_cast<int>(blocks.Weight(offset))) : 0.0f;
  };
  return Pack<__nv_bfloat16>(weight(entry - kWeightsBefore), weight(entry - kWeightsBefore - 1));
}

// One warp's 16 rows while it goes through the tiles of a part.
template <typename T, int kHeadSize, int kValueSize>
class WarpRows : public AttendedRows<Stage<T, kTile, kHeadSize, kValueSize>> {
 public:
  static constexpr bool kPlain = std::is_same_v<T, float>;
  using Stage = cuda::Stage<T, kTile, kHeadSize, kValueSize>;
  static constexpr int kSteps = kHeadSize / 16;

  // `first_row` of the rows of the part's chunk.
  __device__ WarpRows(const Params& params, const Part& part, int first_row)
      : params_(params), first_row_(first_row), record_rows_(RecordRows(part.rows(params))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + lane() / 4 + 8 * r;
      const bool exists = row < part.rows(params);
      const int token = part.first_token + (exists ? row >> params.group_log2 : 0);
      visible_[r] = exists ? part.sequence.Visible(token) : 0;
      const int64_t query = int64_t{part.sequence.first_row + token} * params.heads +
                            (part.head << params.group_log2) +
                            (exists ? row & (params.group() - 1) : 0);
      query_row_[r] = static_cast<const T*>(params.arrays.query) + query * params.head_size;
    }
    if constexpr (!kPlain) LoadQuery();
  }

  // Adds a tile's positions, from `first_position` on and as far as the sequence goes. `record` is
  // the tile's (compress_attention_records.cuh).
  __device__ void Attend(const Stage& stage, int first_position, int length,
                         const uint32_t* weights, uint64_t* release, int releases, float* record) {
    float p[4][4];  // scores, then their exponentials
    if constexpr (kPlain) {
      PlainScores<Stage>(stage.keys(), query_row_, params_.head_size, p);
    } else {
      const auto query = [&](int s, uint32_t (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = query_[s][i];
      };
      Scores<Stage>(stage.keys(), query, p);
    }
    this->Exponentiate(p, params_.scale_log2, [&](int half, int position) {
      return first_position + position < visible_[half];
    });
    this->AddValues(stage.values(), p, 0, length - first_position, params_.value_size);
    BarrierArrive(release, releases);
    StoreBlockSums(p, first_position, weights, record);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // Keeps the query rows in registers, zero beyond their ends.
  __device__ void LoadQuery() {
    const int column = 2 * (lane() % 4);
    const T* rows[2] = {query_row_[0] + column, query_row_[1] + column};
    if (params_.aligned_query && params_.head_size == kHeadSize) {
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i) {
        query_[i / 4][i % 4] = *reinterpret_cast<const uint32_t*>(rows[i % 2] + 8 * (i / 2));
      }
    } else {
      const int rest = params_.head_size - column;  // columns from there on
#pragma unroll
      for (int i = 0; i < 4 * kSteps; ++i) {
        const int row = i % 2, d = 8 * (i / 2);
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(rows[row] + d);
        query_[i / 4][i % 4] =
            (d < rest ? pair[0] : 0) | (d + 1 < rest ? uint32_t{pair[1]} << 16 : 0);
      }
    }
  }

  // Stores the maxima and, for each block that the tile adds to, p weights: a product with a banded
  // matrix. Its weights are small integers, which bfloat16 holds exactly; p is split into enough
  // bfloat16 terms for the sums to be as good as float32's.
  __device__ void StoreBlockSums(const float (&p)[4][4], int first_position,
                                 const uint32_t* weights, float* record) {
    constexpr int kTerms = kPlain ? 3 : 2;
    uint32_t terms[2][kTerms][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float low = p[2 * half + i / 2][i % 2 * 2], high = p[2 * half + i / 2][i % 2 * 2 + 1];
#pragma unroll
        for (int term = 0; term < kTerms; ++term) {
          const uint32_t pair = Pack<__nv_bfloat16>(low, high);
          low -= __uint_as_float(pair << 16);
          high -= __uint_as_float(pair & 0xffff0000u);
          terms[half][term][i] = pair;
        }
      }
    }
    const int g = lane() / 4, t = lane() % 4;
    float* row = record + first_row_ + g;
    const bool exists[2] = {first_row_ + g < record_rows_, first_row_ + g + 8 < record_rows_};
    if (t == 0) {
      if (exists[0]) row[0] = this->maxima[0];
      if (exists[1]) row[8] = this->maxima[1];
    }
    const int first_block = params_.FirstBlock(first_position);
#pragma unroll 1
    for (int next = 0; next < params_.plan.block_sums; next += 8) {
      const int offset = params_.LastPosition(first_block + next + g) - first_position;
      const uint32_t* pair = weights + kWeightsBefore + offset - 2 * t;
      float block[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t b0 = pair[-16 * half], b1 = pair[-16 * half - 8];
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) {
          MultiplyAdd<__nv_bfloat16>(block, terms[half][term], b0, b1);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int own = next + 2 * t + c;
        if (own < params_.plan.block_sums) {
          if (exists[0]) row[(1 + own) * record_rows_] = block[c];
          if (exists[1]) row[(1 + own) * record_rows_ + 8] = block[2 + c];
        }
      }
    }
  }

  const Params& params_;
  const int first_row_;
  const int record_rows_;
  int visible_[2];
  const T* query_row_[2];
  uint32_t query_[kPlain ? 1 : kSteps][4];
};

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_
