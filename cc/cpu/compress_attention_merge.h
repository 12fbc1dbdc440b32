// The results of a panel from the partials of its units.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_MERGE_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_MERGE_H_

#include <cstdint>

#include "cpu/compress_attention_kernel.h"
#include "cpu/compress_attention_tile.h"
#include "cpu/operands.h"
#include "cpu/simd.h"
#include "cpu/values.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

// Of a row's total: 0 where it sees no position.
inline Float Inverse(Float total) { return total == 0.0f ? Float{} : 1.0f / total; }

// Adds each row's scores of the blocks [first, last), times `factors`, to block_scores and, over
// the heads of the group, to the importance. `run` is the group, at most a vector.
template <int run>
void AddScores(const Plan& plan, const Unit& unit, int64_t head, const float* scores,
               const float* factors, int64_t first, int64_t last, float* importance) {
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  const int64_t blocks = kLanes / Least(padded_rows, kLanes);  // in a vector
  const int64_t tokens = kLanes / run / blocks;                // in a vector
  for (int64_t j = first; j < last; j += run * blocks) {
    for (int64_t r = 0; r < rows; r += Most(plan.group, kLanes)) {
      Float of_blocks[run];
      for (int64_t e = 0; e < run; ++e) {
        Float sum = {};
        for (int64_t g = 0; j + e * blocks < last && g < plan.group; g += kLanes) {
          const float* const source = scores + (j - first + e * blocks) * padded_rows + r + g;
          __builtin_prefetch(source + run * blocks * padded_rows);
          sum += Load<Float>(source) * Load<Float>(factors + r + g);
        }
        of_blocks[e] = sum;
      }
      // [block][token]
      const Float sums = TransposeRuns<run>(FoldRuns<run>(of_blocks));
      float* const target = importance + r / plan.group * unit.num_blocks + j;
      if (tokens == 1 && last - j >= kLanes) {
        Store(target, Load<Float>(target) + sums);
        continue;
      }
      float lanes[kLanes];
      Store(lanes, sums);
      for (int64_t b = 0; b < Least(run * blocks, last - j); ++b) {
        for (int64_t t = 0; t < Least(tokens, unit.tokens - r / plan.group); ++t) {
          target[t * unit.num_blocks + b] += lanes[b * tokens + t];
        }
      }
    }
  }
  if (plan.arrays.block_scores == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query_row =
        (unit.first_row + r / plan.group) * plan.problem.heads + head * plan.group + r % plan.group;
    float* const target = plan.arrays.block_scores + query_row * plan.max_blocks;
    for (int64_t j = first; j < last; ++j) {
      target[j] += scores[(j - first) * padded_rows + r] * factors[r];
    }
  }
}

// The positions of a split.
inline Unit PartOf(const Plan& plan, const Unit& unit, int64_t split, int64_t pages_per_split) {
  Unit part = unit;
  part.begin = split * pages_per_split * plan.problem.page_size;
  part.end = Least(unit.length, part.begin + pages_per_split * plan.problem.page_size);
  return part;
}

// Calls function(r, repeated) for each vector of rows, where `repeated(row)` has those of `row` in
// all blocks of the vector.
template <class Function>
inline void ForRows(int64_t padded_rows, Function function) {
  WithConstant(Least(padded_rows, kLanes), [&](auto size) {
    const auto repeated = [&](const float* row) { return (Float)Repeated<size()>(row); };
    for (int64_t r = 0; r < Most(padded_rows, kLanes); r += kLanes) function(r, repeated);
  });
}

// Adds the scores of all blocks. Those that take positions of two splits are summed over both
// before anything is divided by a row's total, so that blocks whose sums are equal stay equal.
inline void AddBlocks(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
                      int64_t pages_per_split, const Partial* partials, float* importance,
                      const float* peak, const float* total) {
  const int64_t padded_rows = unit.padded_rows;
  const float scale = plan.exponent_scale;
  const auto add = [&](const float* scores, const float* factors, int64_t first, int64_t last) {
    WithConstant(Least(plan.group, kLanes), [&](auto run) {
      AddScores<run()>(plan, unit, head, scores, factors, first, last, importance);
    });
  };
  alignas(kAlignment) float factors[compressed::kMaxRows];
  for (int64_t s = 0; s < splits; ++s) {
    const Partial& partial = partials[s];
    const Partial* const next = s + 1 < splits ? &partials[s + 1] : nullptr;
    const Unit part = PartOf(plan, unit, s, pages_per_split);
    // Blocks that the split before or after has a part of are not this one's alone.
    const int64_t own_first =
        s > 0 ? Most(partial.first_block, partials[s - 1].last_block) : partial.first_block;
    const int64_t own_last =
        next ? Most(own_first, Least(partial.last_block, next->first_block)) : partial.last_block;
    const float* last_peaks = nullptr;
    int64_t first = own_first;
    for (Tile tile = Tile::At(plan, part, 0); tile.count > 0;
         tile = Tile::At(plan, part, tile.index + 1)) {
      last_peaks = partial.tile_peaks + tile.index * padded_rows;
      ForRows(padded_rows, [&](int64_t r, auto repeated) {
        const Float factor = Exp2((repeated(last_peaks + r) - repeated(peak + r)) * scale);
        Store(factors + r, factor * Inverse(repeated(total + r)));
      });
      const int64_t end = BlocksEnd(plan, part, partial, tile.begin + tile.count);
      const int64_t last = Least(own_last, Most(first, end));
      if (first < last) {
        add(partial.scores + (first - partial.first_block) * padded_rows, factors, first, last);
      }
      first = Most(first, last);
    }
    if (next == nullptr) continue;
    // A block is shorter than a tile, so what it has of the next split is in that one's first.
    for (int64_t j = next->first_block; j < partial.last_block; ++j) {
      const float* const here = partial.scores + (j - partial.first_block) * padded_rows;
      const float* const there = next->scores + (j - next->first_block) * padded_rows;
      alignas(kAlignment) float both[compressed::kMaxRows];
      ForRows(padded_rows, [&](int64_t r, auto repeated) {
        const Float all = repeated(peak + r);
        Store(both + r,
              repeated(here + r) * Exp2((repeated(last_peaks + r) - all) * scale) +
                  repeated(there + r) * Exp2((repeated(next->tile_peaks + r) - all) * scale));
        Store(factors + r, Inverse(repeated(total + r)));
      });
      add(both, factors, j, j + 1);
    }
  }
}

// Words has the order of the columns of partials; Out is the type of the attention.
template <class Words, class Out>
void Merge(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
           int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
           float* total) {
  const compressed::Problem& problem = plan.problem;
  const int64_t padded_rows = unit.padded_rows, rows = unit.tokens * plan.group;
  const int64_t value_stride = PaddedWords(problem.value_size);
  const int64_t vectors_end = Most(padded_rows, kLanes);

  // Weigh each split against the overall peak; its total becomes its share of the attention.
  const float scale = plan.exponent_scale;
  for (int64_t r = 0; r < vectors_end; r += kLanes) {
    Float all = Set(compressed::kNoPeak), sum = {};
    for (int64_t s = 0; s < splits; ++s) {
      all = Max(Load<Float>(partials[s].peak + r), all);
    }
    for (int64_t s = 0; s < splits; ++s) {
      const Partial& partial = partials[s];
      sum += Load<Float>(partial.total + r) * Exp2((Load<Float>(partial.peak + r) - all) * scale);
    }
    for (int64_t s = 0; s < splits; ++s) {
      const Partial& partial = partials[s];
      Store(partial.total + r, Exp2((Load<Float>(partial.peak + r) - all) * scale) * Inverse(sum));
    }
    Store(peak + r, all);
    Store(total + r, sum);
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = unit.first_row + r / plan.group;
    const int64_t query_head = head * plan.group + r % plan.group;
    char* const target = static_cast<char*>(plan.arrays.attention) +
                         (row * problem.heads + query_head) * problem.value_size *
                             static_cast<int64_t>(sizeof(typename Out::Bits));
    for (int64_t c = 0; c < value_stride; c += 2 * kLanes) {
      Float a = {}, b = {};
      for (int64_t s = 0; s < splits; ++s) {
        const Partial& partial = partials[s];
        const float* const source = partial.attention + r * value_stride + c;
        a += Load<Float>(source) * partial.total[r];
        b += Load<Float>(source + kLanes) * partial.total[r];
      }
      Words::Order(&a, &b);
      StoreColumns<Out>(target + c * sizeof(typename Out::Bits),
                        Least(problem.value_size - c, kChunk), a, b);
    }
  }

  AddBlocks(plan, unit, head, splits, pages_per_split, partials, importance, peak, total);
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_MERGE_H_
