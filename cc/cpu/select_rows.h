// The rows of the pool that an item reads, each once, however many attentions it serves.

#ifndef JAX_NSA_CPU_SELECT_ROWS_H_
#define JAX_NSA_CPU_SELECT_ROWS_H_

#include <cstdint>

#include "cpu/select_kernel.h"

namespace jax_nsa::cpu::select {

// One row of query and one kv head.
struct Item {
  int64_t sequence;
  int64_t row;    // of query
  int64_t head;   // kv head
  int64_t limit;  // positions that the row sees; none where it is not positive
};

// Runs that an item has, at most.
int64_t MostRuns(const Problem& problem);

// Writes the runs of an item, section by section, and how many each has. Its ids and pages must be
// good.
void FindRuns(const Problem& problem, const Arrays& arrays, const Item& item, RowRun* runs,
              Unit* unit);

// Leaves of a unit, which has all rows of its item, those in [begin, end).
void Cut(int64_t begin, int64_t end, RowRun* runs, Unit* unit);

}  // namespace jax_nsa::cpu::select

#endif  // JAX_NSA_CPU_SELECT_ROWS_H_
