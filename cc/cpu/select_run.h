// One call of the selected branch as units of work that any number of threads may take.

#ifndef JAX_NSA_CPU_SELECT_RUN_H_
#define JAX_NSA_CPU_SELECT_RUN_H_

#include <atomic>
#include <cstdint>

#include "cpu/help.h"
#include "cpu/memory.h"
#include "cpu/select_kernel.h"
#include "cpu/select_rows.h"

namespace jax_nsa::cpu::select {

// How a call is divided follows from the call alone, never from the number of threads, and so do
// the bits of its results.
class Run {
 public:
  // The shapes must have been checked. What is wrong with a sequence or an item makes its results
  // NaN.
  Run(const Problem& problem, const Arrays& arrays, const Kernel& kernel);

  int64_t num_units() const { return num_units_; }
  // Bytes of keys and values that the call reads, or a little more.
  int64_t bytes() const { return bytes_; }

  // Works until nothing is left to take. Returns true to the one caller that finishes the last
  // unit. Needs no more threads than came.
  bool Work(const CallHelp& = [](int64_t) {});

  // Whether memory ran out, to be asked when all is finished; there are no results then.
  bool out_of_memory() const { return out_of_memory_; }

 private:
  // Works on one unit after the other.
  class Worker;

  // Where an item's results come from: partials, of which an absent one has none; or NaN.
  enum class Source { kPartials, kNothing, kNaN };

  // Rows of the pool, not minding that the attentions of an item may share some.
  struct RowCounts {
    int64_t all, most;  // of all items, and of one at most
  };

  RowCounts CountRows() const;
  Source FindItem(int64_t index, Item* item) const;
  void AllocatePartials();
  void FillNaN(const Item& item) const;
  void Merge(const Item& item, char* partials, const int8_t* sections, int64_t count,
             char* scratch) const;

  // Of a unit, the partials are numbers `part` to `part` + kSections - 1 of its item: parts and
  // sections both follow the order of rows, so no two have one number.
  int64_t partials_per_item() const { return units_per_item_ + kSections - 1; }
  Partial PartialAt(char* partials, int64_t number) const;

  Plan plan_;
  const Kernel& kernel_;
  int64_t bytes_;
  int64_t items_, units_per_item_, num_units_;
  int64_t most_runs_, scratch_size_, partial_size_;

  // Where items have several units.
  Memory partials_memory_;
  std::atomic<int32_t>* unfinished_ = nullptr;  // [items], units
  int8_t* sections_ = nullptr;                  // [items, partials_per_item()], -1: none
  char* partials_ = nullptr;                    // [items, partials_per_item()]

  std::atomic<int64_t> next_{0};      // unit
  std::atomic<int64_t> finished_{0};  // units
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace jax_nsa::cpu::select

#endif  // JAX_NSA_CPU_SELECT_RUN_H_
