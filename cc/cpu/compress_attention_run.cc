#include "cpu/compress_attention_run.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <utility>

#include "cpu/sizes.h"
#include "cpu/top_blocks.h"

namespace jax_nsa::cpu::compressed {
namespace {

// Sizes that were measured to serve; docs/journal/cpu.md tells how.
constexpr int64_t kTileBytes = 384 << 10;  // of keys and values in a tile: a share of the L2 cache
constexpr int64_t kUnitRows = 512;         // of all panels of a unit
constexpr int64_t kMinUnitBytes = 1024 << 10;  // work that pays for a merge
constexpr int64_t kMaxUnitBytes = 4 << 20;
constexpr int64_t kUnits = 64;  // that a large call should have, for many threads

// Rows of a panel in memory: a power of two that divides a vector, or whole vectors.
int64_t PaddedRows(int64_t rows, int64_t lanes) {
  if (rows > lanes) return RoundUp(rows, lanes);
  int64_t padded = 1;
  while (padded < rows) padded *= 2;
  return padded;
}

// Calls the function; false if it ran out of memory.
template <typename Function>
bool HasMemory(Function function) {
  try {
    function();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

Run::Run(const Problem& problem, const Arrays& arrays, const Kernel& kernel,
         const std::vector<bool>& faulty)
    : kernel_(kernel) {
  plan_.problem = problem;
  plan_.arrays = arrays;
  plan_.group = problem.group();
  plan_.strides_per_select_block = problem.blocks.strides_per_select_block();
  plan_.num_taps = problem.blocks.num_taps();
  plan_.closing = problem.blocks.aligned ? 1 : 0;
  plan_.max_blocks = problem.max_blocks();
  plan_.exponent_scale = ExponentScale(problem.scale);
  for (int64_t o = 0; o < plan_.num_taps; ++o) {
    plan_.weights[o] = static_cast<float>(problem.blocks.Weight(o));
  }

  const int64_t head_bytes = (problem.head_size + problem.value_size) * ElementSize(problem.dtype);
  const int64_t tokens_per_panel = std::max<int64_t>(1, kMaxRows / plan_.group);
  std::vector<SequenceRows> rows(problem.sequences);
  int64_t most_tokens = 1;
  for (int64_t b = 0; b < problem.sequences; ++b) {
    FindRows(problem, arrays, b, &rows[b]);
    if (!faulty.empty() && faulty[b]) rows[b].count = 0;
    most_tokens = std::max(most_tokens, rows[b].count);
    bytes_ += CeilDiv(rows[b].count, tokens_per_panel) * arrays.lengths[b] *
              problem.key_value_heads * head_bytes;
  }

  // All kv heads of a row lie side by side: a unit takes as many as its state and tile allow.
  const int64_t panel_rows = std::min(most_tokens * plan_.group, kMaxRows);
  const int64_t most_heads =
      std::min({problem.key_value_heads, std::max<int64_t>(1, kUnitRows / panel_rows),
                std::max<int64_t>(1, kTileBytes / (kPositionGranule * head_bytes))});
  heads_per_unit_ = CeilDiv(problem.key_value_heads, CeilDiv(problem.key_value_heads, most_heads));
  const int64_t position_bytes = heads_per_unit_ * head_bytes;
  plan_.tiles_per_page = std::min(CeilDiv(problem.page_size * position_bytes, kTileBytes),
                                  problem.page_size / kPositionGranule);
  plan_.tile_size = RoundUp(CeilDiv(problem.page_size, plan_.tiles_per_page), kPositionGranule);
  plan_.tiles_per_page = CeilDiv(problem.page_size, plan_.tile_size);
  const int64_t unit_bytes = std::clamp(bytes_ / kUnits, kMinUnitBytes, kMaxUnitBytes);
  pages_per_split_ = std::max<int64_t>(1, unit_bytes / (problem.page_size * position_bytes));

  int64_t panels = 0;
  for (const SequenceRows& r : rows) panels += CeilDiv(r.count, tokens_per_panel);
  jobs_.reserve(panels * CeilDiv(problem.key_value_heads, heads_per_unit_));
  to_merge_.reserve(jobs_.capacity());
  free_workspaces_.reserve(jobs_.capacity());
  // Rows that no sequence claims, then those of each.
  if (problem.sequences > 0) FillRows(0, rows[0].first, kAbsent);
  for (int64_t b = 0; b < problem.sequences; ++b) {
    if (!faulty.empty() && faulty[b]) {
      FillRows(rows[b].first, rows[b].first + rows[b].owned, kFaulty);
    } else {
      AddJobs(b, rows[b]);
    }
  }
  for (const Job& job : jobs_) {
    const Layout layout = LayOut(job);
    workspace_size_ =
        std::max(workspace_size_, job.unit.heads * (job.splits * layout.partial() + layout.sums()));
    scratch_size_ =
        std::max(scratch_size_, kernel.scratch_size(plan_, job.unit.heads, job.unit.padded_rows));
  }
}

void Run::AddJobs(int64_t sequence, const SequenceRows& rows) {
  const Problem& problem = plan_.problem;
  const int64_t length = plan_.arrays.lengths[sequence];
  const int64_t tokens = length > 0 ? rows.count : 0;
  FillRows(rows.first + tokens, rows.first + rows.owned, kAbsent);
  if (length == 0 && problem.blocks.aligned) SelectWithoutPositions(sequence, rows);
  const int64_t tokens_per_panel = std::max<int64_t>(1, kMaxRows / plan_.group);
  for (int64_t token = 0; token < tokens; token += tokens_per_panel) {
    for (int64_t head = 0; head < problem.key_value_heads; head += heads_per_unit_) {
      Job job = {};
      Unit& unit = job.unit;
      unit.sequence = sequence;
      unit.length = length;
      unit.first_row = rows.first + token;
      unit.tokens = std::min(tokens_per_panel, tokens - token);
      unit.count = rows.count;
      unit.first_token = token;
      unit.num_blocks =
          NumBlocks(problem, plan_.arrays, sequence, rows.count, token + unit.tokens - 1);
      unit.early = std::clamp<int64_t>(rows.early - token, 0, unit.tokens);
      unit.padded_rows = PaddedRows(unit.tokens * plan_.group, kernel_.lanes);
      unit.first_head = head;
      unit.heads = std::min(heads_per_unit_, problem.key_value_heads - head);
      unit.headroom = Headroom(length);
      unit.begin = 0;
      unit.end = length;
      const int64_t pages = CeilDiv(length, problem.page_size);
      job.pages_per_split = CeilDiv(pages, CeilDiv(pages, pages_per_split_));
      job.splits = CeilDiv(pages, job.pages_per_split);
      job.unfinished = job.splits;
      job.unmerged = unit.heads;
      num_units_ += job.splits;
      unfinished_ += job.splits + unit.heads;
      jobs_.push_back(std::move(job));
    }
  }
}

// Before any position is compressed, all blocks that are not forced are of equal importance.
void Run::SelectWithoutPositions(int64_t sequence, const SequenceRows& rows) {
  const Problem& problem = plan_.problem;
  std::vector<RankedBlock> heap;
  for (int64_t t = 0; t < rows.count; ++t) {
    const int64_t blocks = NumBlocks(problem, plan_.arrays, sequence, rows.count, t);
    const std::vector<float> importance(blocks, 0.0f);
    for (int64_t head = 0; head < problem.key_value_heads; ++head) {
      const int64_t row = (rows.first + t) * problem.key_value_heads + head;
      SelectBlocks(importance.data(), blocks, problem, heap,
                   plan_.arrays.topk_indices + row * problem.select_count);
    }
  }
}

// Gives rows [first, end) the results of rows without a token, or of faulty sequences: NaN.
void Run::FillRows(int64_t first, int64_t end, Why why) {
  if (first >= end) return;
  const Problem& problem = plan_.problem;
  const Arrays& arrays = plan_.arrays;
  const int64_t row_size = problem.heads * problem.value_size;
  const int64_t begin = first * row_size, count = (end - first) * row_size;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  if (problem.attention_dtype == DataType::kFloat32) {
    std::fill_n(static_cast<float*>(arrays.attention) + begin, count, why == kFaulty ? kNaN : 0.0f);
  } else {
    const uint16_t nan = problem.attention_dtype == DataType::kBFloat16 ? 0x7fc0 : 0x7e00;
    std::fill_n(static_cast<uint16_t*>(arrays.attention) + begin, count,
                why == kFaulty ? nan : uint16_t{0});
  }
  const int64_t row_indices = problem.key_value_heads * problem.select_count;
  std::fill_n(arrays.topk_indices + first * row_indices, (end - first) * row_indices, -1);
  if (arrays.lse) {
    std::fill_n(arrays.lse + first * problem.heads, (end - first) * problem.heads,
                why == kFaulty ? kNaN : -std::numeric_limits<float>::infinity());
  }
  if (arrays.block_scores) {
    const int64_t row_scores = problem.heads * plan_.max_blocks;
    std::fill_n(arrays.block_scores + first * row_scores, (end - first) * row_scores,
                why == kFaulty ? kNaN : 0.0f);
  }
}

Unit Run::Split(const Job& job, int64_t split) const {
  Unit unit = job.unit;
  const int64_t positions = job.pages_per_split * plan_.problem.page_size;
  unit.begin = split * positions;
  unit.end = std::min(unit.length, unit.begin + positions);
  return unit;
}

Run::Layout Run::LayOut(const Job& job) const {
  const auto floats = [](int64_t count) {
    return RoundUp(count * static_cast<int64_t>(sizeof(float)), kAlignment);
  };
  const Unit& unit = job.unit;
  const int64_t rows = unit.padded_rows, lanes = kernel_.lanes;
  const int64_t positions = job.pages_per_split * plan_.problem.page_size;
  // Beside the blocks that begin and close in a split there are those that only do the one.
  const int64_t blocks = (positions + plan_.num_taps) / plan_.strides_per_select_block + 2;
  Layout layout;
  layout.attention = floats(rows * RoundUp(plan_.problem.value_size, 2 * lanes));
  layout.state = floats(std::max(rows, lanes));
  // Kernels read whole vectors of these.
  layout.tile_peaks = floats(job.pages_per_split * plan_.tiles_per_page * rows + lanes);
  layout.scores = floats(std::min(blocks, unit.num_blocks) * rows + lanes);
  layout.importance = floats(unit.tokens * unit.num_blocks);
  return layout;
}

Partial Run::PartialOf(const Job& job, const Layout& layout, int64_t split, int64_t h) const {
  const Unit unit = Split(job, split);
  const int64_t stride = plan_.strides_per_select_block;
  Partial partial;
  partial.first_block = std::max<int64_t>(0, CeilDiv(unit.begin + plan_.closing, stride) - 1);
  partial.last_block =
      std::max(partial.first_block,
               std::min(unit.num_blocks, (unit.end - 2 + plan_.num_taps + plan_.closing) / stride));
  char* next = job.workspace.get() + (split * unit.heads + h) * layout.partial();
  const auto take = [&](int64_t bytes) {
    return reinterpret_cast<float*>(std::exchange(next, next + bytes));
  };
  partial.attention = take(layout.attention);
  partial.peak = take(layout.state);
  partial.total = take(layout.state);
  partial.tile_peaks = take(layout.tile_peaks);
  partial.scores = take(layout.scores);
  return partial;
}

// Takes the next split, if there is one.
Run::Task Run::Take() {
  Task task;
  if (next_job_ == jobs_.size()) return task;
  task.job = &jobs_[next_job_];
  task.split = next_split_++;
  task.unit = Split(*task.job, task.split);
  if (next_split_ == task.job->splits) {
    ++next_job_;
    next_split_ = 0;
  }
  return task;
}

// The memory for a split of the job; false if there is none left.
bool Run::PrepareMemory(Job* job, Memory* scratch) {
  if (!job->workspace) {
    if (free_workspaces_.empty()) free_workspaces_.push_back(Allocate(workspace_size_));
    job->workspace = std::move(free_workspaces_.back());
    free_workspaces_.pop_back();
  }
  if (!*scratch) *scratch = Allocate(scratch_size_);
  out_of_memory_ |= !job->workspace || !*scratch;
  return !out_of_memory_;
}

bool Run::Work(const CallHelp& call_help) {
  Memory scratch;
  std::unique_lock<std::mutex> lock(mutex_);
  for (Task task = Take(); task.job != nullptr || !to_merge_.empty();) {
    if (!to_merge_.empty()) {
      Job* const job = to_merge_.back();
      const int64_t head = job->merging++;
      if (job->merging == job->unit.heads) to_merge_.pop_back();
      lock.unlock();
      const bool merged = HasMemory([&] { Merge(*job, head); });
      lock.lock();
      out_of_memory_ |= !merged;
      if (--job->unmerged == 0) free_workspaces_.push_back(std::move(job->workspace));
    } else {
      Job* const job = task.job;
      if (PrepareMemory(job, &scratch)) {
        Task next;
        lock.unlock();
        const bool attended = HasMemory([&] { Attend(task, scratch.get(), &next); });
        lock.lock();
        out_of_memory_ |= !attended;
        task = attended ? next : Take();
      } else {
        task = Take();
      }
      if (--job->unfinished == 0) {
        if (out_of_memory_) {
          unfinished_ -= job->unit.heads;
        } else {
          to_merge_.push_back(job);
          // Those who found nothing left to take are gone.
          if (next_job_ == jobs_.size() && job->unit.heads > 1 && workspace_size_ >= kSerialBytes) {
            lock.unlock();
            call_help(job->unit.heads - 1);
            lock.lock();
          }
        }
      }
    }
    if (--unfinished_ == 0) return true;
  }
  return false;
}

// Attends to a split and takes the next.
void Run::Attend(const Task& task, char* scratch, Task* next) {
  struct Taker {
    Run* run;
    Task* next;
  } taker = {this, next};
  const auto take = [](void* pointer) -> const Unit* {
    const Taker& taker = *static_cast<Taker*>(pointer);
    const std::lock_guard<std::mutex> lock(taker.run->mutex_);
    *taker.next = taker.run->Take();
    return taker.next->job != nullptr ? &taker.next->unit : nullptr;
  };
  const Layout layout = LayOut(*task.job);
  std::vector<Partial> partials(task.unit.heads);
  for (int64_t h = 0; h < task.unit.heads; ++h) {
    partials[h] = PartialOf(*task.job, layout, task.split, h);
  }
  kernel_.attend(plan_, task.unit, {take, &taker}, partials.data(), scratch);
}

// Merges the partials of the job's kv head h.
void Run::Merge(const Job& job, int64_t h) {
  const Problem& problem = plan_.problem;
  const Arrays& arrays = plan_.arrays;
  const Unit& unit = job.unit;
  const Layout layout = LayOut(job);
  char* const sums =
      job.workspace.get() + unit.heads * job.splits * layout.partial() + h * layout.sums();
  float* const importance = reinterpret_cast<float*>(sums);
  float* const peak = reinterpret_cast<float*>(sums + layout.importance);
  float* const total = reinterpret_cast<float*>(sums + layout.importance + layout.state);
  std::vector<Partial> partials(job.splits);
  for (int64_t s = 0; s < job.splits; ++s) partials[s] = PartialOf(job, layout, s, h);
  const int64_t head = unit.first_head + h;
  std::vector<RankedBlock> heap;
  heap.reserve(std::min(problem.select_count, unit.num_blocks));
  std::fill_n(importance, unit.tokens * unit.num_blocks, 0.0f);
  const int64_t rows = unit.tokens * plan_.group;
  const auto query_row = [&](int64_t r) {
    return (unit.first_row + r / plan_.group) * problem.heads + head * plan_.group +
           r % plan_.group;
  };
  if (arrays.block_scores) {
    for (int64_t r = 0; r < rows; ++r) {
      std::fill_n(arrays.block_scores + query_row(r) * plan_.max_blocks, plan_.max_blocks, 0.0f);
    }
  }
  kernel_.merge(plan_, unit, head, job.splits, job.pages_per_split, partials.data(), importance,
                peak, total);
  if (arrays.lse) {
    for (int64_t r = 0; r < rows; ++r) {
      // Of a sum of powers of two, as kernels take scores. -inf where nothing was summed.
      const double log2_sum =
          double{peak[r]} * plan_.exponent_scale + std::log2(double{total[r]}) + unit.headroom;
      const double lse = log2_sum * std::log(2.0);
      arrays.lse[query_row(r)] = static_cast<float>(lse);
    }
  }
  for (int64_t t = 0; t < unit.tokens; ++t) {
    const int64_t row = (unit.first_row + t) * problem.key_value_heads + head;
    const int64_t blocks =
        NumBlocks(problem, arrays, unit.sequence, unit.count, unit.first_token + t);
    SelectBlocks(importance + t * unit.num_blocks, blocks, problem, heap,
                 arrays.topk_indices + row * problem.select_count);
  }
}

}  // namespace jax_nsa::cpu::compressed
