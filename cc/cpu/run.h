// One call as units of work that any number of threads may take.

#ifndef JAX_NSA_CPU_RUN_H_
#define JAX_NSA_CPU_RUN_H_

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/kernel.h"

namespace jax_nsa::cpu {

// How a call is divided. It follows from the call alone, never from the number of threads, and so
// do the bits of its results.
//
// A *group* is a panel's tokens and some kv heads of one sequence; its *splits* are runs of its
// pages. Each split is a unit; whoever finishes the last unit of a group merges them.
class Run {
 public:
  // The operands must have been checked.
  Run(const Problem& problem, const Arrays& arrays, const Kernel& kernel);

  int64_t num_units() const { return num_units_; }
  // Bytes of keys and values that the call reads.
  int64_t bytes() const { return bytes_; }

  // Does units until none is left to take. Returns true to the one caller that finishes the last.
  bool Work();

  // Whether memory ran out, to be asked when the last unit is finished; there are no results then.
  bool out_of_memory() const { return out_of_memory_; }

 private:
  struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<char, FreeMemory>;

  struct Group {
    Unit unit;  // over the whole sequence
    int64_t splits;
    int64_t pages_per_split;
    int64_t unfinished;  // splits
    Memory workspace;    // while some are in work
  };

  // Where the partials and the sums of a group lie in its workspace.
  struct Layout {
    std::vector<Partial> partials;  // [splits, heads]
    float* importance;              // [tokens, blocks]
    float* peak;                    // [padded rows]
    float* total;                   // [padded rows]
    int64_t size;                   // bytes
  };

  void AddGroups(int64_t sequence, const SequenceRows& rows);
  void FillRows(int64_t first, int64_t end);
  Unit Split(const Group& group, int64_t split) const;
  Layout LayOut(const Group& group) const;
  static Memory Allocate(int64_t size);
  Group* Take(int64_t* split);
  void Merge(const Group& group, const Layout& layout);

  Plan plan_;
  const Kernel& kernel_;
  std::vector<Group> groups_;
  int64_t num_units_ = 0;
  int64_t bytes_ = 0;
  int64_t heads_per_unit_ = 0;
  int64_t pages_per_split_ = 0;
  int64_t workspace_size_ = 0;  // of the largest group
  int64_t scratch_size_ = 0;    // of the largest unit

  std::mutex mutex_;  // guards what follows, and `unfinished` and `workspace` of the groups
  size_t next_group_ = 0;
  int64_t next_split_ = 0;
  int64_t finished_ = 0;
  bool out_of_memory_ = false;
  std::vector<Memory> free_workspaces_;
};

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_RUN_H_
