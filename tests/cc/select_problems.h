// Problems of the selected branch, drawn over the whole domain, and arrays for them.

#ifndef JAX_NSA_TESTS_SELECT_PROBLEMS_H_
#define JAX_NSA_TESTS_SELECT_PROBLEMS_H_

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "select_attention.h"

namespace jax_nsa::testing {

using select_attention::Problem;

inline int64_t SizeOf(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

// Of a value that all types hold, or NaN.
inline void Encode(DataType dtype, float value, char* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == DataType::kFloat32) {
    std::memcpy(target, &bits, sizeof bits);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == DataType::kFloat16) {
    const uint32_t exponent = (bits >> 23 & 255) - 112;
    half = static_cast<uint16_t>((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 1023));
    if (value == 0) half = 0;
    if (std::isnan(value)) half = 0x7e00;
  }
  std::memcpy(target, &half, sizeof half);
}

inline double Decode(DataType dtype, const char* source) {
  uint32_t bits = 0;
  std::memcpy(&bits, source, SizeOf(dtype));
  if (dtype == DataType::kFloat16) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent == 31 ? (mantissa ? std::nan("") : INFINITY)
                        : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                       : std::ldexp(mantissa, -24);
    return bits >> 15 ? -size : size;
  }
  if (dtype == DataType::kBFloat16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Elements that end where a page of memory begins that must not be touched.
class Pool {
 public:
  explicit Pool(int64_t bytes) : size_((bytes + 4095) / 4096 * 4096 + 8192) {
    memory_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_, 4096, PROT_NONE);
    mprotect(memory_ + size_ - 4096, 4096, PROT_NONE);
    data_ = memory_ + size_ - 4096 - bytes;
  }
  ~Pool() { munmap(memory_, size_); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  char* data() { return data_; }

 private:
  int64_t size_;
  char *memory_, *data_;
};

struct Case {
  Problem problem = {};
  bool packed = false;
  std::vector<int32_t> lengths, counts, firsts, table, ids;
};

class Drawer {
 public:
  explicit Drawer(uint32_t seed) : random_(seed) {}

  int64_t Of(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  bool Chance(double p) { return std::bernoulli_distribution(p)(random_); }
  // Few digits, so that every type holds it.
  float Value() { return static_cast<float>(Of(-100, 100)) / 64; }

  Case Draw(DataType dtype) {
    Case c;
    Problem& p = c.problem;
    p.dtype = p.attention_dtype = dtype;
    if (Chance(0.2)) p.attention_dtype = DataType::kFloat32;
    const int64_t group = int64_t{1} << Of(0, 7);
    p.key_value_heads = group > 16 ? Of(1, 2) : Of(1, 4);
    p.heads = group * p.key_value_heads;
    const int64_t sizes[] = {192, 128, 64, 96, 16, Of(1, 192), Of(1, 192)};
    p.head_size = sizes[Of(0, 6)];
    const int64_t value_sizes[] = {128, 64, 96, 32, Of(1, 128), Of(1, 128)};
    p.value_size = std::min(p.head_size, value_sizes[Of(0, 5)]);
    p.page_size = 16 * Of(1, 16);
    const bool selects = Chance(0.8);
    p.select_block_size = selects ? 16 * Of(1, 8) : 0;
    p.select_count = selects ? Of(1, 20) : 0;
    p.window_size = !selects || Chance(0.7) ? Of(1, Chance(0.3) ? 2000 : 300) : 0;
    p.partial = Chance(0.2);
    const float scales[] = {0.1f, 0.5f, -0.1f, 0.0f, 1.0f};
    p.scale = scales[Of(0, 4)];
    p.sequences = Of(1, 3);
    p.pages_per_sequence = Of(1, std::max<int64_t>(1, 900 / p.page_size));
    p.num_pages = p.sequences * p.pages_per_sequence;
    c.packed = Chance(0.4);
    DrawTokens(&c);
    DrawTables(&c);
    return c;
  }

 private:
  void DrawTokens(Case* c) {
    Problem& p = c->problem;
    p.tokens = c->packed ? 0 : Of(1, 3);
    int64_t rows = c->packed ? Of(0, 1) : 0;  // some that no sequence claims
    for (int64_t b = 0; b < p.sequences; ++b) {
      const int64_t owned = c->packed ? Of(0, 3) : p.tokens;
      c->firsts.push_back(static_cast<int32_t>(rows));
      c->counts.push_back(static_cast<int32_t>(c->packed ? owned : Of(0, owned)));
      rows += owned;
      const int64_t low = p.partial ? -50 : 0, high = p.capacity() + (p.partial ? 50 : 0);
      c->lengths.push_back(static_cast<int32_t>(Chance(0.2) ? high : Of(low, high)));
    }
    p.rows = std::max<int64_t>(1, rows);
    if (c->packed && rows == 0) c->firsts.assign(p.sequences, 1);
    if (c->packed)
      c->counts.back() = std::min<int32_t>(c->counts.back(), p.rows - c->firsts.back());
  }

  void DrawTables(Case* c) {
    Problem& p = c->problem;
    for (int64_t i = 0; i < p.num_pages; ++i) c->table.push_back(static_cast<int32_t>(i));
    std::shuffle(c->table.begin(), c->table.end(), random_);
    c->ids.assign(p.rows * p.key_value_heads * p.select_count, -1);
    for (int64_t b = 0; p.select_count > 0 && b < p.sequences; ++b) {
      const int64_t blocks = p.partial
                                 ? p.capacity() / p.select_block_size + 3
                                 : (c->lengths[b] + p.select_block_size - 1) / p.select_block_size;
      const int64_t owned = c->packed ? c->counts[b] : p.tokens;
      for (int64_t i = 0; i < owned * p.key_value_heads * p.select_count; ++i) {
        int32_t& id = c->ids[c->firsts[b] * p.key_value_heads * p.select_count + i];
        if (blocks > 0 && !Chance(0.15)) id = static_cast<int32_t>(Of(0, blocks - 1));
        if (p.partial && Chance(0.05)) id = Chance(0.5) ? -7 : 1 << 30;
      }
    }
  }

  std::mt19937 random_;
};

}  // namespace jax_nsa::testing

#endif  // JAX_NSA_TESTS_SELECT_PROBLEMS_H_
