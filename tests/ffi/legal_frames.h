// Legal calls of the operators, which a fuzzer's edits begin from.

#ifndef JAX_NSA_TESTS_LEGAL_FRAMES_H_
#define JAX_NSA_TESTS_LEGAL_FRAMES_H_

#include <cstdint>

#include "frame.h"
#include "xla/ffi/api/c_api.h"

namespace jax_nsa::testing {

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32, kS32 = XLA_FFI_DataType_S32;

// Legal calls. Sequences are 2, pages 5 of 16 rows.
inline Frame CompressAttentionFrame(bool packed) {
  Frame frame;
  frame.arguments = {
      {"query", kF32, {2, 3, 4, 8}},       {"key", kF32, {5, 16, 16}},
      {"value", kF32, {5, 16, 12}},        {"block_table", kS32, {2, 2}, {0, 4, 1, 3}},
      {"lengths", kS32, {2}, {20, 32}},    {"token_counts", kS32, {2}, {3, 3}},
      {"early_counts", kS32, {2}, {0, 1}}, {"select_lengths", kS32, {2}, {340, 530}}};
  frame.results = {{"attention", kF32, {2, 3, 4, 6}},
                   {"topk_indices", kS32, {2, 3, 2, 5}},
                   {"lse", kF32, {2, 3, 4}},
                   {"block_scores", kF32, {2, 3, 4, 9}}};
  frame.attributes["problem"] = Scalars{{"scale", 0.5f},
                                        {"key_value_heads", int64_t{2}},
                                        {"aligned", int64_t{0}},
                                        {"interleaved", int64_t{0}},
                                        {"compress_block_size", int64_t{32}},
                                        {"causal", int64_t{1}},
                                        {"compress_stride", int64_t{16}},
                                        {"init_blocks", int64_t{1}},
                                        {"select_block_size", int64_t{64}},
                                        {"local_blocks", int64_t{2}}};
  if (packed) {
    frame.arguments.push_back({"first_rows", kS32, {2}, {0, 3}});
    frame.arguments[0].dims = {6, 4, 8};
    frame.results = {{"attention", kF32, {6, 4, 6}}, {"topk_indices", kS32, {6, 2, 5}}};
  }
  return frame;
}

inline Frame SelectAttentionFrame(bool interleaved) {
  Frame frame;
  frame.arguments = {{"query", kF32, {2, 3, 4, 8}},
                     {"key", kF32, {5, 16, 16}},
                     {"value", kF32, {5, 16, 12}},
                     {"topk_indices", kS32, {2, 3, 2, 2}, {0, 1, -1, 1}},
                     {"block_table", kS32, {2, 2}, {0, 4, 1, 3}},
                     {"lengths", kS32, {2}, {20, 32}},
                     {"token_counts", kS32, {2}, {3, 3}}};
  frame.results = {{"attention", kF32, {2, 3, 4, 6}},
                   {"window_attention", kF32, {2, 3, 4, 6}},
                   {"lse", kF32, {2, 3, 4}},
                   {"window_lse", kF32, {2, 3, 4}}};
  frame.attributes["problem"] = Scalars{{"scale", 0.5f},
                                        {"key_value_heads", int64_t{2}},
                                        {"partial", int64_t{0}},
                                        {"tokens_apart", int64_t{0}},
                                        {"interleaved", int64_t{interleaved}},
                                        {"select_block_size", int64_t{16}},
                                        {"window_size", int64_t{7}}};
  if (interleaved) frame.arguments[1].dims = frame.arguments[2].dims = {5, 16, 28};
  return frame;
}

inline Frame CompressFrame() {
  Frame frame;
  frame.arguments = {
      {"input_0", kF32, {5, 16, 12}},      {"weight_0", kF32, {32, 2}},
      {"cache_0", kF32, {7, 12}},          {"bias_0", kF32, {2, 6}},
      {"input_1", kF32, {5, 16, 8}},       {"weight_1", kF32, {32, 2}},
      {"cache_1", kF32, {7, 8}},           {"block_table", kS32, {2, 3}, {0, 4, 1, 3, 2, 1}},
      {"lengths", kS32, {2}, {48, 32}},    {"slot_mapping", kS32, {2}, {6, 0}},
      {"token_counts", kS32, {2}, {1, 16}}};
  frame.results = {{"cache_0", kF32, {7, 12}}, {"cache_1", kF32, {7, 8}}};
  frame.attributes["problem"] = Scalars{{"heads", int64_t{2}},
                                        {"compress_block_size", int64_t{32}},
                                        {"compress_stride", int64_t{16}}};
  frame.in_place = "cache_0 cache_1 ";
  return frame;
}

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_LEGAL_FRAMES_H_
