// What the scheduler and the kernels agree on. `compress_attention_kernel.cc` is compiled once for
// each instruction set; a Kernel is the result, and `isa.h` says which this machine can run.
//
// A *panel* is the rows that read one kv head's keys together: the `group` query heads of each of
// some tokens of a sequence, row r = (token r / group, head r % group). A *unit* of work attends
// with the panels of some kv heads over some positions of the sequence and leaves a *partial* for
// each; merging the partials of all positions gives the results of the panel.
//
// Only plain data here: the translation units of the kernels must not emit inline functions, of
// which the linker would keep one copy, perhaps of an instruction set that the machine lacks.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_KERNEL_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_KERNEL_H_

#include <cstdint>

#include "compress_attention.h"
#include "cpu/alignment.h"

namespace jax_nsa::cpu::compressed {

using compress_attention::Arrays;
using compress_attention::Problem;

constexpr int64_t kMaxRows = 128;          // of a panel
constexpr int64_t kPositionGranule = 16;   // page sizes and tiles are multiples of it
constexpr float kNoPeak = -3.4028235e38f;  // no product is below it; finite

// What is the same for all units of a call.
struct Plan {
  Problem problem;
  Arrays arrays;
  int64_t group;      // query heads in a panel
  int64_t tile_size;  // positions that are scored at once; a tile lies within a page
  int64_t tiles_per_page;
  int64_t strides_per_select_block;
  int64_t num_taps;
  int64_t closing;  // block j closes at position strides_per_select_block * (j + 1) - closing
  int64_t max_blocks;
  float exponent_scale;     // of products of queries and keys, for powers of two; positive
  float weights[kMaxTaps];  // Blocks::Weight
};

// Panels of some kv heads, and the positions that a unit of work attends to.
struct Unit {
  int64_t sequence;
  int64_t length;       // positions of the sequence
  int64_t num_blocks;   // select blocks of the sequence, as its last token counts them
  int64_t first_row;    // row of query of the panel's first token
  int64_t tokens;       // tokens of the panel
  int64_t first_token;  // the first one's number in the sequence
  int64_t count;        // tokens of the sequence
  int64_t early;        // leading tokens of the panel that ignore the last position
  int64_t padded_rows;  // rows of the panel in memory
  int64_t first_head;   // kv heads
  int64_t heads;
  float headroom;  // the greatest weight of a row is 2^-headroom
  int64_t begin;   // positions; begin is the first of a page
  int64_t end;
};

// Takes the unit that the thread does after its present one, or returns null if there is none. A
// kernel asks once, on the last tile of its unit, to fetch the next one's memory ahead.
struct Upcoming {
  const Unit* (*take)(void* taker);
  void* taker;
};

// The result of one unit for one kv head. Scores are exponents to base 2.
struct Partial {
  float* attention;   // [padded rows, padded value size], weights relative to `peak`, order of the
                      // kernel
  float* peak;        // [padded rows] greatest product of query and key
  float* total;       // [padded rows] sum of the weights
  float* tile_peaks;  // [tiles, padded rows] greatest product up to each tile
  float* scores;      // [last_block - first_block, padded rows] weights summed into the blocks that
                      // close in a tile, relative to its tile_peaks
  int64_t first_block;
  int64_t last_block;
};

// One implementation of the work.
struct Kernel {
  const char* name;
  int64_t lanes;  // floats in a vector
  int64_t (*scratch_size)(const Plan& plan, int64_t heads, int64_t padded_rows);  // bytes
  // Fills partials[0 .. unit.heads).
  void (*attend)(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
                 const Partial* partials, void* scratch);
  // Merges the partials of kv head `head`, one of each split, into the attention output,
  // block_scores and importance[tokens][num_blocks], and leaves the overall `peak` and `total` of
  // each row. `importance` and block_scores are zero before.
  void (*merge)(const Plan& plan, const Unit& unit, int64_t head, int64_t splits,
                int64_t pages_per_split, const Partial* partials, float* importance, float* peak,
                float* total);
};

}  // namespace jax_nsa::cpu::compressed

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_KERNEL_H_
