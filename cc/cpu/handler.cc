// The XLA FFI handler of the CPU kernel.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "decode.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

float Bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float Read(DataType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DataType::kFloat32:
      return static_cast<const float*>(data)[i];
    case DataType::kBFloat16:
      return Bits(uint32_t{static_cast<const uint16_t*>(data)[i]} << 16);
    case DataType::kFloat16:
      return static_cast<float>(static_cast<const _Float16*>(data)[i]);
  }
  return 0;
}

void Write(DataType dtype, void* data, int64_t i, float value) {
  switch (dtype) {
    case DataType::kFloat32:
      static_cast<float*>(data)[i] = value;
      return;
    case DataType::kBFloat16: {
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      const uint32_t rounded = value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(rounded >> 16);
      return;
    }
    case DataType::kFloat16:
      static_cast<_Float16*>(data)[i] = static_cast<_Float16>(value);
      return;
  }
}

void AttendRow(const Problem& p, const Arrays& a, int64_t b, int64_t row, int64_t visible) {
  const float kInf = std::numeric_limits<float>::infinity();
  const int64_t length = a.lengths[b], group = p.group();
  const int64_t blocks = p.window.NumBlocks(length);
  std::vector<float> weights(length), accumulated(p.value_size), importance(blocks);
  for (int64_t h = 0; h < p.key_value_heads; ++h) {
    std::fill(importance.begin(), importance.end(), 0.0f);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = h * group + g;
      const auto source = [&](int64_t i) {
        return a.block_table[b * p.pages_per_sequence + i / p.page_size] * p.page_size +
               i % p.page_size;
      };
      float peak = -kInf, total = 0;
      for (int64_t i = 0; i < visible; ++i) {
        float dot = 0;
        for (int64_t c = 0; c < p.head_size; ++c) {
          dot += Read(p.dtype, a.query, (row * p.heads + head) * p.head_size + c) *
                 Read(p.dtype, a.key, (source(i) * p.key_value_heads + h) * p.head_size + c);
        }
        weights[i] = dot * p.scale;
        peak = std::max(peak, weights[i]);
      }
      std::fill(accumulated.begin(), accumulated.end(), 0.0f);
      for (int64_t i = 0; i < visible; ++i) {
        weights[i] = std::exp(weights[i] - peak);
        total += weights[i];
        for (int64_t c = 0; c < p.value_size; ++c) {
          accumulated[c] +=
              weights[i] *
              Read(p.dtype, a.value, (source(i) * p.key_value_heads + h) * p.value_size + c);
        }
      }
      const float inverse = visible > 0 ? 1 / total : 0;
      for (int64_t c = 0; c < p.value_size; ++c) {
        Write(p.dtype, a.attention, (row * p.heads + head) * p.value_size + c,
              accumulated[c] * inverse);
      }
      if (a.lse) {
        a.lse[row * p.heads + head] = visible > 0 ? peak + std::log(total) : -kInf;
      }
      for (int64_t j = 0; j < blocks; ++j) {
        float score = 0;
        for (int64_t o = 0; o < p.window.num_taps(); ++o) {
          const int64_t i = p.window.LastPosition(j) - o;
          if (i >= 0 && i < visible) score += p.window.Weight(o) * weights[i] * inverse;
        }
        importance[j] += score;
        if (a.block_scores) a.block_scores[(row * p.heads + head) * p.max_blocks() + j] = score;
      }
    }
    for (int64_t j = 0; j < blocks; ++j) {
      if (importance[j] != importance[j]) importance[j] = -1;
      if (AlwaysChosen(j, blocks)) importance[j] = kInf;
    }
    std::vector<int32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
      return GoesBefore(importance[i], i, importance[j], j);
    });
    for (int64_t n = 0; n < p.select_count; ++n) {
      a.topk_indices[(row * p.key_value_heads + h) * p.select_count + n] =
          n < blocks ? order[n] : -1;
    }
  }
}

ffi::Error Run(ffi::RemainingArgs args, ffi::RemainingRets rets, Attributes attributes) {
  ffi::ErrorOr<Call> call = Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  const Problem& p = call->problem;
  const Arrays& a = call->arrays;
  SequenceRows rows;
  for (int64_t b = 0; b < p.sequences; ++b) {
    const Fault fault = FindRows(p, a, b, &rows);
    if (fault != Fault::kNone) return FaultError(*call, fault, b);
    if (rows.count == 0) continue;
    for (int64_t page = 0; page * p.page_size < a.lengths[b]; ++page) {
      if (!IsPage(p, a.block_table[b * p.pages_per_sequence + page])) {
        return FaultError(*call, Fault::kPageId, b, page);
      }
    }
  }
  const int64_t pairs = p.rows * p.heads;
  for (int64_t i = 0; i < pairs * p.value_size; ++i) Write(p.dtype, a.attention, i, 0);
  std::fill_n(a.topk_indices, p.rows * p.key_value_heads * p.select_count, -1);
  if (a.lse) std::fill_n(a.lse, pairs, -std::numeric_limits<float>::infinity());
  if (a.block_scores) std::fill_n(a.block_scores, pairs * p.max_blocks(), 0.0f);
  for (int64_t b = 0; b < p.sequences; ++b) {
    FindRows(p, a, b, &rows);
    for (int64_t t = 0; t < rows.count; ++t) {
      AttendRow(p, a, b, rows.first + t, rows.Visible(t, a.lengths[b]));
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_nsa

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_nsa_compress_attention_cpu, jax_nsa::Run,
    xla::ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attr<jax_nsa::Attributes>("problem"));
