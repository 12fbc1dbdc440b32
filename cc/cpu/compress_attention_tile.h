// The positions of a unit of work in tiles, and which blocks close in each.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_TILE_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_TILE_H_

#include <cstdint>

#include "cpu/compress_attention_kernel.h"
#include "cpu/operands.h"

namespace jax_nsa::cpu::JAX_NSA_ISA {
namespace {

using compressed::Partial;
using compressed::Plan;
using compressed::Unit;
using compressed::Upcoming;

// Positions of a page that are attended to at once.
struct Tile {
  int64_t index;  // among the tiles of the unit
  int64_t begin;  // first position, in the sequence
  int64_t count;
  int64_t first_row;  // row in the pool

  static Tile At(const Plan& plan, const Unit& unit, int64_t index) {
    const int64_t page_size = plan.problem.page_size;
    const int64_t page = unit.begin / page_size + index / plan.tiles_per_page;
    const int64_t offset = index % plan.tiles_per_page * plan.tile_size;
    const int64_t begin = page * page_size + offset;
    const int64_t end = Least(unit.end, Least(begin + plan.tile_size, (page + 1) * page_size));
    Tile tile = {index, begin, Most(end - begin, 0), 0};
    if (tile.count > 0) {
      const int64_t entry = unit.sequence * plan.problem.pages_per_sequence + page;
      tile.first_row = plan.arrays.block_table[entry] * page_size + offset;
    }
    return tile;
  }
};

// The first block that closes at or after a position.
inline int64_t FirstClosing(const Plan& plan, int64_t position) {
  const int64_t stride = plan.strides_per_select_block;
  return (position + plan.closing + stride - 1) / stride - 1;
}

// The end of the blocks that are summed in a tile which ends at position `end`: of those that close
// before it. The last tile of a unit also sums the blocks that its positions only begin.
inline int64_t BlocksEnd(const Plan& plan, const Unit& unit, const Partial& partial, int64_t end) {
  return end >= unit.end
             ? partial.last_block
             : Most(partial.first_block, Least(partial.last_block, FirstClosing(plan, end)));
}

// The first of the blocks that are summed in a tile.
inline int64_t BlocksBegin(const Plan& plan, const Unit& unit, const Partial& partial,
                           const Tile& tile) {
  return tile.index == 0 ? partial.first_block : BlocksEnd(plan, unit, partial, tile.begin);
}

}  // namespace
}  // namespace jax_nsa::cpu::JAX_NSA_ISA

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_TILE_H_
