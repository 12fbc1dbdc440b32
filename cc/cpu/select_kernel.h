// What the scheduler and the kernels of the selected branch agree on. `select_kernel.cc` is
// compiled once for each instruction set; a Kernel is the result.
//
// An *item* is one row of query and one kv head: the rows of a *panel* are the query heads of its
// group. The positions that it reads are in *sections*, so that each is read once, whichever of the
// two attentions it serves. A *unit* of work attends over some of the positions of an item and
// leaves a *partial* for each section; the attentions are merged from these.
//
// Only plain data here, as in compress_attention_kernel.h, for the same reason.

#ifndef JAX_NSA_CPU_SELECT_KERNEL_H_
#define JAX_NSA_CPU_SELECT_KERNEL_H_

#include <cstdint>

#include "cpu/alignment.h"
#include "select_attention.h"

namespace jax_nsa::cpu::select {

using select_attention::Arrays;
using select_attention::Problem;
using select_attention::RowFault;

constexpr float kNoPeak = -3.4028235e38f;  // no product is below it; finite
// A product may exceed its row's reference by a factor of up to 2^kSlack in weight: no more than
// what float32 and bfloat16 do not notice.
constexpr float kSlack = 6;

constexpr int64_t kTileRows = 64;  // that a kernel takes at once

// The sections of an item: what only the chosen blocks have, what the window has too, and what only
// the window has.
enum Section { kChosen, kShared, kNewest, kSections };

// What is the same for all units of a call.
struct Plan {
  Problem problem;
  Arrays arrays;
  int64_t group;         // query heads in a panel
  float exponent_scale;  // of products of queries and keys, for powers of two; positive
  float headroom;        // no weight is greater than 2^-headroom
};

// Some of the positions of an item.
struct Unit {
  int64_t row;                  // of query
  int64_t head;                 // kv head
  const RowRun* runs;           // rows of the pool, section by section
  int64_t num_runs[kSections];  // of each section
  int64_t num_rows[kSections];  // the same, in rows
};

// Takes the unit that the thread does after its present one, or returns null if there is none. A
// kernel asks once, on the last tile of its unit, to fetch the next one's memory ahead.
struct Upcoming {
  const Unit* (*take)(void* taker);
  void* taker;
};

// The result of one unit in one section. Products are of query and key, weights powers of two.
struct Partial {
  float* attention;  // [group, padded value size], weighted values, in the order of the kernel
  float* reference;  // [at least a vector of group] the product whose weight is
                     // 2^-(headroom + kSlack)
  float* total;      // [the same] sum of the weights
  float* rounded;    // [the same] of the weights as values met them
};

// One implementation of the work.
struct Kernel {
  const char* name;
  int64_t lanes;                              // floats in a vector
  int64_t (*scratch_size)(const Plan& plan);  // bytes
  // Fills partials[section] of each section that the unit has rows in.
  void (*attend)(const Plan& plan, const Unit& unit, const Upcoming& upcoming,
                 const Partial* partials, void* scratch);
  // Writes an item's `attention`, and `lse` if it is not null, from partials: for row `row` of
  // query and kv head `head`. Without partials: zeros, and -inf.
  void (*merge)(const Plan& plan, int64_t row, int64_t head, const Partial* const* partials,
                int64_t count, void* attention, float* lse, void* scratch);
};

}  // namespace jax_nsa::cpu::select

#endif  // JAX_NSA_CPU_SELECT_KERNEL_H_
