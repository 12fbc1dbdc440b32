// One call as units of work that any number of threads may take.

#ifndef JAX_NSA_CPU_COMPRESS_ATTENTION_RUN_H_
#define JAX_NSA_CPU_COMPRESS_ATTENTION_RUN_H_

#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/compress_attention_kernel.h"
#include "cpu/help.h"
#include "cpu/memory.h"

namespace jax_nsa::cpu::compressed {

// How a call is divided. It follows from the call alone, never from the number of threads, and so
// do the bits of its results.
//
// A *job* is a panel's tokens and some kv heads of one sequence; its *splits* are runs of its
// pages. Each split is a unit. When the last of a job is finished, each kv head's partials are to
// be merged, by whoever is free.
class Run {
 public:
  // The operands must have been checked; `faulty` says which sequences are not to be read, their
  // results being NaN and -1. Empty: none.
  Run(const Problem& problem, const Arrays& arrays, const Kernel& kernel,
      const std::vector<bool>& faulty = {});

  int64_t num_units() const { return num_units_; }
  // Bytes of keys and values that the call reads.
  int64_t bytes() const { return bytes_; }

  // Works until nothing is left to take. Returns true to the one caller that finishes the last.
  bool Work(const CallHelp& call_help = [](int64_t) {});

  // Whether memory ran out, to be asked when all is finished; there are no results then.
  bool out_of_memory() const { return out_of_memory_; }

 private:
  struct Job {
    Unit unit;  // over the whole sequence
    int64_t splits;
    int64_t pages_per_split;
    int64_t unfinished;  // splits
    int64_t merging;     // kv heads that someone merges or has merged
    int64_t unmerged;    // kv heads
    Memory workspace;    // while some are in work
  };

  // A split to be attended to, if there is one.
  struct Task {
    Job* job = nullptr;
    int64_t split;
    Unit unit;
  };

  // What a job's workspace holds, in bytes: partials [splits, heads] of these arrays, then the
  // importance, peak and total of each head.
  struct Layout {
    int64_t attention, state, tile_peaks, scores;  // of a partial; its peak and total are states
    int64_t importance;
    int64_t partial() const { return attention + 2 * state + tile_peaks + scores; }
    int64_t sums() const { return importance + 2 * state; }
  };

  void AddJobs(int64_t sequence, const SequenceRows& rows);
  // Why rows get results that nobody computes.
  enum Why { kAbsent, kFaulty };
  void FillRows(int64_t first, int64_t end, Why why);
  void SelectWithoutPositions(int64_t sequence, const SequenceRows& rows);
  Unit Split(const Job& job, int64_t split) const;
  Layout LayOut(const Job& job) const;
  Partial PartialOf(const Job& job, const Layout& layout, int64_t split, int64_t h) const;
  Task Take();
  bool PrepareMemory(Job* job, Memory* scratch);
  void Attend(const Task& task, char* scratch, Task* next);
  void Merge(const Job& job, int64_t h);

  Plan plan_;
  const Kernel& kernel_;
  std::vector<Job> jobs_;
  int64_t num_units_ = 0;
  int64_t bytes_ = 0;
  int64_t heads_per_unit_ = 0;
  int64_t pages_per_split_ = 0;
  int64_t workspace_size_ = 0;  // of the largest job
  int64_t scratch_size_ = 0;    // of the largest unit

  std::mutex mutex_;  // guards what follows, and what changes in the jobs
  size_t next_job_ = 0;
  int64_t next_split_ = 0;
  std::vector<Job*> to_merge_;  // jobs some of whose heads no one merges yet
  int64_t unfinished_ = 0;      // splits to attend to, and kv heads of jobs to merge
  bool out_of_memory_ = false;
  std::vector<Memory> free_workspaces_;
};

}  // namespace jax_nsa::cpu::compressed

#endif  // JAX_NSA_CPU_COMPRESS_ATTENTION_RUN_H_
