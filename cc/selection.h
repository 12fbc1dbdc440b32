// Which select blocks a sequence has, how probabilities add up to their scores, which are always
// chosen and how ties fall: one definition for host and device code.
//
// Symbols are those of the NSA paper (arXiv 2502.11089, eq. 8-10): l and d are the size and stride
// of compress blocks, l' the size of select blocks, M = l'/d, L = floor(l/d).

#ifndef JAX_NSA_SELECTION_H_
#define JAX_NSA_SELECTION_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAX_NSA_HOST_DEVICE __host__ __device__
#else
#define JAX_NSA_HOST_DEVICE
#endif

namespace jax_nsa {

constexpr int64_t kMinStride = 16, kMaxWindow = 128;
constexpr int64_t kMaxTaps = 2 * (kMaxWindow / kMinStride) - 1;  // of any legal window

// Block geometry. The compressed position i adds to score[j] with weight
// Weight(M * (j + 1) - i), where Weight(o) counts the pairs (m < M, n < L) with m + n = o: a
// trapezoid over o in [0, M + L - 1). As L <= M, a position adds to at most two blocks.
struct Window {
  int64_t compress_block_size;  // l
  int64_t compress_stride;      // d
  int64_t select_block_size;    // l'

  // M
  JAX_NSA_HOST_DEVICE constexpr int64_t strides_per_select_block() const {
    return select_block_size / compress_stride;
  }
  // L
  JAX_NSA_HOST_DEVICE constexpr int64_t strides_per_compress_block() const {
    return compress_block_size / compress_stride;
  }
  // M + L - 1, how many positions add to one block.
  JAX_NSA_HOST_DEVICE constexpr int64_t num_taps() const {
    return strides_per_select_block() + strides_per_compress_block() - 1;
  }
  // Whether the sizes fit each other; jax_nsa/problem.py has the same rule in the user's terms.
  JAX_NSA_HOST_DEVICE constexpr bool IsLegal() const {
    return compress_stride >= kMinStride && compress_block_size >= compress_stride &&
           select_block_size >= compress_block_size && select_block_size <= kMaxWindow &&
           select_block_size % compress_stride == 0;
  }
  // The weight of position M * (j + 1) - offset in score[j], for offset in [0, num_taps()).
  JAX_NSA_HOST_DEVICE constexpr int64_t Weight(int64_t offset) const {
    const int64_t m = strides_per_select_block(), n = strides_per_compress_block();
    const int64_t rising = offset + 1, falling = num_taps() - offset, flat = n < m ? n : m;
    const int64_t slope = rising < falling ? rising : falling;
    return slope < flat ? slope : flat;
  }
  // The first position that adds to score[j]; may be negative, where there is none.
  JAX_NSA_HOST_DEVICE constexpr int64_t FirstPosition(int64_t j) const {
    return LastPosition(j) - num_taps() + 1;
  }
  // The last position that adds to score[j]; may lie past the sequence.
  JAX_NSA_HOST_DEVICE constexpr int64_t LastPosition(int64_t j) const {
    return strides_per_select_block() * (j + 1);
  }
  // Select blocks of a sequence of `length` compressed positions, ceil(((length-1)*d + l) / l').
  JAX_NSA_HOST_DEVICE constexpr int64_t NumBlocks(int64_t length) const {
    if (length <= 0) return 0;
    return ((length - 1) * compress_stride + compress_block_size + select_block_size - 1) /
           select_block_size;
  }
};

// Whether block j of num_blocks is chosen whatever its score: the initial and the two local ones.
JAX_NSA_HOST_DEVICE constexpr bool AlwaysChosen(int64_t j, int64_t num_blocks) {
  return j == 0 || j == num_blocks - 2 || j == num_blocks - 1;
}

// Descending importance, of equals the lower index first: whether block a goes before block b.
// Importances must be ordered numbers: rank NaN as -1, below every sum of probabilities.
JAX_NSA_HOST_DEVICE constexpr bool GoesBefore(float importance_a, int32_t a, float importance_b,
                                              int32_t b) {
  return importance_a > importance_b || (importance_a == importance_b && a < b);
}

}  // namespace jax_nsa

#endif  // JAX_NSA_SELECTION_H_
