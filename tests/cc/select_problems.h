// Problems of the selected branch, drawn over the whole domain, and arrays for them.

#ifndef JAX_NSA_TESTS_SELECT_PROBLEMS_H_
#define JAX_NSA_TESTS_SELECT_PROBLEMS_H_

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "select_attention.h"

namespace jax_nsa::testing {

using select_attention::Problem;

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
