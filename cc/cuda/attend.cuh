// What a warp of an attention kernel does with a tile of positions: scores, softmax and sums of
// values of its 16 rows. Lane 4g + t holds of any [16, 8n] result the rows g and g + 8, columns
// 8j + 2t and 8j + 2t + 1 for each j < n, as the matrix instruction leaves them.

#ifndef JAX_NSA_CUDA_ATTEND_CUH_
#define JAX_NSA_CUDA_ATTEND_CUH_

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "cuda/results.cuh"
#include "cuda/tiles.cuh"

namespace jax_nsa::cuda {

// p[16 rows, 8 kN positions] = query keys^T, by the matrix instruction. query(s, a) gives columns
// 16s to 16s + 15 of the rows.
template <typename Stage, int kN, typename Query>
__device__ inline void Scores(const char* keys, Query query, float (&p)[kN][4]) {
  constexpr int kSteps = Stage::kHeadSize / 16;
  // Where positions are few, even and odd steps have sums of their own, so that fewer wait for one
  // another.
  constexpr int kChains = kN < 4 ? 2 : 1;
  float sums[kChains][kN][4];
#pragma unroll
  for (int i = 0; i < kChains * kN * 4; ++i) sums[i / (4 * kN)][i / 4 % kN][i % 4] = 0.0f;
  const int lane = threadIdx.x % 32;
  // Of four matrices: two times 8 positions, each with two times 8 columns. Those of the next step
  // are fetched while this one's multiply.
  using Keys = typename Stage::Keys;
  const uint32_t row = SharedAddress(keys) + Keys::Place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t k[2][kN / 2][4];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) LoadMatrices(k[0][i], row + 16 * i * Keys::kRowBytes);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < kN / 2 && s + 1 < kSteps; ++i) {
      LoadMatrices(k[(s + 1) % 2][i], Keys::After(row, 2 * (s + 1)) + 16 * i * Keys::kRowBytes);
    }
    uint32_t a[4];
    query(s, a);
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const uint32_t (&b)[4] = k[s % 2][i];
      MultiplyAdd<typename Stage::Element>(sums[s % kChains][2 * i], a, b[0], b[1]);
      MultiplyAdd<typename Stage::Element>(sums[s % kChains][2 * i + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < kN * 4; ++i) {
    p[i / 4][i % 4] = sums[0][i / 4][i % 4];
    if constexpr (kChains == 2) p[i / 4][i % 4] += sums[1][i / 4][i % 4];
  }
}

// The same of float32, by ordinary arithmetic.
template <typename Stage, int kN>
__device__ inline void PlainScores(const char* keys, const float* const (&query)[2], int size,
                                   float (&p)[kN][4]) {
#pragma unroll
  for (int i = 0; i < kN * 4; ++i) p[i / 4][i % 4] = 0.0f;
  const int first = 2 * (threadIdx.x % 4);  // of this lane's positions
#pragma unroll 1
  for (int d = 0; d < size; ++d) {
    const float q[2] = {query[0][d], query[1][d]};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float k = *Stage::Keys::At(keys, 8 * n + first + c, d);
        p[n][c] += q[0] * k;
        p[n][2 + c] += q[1] * k;
      }
    }
  }
}

// Attention of a warp's 16 rows to the tiles so far, not yet divided by the totals.
template <typename Stage>
struct AttendedRows {
  using T = typename Stage::Element;
  static constexpr int kColumns = Stage::kValueSize / 8;
  // Taken from a difference, so that the greatest exponential is a power of two, and sums of equal
  // ones exact.
  static constexpr float kHeadroom =
      Headroom(std::is_same_v<T, __half> ? DataType::kFloat16 : DataType::kFloat32);

  float sums[kColumns][4];  // exponentials times values
  float maxima[2];          // of the scaled scores, in powers of two
  float totals[2];          // of the exponentials of this lane's columns

  __device__ AttendedRows() {
#pragma unroll
    for (int i = 0; i < kColumns * 4; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maxima[r] = -INFINITY;
      totals[r] = 0.0f;
    }
  }

  // Makes of scores p their exponentials, relative to the maxima, and 0 where counts(half,
  // position) is false, of rows g and g + 8.
  template <int kN, typename Counts>
  __device__ void Exponentiate(float (&p)[kN][4], float scale, Counts counts) {
    float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int position = 8 * n + 2 * (threadIdx.x % 4) + c % 2;
        p[n][c] = counts(c / 2, position) ? p[n][c] * scale : -INFINITY;
        peak[c / 2] = fmaxf(peak[c / 2], p[n][c]);
      }
    }
    float shrink[2];
    bool rescales = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 2));
      const float before = maxima[r];
      maxima[r] = fmaxf(before, peak[r]);
      peak[r] = maxima[r] == -INFINITY ? 0.0f : maxima[r];
      shrink[r] = Exp2(before - peak[r]);
      totals[r] *= shrink[r];
      rescales |= shrink[r] != 1.0f && before != -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        p[n][c] = Exp2(p[n][c] - peak[c / 2] - kHeadroom);
        totals[c / 2] += p[n][c];
      }
    }
    // The maxima settle after a few tiles; before the first one there is nothing to rescale.
    if (__any_sync(~0u, rescales)) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[n][c] *= shrink[c / 2];
      }
    }
  }

  // sums += p[16 rows, 8 kN positions] values, of positions in [begin, end). What lies at others in
  // shared memory may be anything: a probability of zero must not meet a NaN.
  template <int kN>
  __device__ void AddValues(const char* values, const float (&p)[kN][4], int begin, int end,
                            int value_size) {
    if constexpr (std::is_same_v<T, float>) {
      AddPlain(values, p, begin, end, value_size);
    } else if (begin <= 0 && end >= 8 * kN) {
      AddProducts(values, p, value_size, [](int, uint32_t pair) { return pair; });
    } else {
      const int first = 2 * (threadIdx.x % 4);  // of this lane's positions, which come in pairs
      uint32_t masks[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int low = 8 * n + first, high = low + 1;
        masks[n] = (low >= begin && low < end ? 0xffffu : 0u) |
                   (high >= begin && high < end ? 0xffff0000u : 0u);
      }
      AddProducts(values, p, value_size, [&](int n, uint32_t pair) { return pair & masks[n]; });
    }
  }

 private:
  // By the matrix instruction. masked(n, pair) is what counts of a pair of values, one above the
  // other, of positions 8n to 8n + 7.
  template <int kN, typename Masked>
  __device__ void AddProducts(const char* values, const float (&p)[kN][4], int value_size,
                              Masked masked) {
    const int lane = threadIdx.x % 32;
    // Of four matrices: two times 8 positions of 8 columns, then of the next 8. Those of the next
    // columns are fetched while these multiply.
    using Values = typename Stage::Values;
    const uint32_t row = SharedAddress(values) + Values::Place(lane % 16, lane / 16);
#pragma unroll
    for (int half = 0; half < kN / 2; ++half) {
      const float (&low)[4] = p[2 * half];
      const float (&high)[4] = p[2 * half + 1];
      const uint32_t a[4] = {Pack<T>(low[0], low[1]), Pack<T>(low[2], low[3]),
                             Pack<T>(high[0], high[1]), Pack<T>(high[2], high[3])};
      const uint32_t half_row = row + 16 * half * Values::kRowBytes;
      const auto multiply = [&](int v, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
        MultiplyAdd<T>(sums[v], a, masked(2 * half, b[0]), masked(2 * half + 1, b[1]));
        MultiplyAdd<T>(sums[v + 1], a, masked(2 * half, b[2]), masked(2 * half + 1, b[3]));
      };
      uint32_t b[2][4];
      LoadMatricesTransposed(b[0], half_row);
#pragma unroll
      for (int v = 0; v < kColumns; v += 2) {
        if (v + 2 < kColumns) {
          LoadMatricesTransposed(b[v / 2 % 2 ^ 1], Values::After(half_row, v + 2));
        }
        multiply(v, a, b[v / 2 % 2]);
      }
      if (value_size <= 16) {
        // Over few columns the errors of rounded p do not average out: adds what it was rounded by.
        const auto rest = [](uint32_t pair, float low, float high) {
          uint16_t halves[2] = {static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
          return Pack<T>(low - static_cast<float>(reinterpret_cast<const T&>(halves[0])),
                         high - static_cast<float>(reinterpret_cast<const T&>(halves[1])));
        };
        const uint32_t rests[4] = {rest(a[0], low[0], low[1]), rest(a[1], low[2], low[3]),
                                   rest(a[2], high[0], high[1]), rest(a[3], high[2], high[3])};
        LoadMatricesTransposed(b[0], half_row);
        multiply(0, rests, b[0]);
      }
    }
  }

  template <int kN>
  __device__ void AddPlain(const char* values, const float (&p)[kN][4], int begin, int end,
                           int value_size) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll 1
      for (int owner = 0; owner < 4; ++owner) {  // the lane, of four, that has these positions
        const int source = (lane & ~3) | owner;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int position = 8 * n + 2 * owner + c;
          const float p0 = __shfl_sync(~0u, p[n][c], source);
          const float p1 = __shfl_sync(~0u, p[n][2 + c], source);
          if (position < begin || position >= end) continue;
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            if (8 * v >= value_size) break;
            const float2 pair = *reinterpret_cast<const float2*>(
                Stage::Values::At(values, position, 8 * v + 2 * (lane % 4)));
            sums[v][0] += p0 * pair.x;
            sums[v][1] += p0 * pair.y;
            sums[v][2] += p1 * pair.x;
            sums[v][3] += p1 * pair.y;
          }
        }
      }
    }
  }
};

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_ATTEND_CUH_
