// The geometry of blocks: which compressed positions a sequence has, which select blocks, and how
// probabilities of positions add up to scores of blocks. One definition for host and device code.
//
// Symbols are those of the NSA paper (arXiv 2502.11089, eq. 8-10): l and d are the size and stride
// of compress windows, l' the size of select blocks, M = l'/d, L = floor(l/d).

#ifndef JAX_NSA_BLOCKS_H_
#define JAX_NSA_BLOCKS_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAX_NSA_HOST_DEVICE __host__ __device__
#else
#define JAX_NSA_HOST_DEVICE
#endif

namespace jax_nsa {

constexpr int64_t kMinStride = 16, kMaxBlockSize = 128;
constexpr int64_t kMaxTaps = 2 * (kMaxBlockSize / kMinStride) - 1;  // see Blocks::num_taps

// Whether blocks, or the strides between compress windows, may have so many tokens.
constexpr bool IsBlockSize(int64_t tokens) {
  return tokens > 0 && tokens % kMinStride == 0 && tokens <= kMaxBlockSize;
}

// The compressed position i adds to score[j] with weight Weight(LastPosition(j) - i), where
// Weight(o) counts the pairs (m < M, n < L) with m + n = o: a trapezoid over o in [0, M + L - 1).
// As L <= M, a position adds to at most two blocks.
struct Blocks {
  int64_t compress_block_size;  // l
  int64_t compress_stride;      // d
  int64_t select_block_size;    // l'
  // Whether blocks are scored and counted as open training codes do, or as CANN does, whose scores
  // take each position one later.
  bool aligned = false;

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
  // Whether the sizes fit each other as far as kernels need it; jax_nsa/blocks.py asks for more: of
  // users, for the strides and granules that torch_npu takes.
  JAX_NSA_HOST_DEVICE constexpr bool IsLegal() const {
    return compress_stride >= kMinStride && compress_block_size >= compress_stride &&
           select_block_size >= compress_block_size && select_block_size <= kMaxBlockSize &&
           select_block_size % compress_stride == 0;
  }
  // The weight of position LastPosition(j) - offset in score[j], for offset in [0, num_taps()).
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
    return strides_per_select_block() * (j + 1) - (aligned ? 1 : 0);
  }
  // Original tokens that `length` compressed positions cover, from one position on.
  JAX_NSA_HOST_DEVICE constexpr int64_t OriginalLength(int64_t length) const {
    return (length - 1) * compress_stride + compress_block_size;
  }
  // Whether so many original tokens have `length` compressed positions, without the division that
  // CompressedLength needs.
  JAX_NSA_HOST_DEVICE constexpr bool AreCompressedTo(int64_t tokens, int64_t length) const {
    const int64_t first = length > 0 ? OriginalLength(length) : 0;
    return first <= tokens && tokens < OriginalLength(length + 1);
  }
  // Compressed positions of so many original tokens.
  JAX_NSA_HOST_DEVICE constexpr int64_t CompressedLength(int64_t tokens) const {
    return tokens < compress_block_size ? 0 : (tokens - compress_block_size) / compress_stride + 1;
  }
  // Select blocks that hold so many original tokens, ceil(tokens / l').
  JAX_NSA_HOST_DEVICE constexpr int64_t Universe(int64_t tokens) const {
    return tokens <= 0 ? 0 : (tokens + select_block_size - 1) / select_block_size;
  }
  // Select blocks that `length` compressed positions cover, ceil(((length-1)*d + l) / l').
  JAX_NSA_HOST_DEVICE constexpr int64_t NumBlocks(int64_t length) const {
    return length <= 0 ? 0 : Universe(OriginalLength(length));
  }
  // Select blocks of the longest sequence that has `length` compressed positions. Counted by
  // original tokens, it ends one token before its next compress window.
  JAX_NSA_HOST_DEVICE constexpr int64_t MaxBlocks(int64_t length) const {
    return aligned ? Universe(OriginalLength(length + 1) - 1) : NumBlocks(length);
  }
};

}  // namespace jax_nsa

#endif  // JAX_NSA_BLOCKS_H_
