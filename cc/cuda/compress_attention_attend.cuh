// What one warp does with a tile of 32 positions: scores, softmax, attention and block sums of its
// 16 rows. Lane 4g + t holds of any [16, 8n] result the rows g and g + 8, columns 8j + 2t and
// 8j + 2t + 1 for each j < n, as the matrix instruction leaves them.

#ifndef JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_
#define JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_

#include <cmath>
#include <type_traits>

#include "cuda/compress_attention_params.cuh"
#include "cuda/compress_attention_pipeline.cuh"
#include "cuda/compress_attention_work.cuh"
#include "cuda/ptx.cuh"

namespace jax_nsa::cuda {

// The weights of the block sums, as the matrix instruction takes them: entry o + kWeightsBefore
// has those at offsets o and o - 1 as a pair of bfloat16. Offsets are those of Blocks::Weight.
constexpr int kWeightsBefore = kTile, kWeightPairs = 3 * kTile;

__device__ inline uint32_t WeightPair(const Params& params, int entry) {
  const Blocks& window = params.problem.blocks;
  const auto weight = [&](int offset) {
    const bool counts = 0 <= offset && offset < params.taps;
    return counts ? static_cast<float>(static_cast<int>(window.Weight(offset))) : 0.0f;
  };
  return Pack<__nv_bfloat16>(weight(entry - kWeightsBefore), weight(entry - kWeightsBefore - 1));
}

// One warp's 16 rows while it goes through the tiles of a part.
template <typename T, int kHeadSize, int kValueSize>
class WarpRows {
 public:
  static constexpr bool kPlain = std::is_same_v<T, float>;
  using Stage = cuda::Stage<T, kHeadSize, kValueSize>;
  static constexpr int kSteps = kHeadSize / 16, kColumns = kValueSize / 8;

  float sums[kColumns][4];  // exponentials times values
  float maxima[2];          // of the scaled scores, in powers of two
  float totals[2];          // of the exponentials of this lane's columns

  // `first_row` of the rows of the part's chunk.
  __device__ WarpRows(const Params& params, const Part& part, int first_row)
      : params_(params), first_row_(first_row), record_rows_(RecordRows(part.rows(params))) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (float& sum : sums[n]) sum = 0.0f;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maxima[r] = -INFINITY;
      totals[r] = 0.0f;
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

  // Adds a tile's positions, from `first_position` on. `record` is the tile's
  // (compress_attention_records.cuh).
  __device__ void Attend(const Stage& stage, int first_position, const uint32_t* weights,
                         uint64_t* release, int releases, float* record) {
    float p[4][4];  // scores, then their exponentials
    Scores(stage.keys(), p);
    const float scale = params_.scale_log2;
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = first_position + 8 * n + 2 * (lane() % 4) + c % 2;
        p[n][c] = position < visible_[c / 2] ? p[n][c] * scale : -INFINITY;
        peak[c / 2] = fmaxf(peak[c / 2], p[n][c]);
      }
    }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 2));
      const float before = maxima[r];
      maxima[r] = fmaxf(before, peak[r]);
      peak[r] = maxima[r] == -INFINITY ? 0.0f : maxima[r];
      shrink[r] = Exp2(before - peak[r]);
      totals[r] *= shrink[r];
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[n][c] = Exp2(p[n][c] - peak[c / 2]);
        totals[c / 2] += p[n][c];
      }
    }
    // The maxima settle after a few tiles.
    if (__any_sync(~0u, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[n][c] *= shrink[c / 2];
      }
    }
    AddValues(stage.values(), p);
    BarrierArrive(release, releases);
    StoreBlockSums(p, first_position, weights, record);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // Keeps the query rows in registers, zero beyond their ends.
  __device__ void LoadQuery() {
    const int column = 2 * (lane() % 4);
    const T* rows[2] = {query_row_[0] + column, query_row_[1] + column};
    if (params_.aligned_rows && params_.head_size == kHeadSize) {
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

  // p[16 rows, 32 positions] = query keys^T
  __device__ void Scores(const char* keys, float (&p)[4][4]) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (float& score : p[n]) score = 0.0f;
    }
    if constexpr (kPlain) {
      const char* row = keys + 2 * (lane() % 4) * Stage::kKeyPitch;
#pragma unroll 1
      for (int d = 0; d < params_.head_size; ++d) {
        const float q[2] = {query_row_[0][d], query_row_[1][d]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float k = reinterpret_cast<const float*>(row + (8 * n + c) * Stage::kKeyPitch)[d];
            p[n][c] += q[0] * k;
            p[n][2 + c] += q[1] * k;
          }
        }
      }
    } else {
      // Of four matrices: two times 8 positions, each with two times 8 columns. Those of the next
      // step are fetched while this one's multiply.
      const uint32_t row = SharedAddress(keys) + (lane() % 8 + lane() / 16 * 8) * Stage::kKeyPitch +
                           lane() / 8 % 2 * 16;
      const uint32_t rows[2] = {row, row + 16 * Stage::kKeyPitch};
      uint32_t k[2][2][4];
      LoadMatrices(k[0][0], rows[0]);
      LoadMatrices(k[0][1], rows[1]);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int half = 0; half < 2 && s + 1 < kSteps; ++half) {
          LoadMatrices(k[(s + 1) % 2][half], rows[half] + 32 * (s + 1));
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          MultiplyAdd<T>(p[2 * half], query_[s], k[s % 2][half][0], k[s % 2][half][1]);
          MultiplyAdd<T>(p[2 * half + 1], query_[s], k[s % 2][half][2], k[s % 2][half][3]);
        }
      }
    }
  }

  // sums[16 rows, kValueSize] += p[16 rows, 32 positions] values
  __device__ void AddValues(const char* values, const float (&p)[4][4]) {
    if constexpr (kPlain) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll 1
        for (int owner = 0; owner < 4; ++owner) {  // the lane, of four, that has these positions
          const int source = (lane() & ~3) | owner;
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float p0 = __shfl_sync(~0u, p[n][c], source);
            const float p1 = __shfl_sync(~0u, p[n][2 + c], source);
            const float* row = reinterpret_cast<const float*>(values + (8 * n + 2 * owner + c) *
                                                                           Stage::kValuePitch);
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              if (8 * v >= params_.value_size) break;
              const float2 pair = *reinterpret_cast<const float2*>(row + 8 * v + 2 * (lane() % 4));
              sums[v][0] += p0 * pair.x;
              sums[v][1] += p0 * pair.y;
              sums[v][2] += p1 * pair.x;
              sums[v][3] += p1 * pair.y;
            }
          }
        }
      }
    } else {
      // Of four matrices: two times 8 positions of 8 columns, then of the next 8.
      const uint32_t row =
          SharedAddress(values) + lane() % 16 * Stage::kValuePitch + lane() / 16 * 16;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&low)[4] = p[2 * half];
        const float (&high)[4] = p[2 * half + 1];
        const uint32_t a[4] = {Pack<T>(low[0], low[1]), Pack<T>(low[2], low[3]),
                               Pack<T>(high[0], high[1]), Pack<T>(high[2], high[3])};
        const uint32_t half_row = row + 16 * half * Stage::kValuePitch;
        uint32_t b[2][4];
        LoadMatricesTransposed(b[0], half_row);
#pragma unroll
        for (int v = 0; v < kColumns; v += 2) {
          if (v + 2 < kColumns) LoadMatricesTransposed(b[v / 2 % 2 ^ 1], half_row + 16 * (v + 2));
          MultiplyAdd<T>(sums[v], a, b[v / 2 % 2][0], b[v / 2 % 2][1]);
          MultiplyAdd<T>(sums[v + 1], a, b[v / 2 % 2][2], b[v / 2 % 2][3]);
        }
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
      if (exists[0]) row[0] = maxima[0];
      if (exists[1]) row[8] = maxima[1];
    }
    const int first_block = params_.FirstBlock(first_position);
#pragma unroll 1
    for (int slots = 0; slots < params_.plan.slots; slots += 8) {
      const int offset = params_.LastPosition(first_block + slots + g) - first_position;
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
        const int slot = slots + 2 * t + c;
        if (slot < params_.plan.slots) {
          if (exists[0]) row[(1 + slot) * record_rows_] = block[c];
          if (exists[1]) row[(1 + slot) * record_rows_ + 8] = block[2 + c];
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

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_COMPRESS_ATTENTION_ATTEND_CUH_
