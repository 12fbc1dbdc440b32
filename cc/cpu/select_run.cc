#include "cpu/select_run.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "cpu/sizes.h"

namespace jax_nsa::cpu::select {
namespace {

// Sizes that were measured to serve.
constexpr int64_t kUnits = 64;         // that a large call should have, for many threads
constexpr int64_t kMinUnitRows = 256;  // work that pays for a merge

constexpr int64_t Aligned(int64_t bytes) { return RoundUp(bytes, kAlignment); }

}  // namespace

Run::Run(const Problem& problem, const Arrays& arrays, const Kernel& kernel) : kernel_(kernel) {
  plan_ = {problem, arrays, problem.group(), ExponentScale(problem.scale), 0};
  items_ = problem.rows * problem.key_value_heads;
  const int64_t row_bytes = (problem.head_size + problem.value_size) * ElementSize(problem.dtype);
  const RowCounts counts = CountRows();
  bytes_ = counts.all * row_bytes;
  // Of shapes alone: a device that has some of the sequences gives the bits that one with all
  // gives.
  plan_.headroom = Headroom(std::max(problem.select_count * problem.select_block_size,
                                     std::min(problem.window_size, problem.capacity())));
  units_per_item_ = 1;
  if (items_ > 0 && bytes_ >= kSerialBytes) {
    units_per_item_ = std::clamp<int64_t>(counts.most / kMinUnitRows, 1, CeilDiv(kUnits, items_));
  }
  num_units_ = items_ * units_per_item_;
  most_runs_ = MostRuns(problem);
  scratch_size_ = Aligned(kernel.scratch_size(plan_));
  const int64_t state = std::max(plan_.group, kernel.lanes);
  const int64_t columns = RoundUp(problem.value_size, 2 * kernel.lanes);
  partial_size_ = Aligned(4 * plan_.group * columns) + 3 * Aligned(4 * state);
  if (units_per_item_ > 1) AllocatePartials();
}

Run::RowCounts Run::CountRows() const {
  const Problem& problem = plan_.problem;
  RowCounts counts = {};
  for (int64_t b = 0; b < problem.sequences; ++b) {
    SequenceRows rows;
    FindRows(problem, plan_.arrays, b, &rows);
    const int64_t length = std::max<int64_t>(0, problem.End(plan_.arrays.lengths[b]));
    const int64_t chosen = problem.select_count * problem.select_block_size;
    const int64_t each = std::min(length, chosen) + std::min(length, problem.window_size);
    counts.all += rows.count * problem.key_value_heads * each;
    if (rows.count > 0) counts.most = std::max(counts.most, each);
  }
  return counts;
}

// Memory for the partials of all items.
void Run::AllocatePartials() {
  const int64_t count = items_ * partials_per_item();
  const int64_t counters = Aligned(items_ * static_cast<int64_t>(sizeof *unfinished_));
  partials_memory_ = Allocate(counters + Aligned(count) + count * partial_size_);
  if (!partials_memory_) {
    out_of_memory_ = true;
    return;
  }
  unfinished_ = reinterpret_cast<std::atomic<int32_t>*>(partials_memory_.get());
  for (int64_t i = 0; i < items_; ++i) {
    new (unfinished_ + i) std::atomic<int32_t>(static_cast<int32_t>(units_per_item_));
  }
  sections_ = reinterpret_cast<int8_t*>(partials_memory_.get() + counters);
  std::memset(sections_, -1, count);
  partials_ = partials_memory_.get() + counters + Aligned(count);
}

Partial Run::PartialAt(char* partials, int64_t number) const {
  const int64_t state = Aligned(4 * std::max(plan_.group, kernel_.lanes));
  char* const end = partials + (number + 1) * partial_size_;
  const auto floats = [](char* memory) { return reinterpret_cast<float*>(memory); };
  return {floats(partials + number * partial_size_), floats(end - 3 * state),
          floats(end - 2 * state), floats(end - state)};
}

// The tokens of a sequence follow each other for each kv head: they read much the same rows.
Run::Source Run::FindItem(int64_t index, Item* item) const {
  const Problem& problem = plan_.problem;
  const Arrays& arrays = plan_.arrays;
  const int64_t heads = problem.key_value_heads;
  *item = {-1, index / heads, index % heads, 0};
  if (arrays.first_rows == nullptr) {
    item->sequence = item->row / problem.tokens;
  } else {
    const int32_t* const end = arrays.first_rows + problem.sequences;
    item->sequence = std::upper_bound(arrays.first_rows, end, item->row) - arrays.first_rows - 1;
  }
  if (item->sequence < 0) return Source::kNothing;
  SequenceRows rows;
  const Fault fault = FindRows(problem, arrays, item->sequence, &rows);
  const int64_t within = index - rows.first * heads;
  const int64_t token = within % rows.owned;
  item->row = rows.first + token;
  item->head = within / rows.owned;
  if (fault != Fault::kNone) return Source::kNaN;
  if (token >= rows.count) return Source::kNothing;
  item->limit = Limit(arrays, item->sequence, rows.count, token);
  int64_t column;
  const RowFault row_fault =
      CheckRow(problem, arrays, item->sequence, item->row, item->head, item->limit, &column);
  return row_fault == RowFault::kNone ? Source::kPartials : Source::kNaN;
}

void Run::FillNaN(const Item& item) const {
  const Problem& problem = plan_.problem;
  const int64_t first = item.row * problem.heads + item.head * plan_.group;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const auto fill = [&](void* attention, float* lse) {
    const int64_t begin = first * problem.value_size, count = plan_.group * problem.value_size;
    if (attention && problem.attention_dtype == DataType::kFloat32) {
      std::fill_n(static_cast<float*>(attention) + begin, count, kNaN);
    } else if (attention) {
      const uint16_t nan = problem.attention_dtype == DataType::kBFloat16 ? 0x7fc0 : 0x7e00;
      std::fill_n(static_cast<uint16_t*>(attention) + begin, count, nan);
    }
    if (lse) std::fill_n(lse + first, plan_.group, kNaN);
  };
  fill(plan_.arrays.attention, plan_.arrays.lse);
  fill(plan_.arrays.window_attention, plan_.arrays.window_lse);
}

// Merges the partials of an item into each attention that is wanted.
void Run::Merge(const Item& item, char* partials, const int8_t* sections, int64_t count,
                char* scratch) const {
  constexpr int64_t kMost = kUnits + kSections;
  Partial all[kMost];
  const Partial* chosen[kMost];
  const auto merge = [&](Section without, void* attention, float* lse) {
    if (attention == nullptr) return;
    int64_t taken = 0;
    for (int64_t n = 0; n < count; ++n) {
      if (sections[n] < 0 || sections[n] == without) continue;
      all[n] = PartialAt(partials, n);
      chosen[taken++] = &all[n];
    }
    kernel_.merge(plan_, item.row, item.head, chosen, taken, attention, lse, scratch);
  };
  merge(kNewest, plan_.arrays.attention, plan_.arrays.lse);
  merge(kChosen, plan_.arrays.window_attention, plan_.arrays.window_lse);
}

class Run::Worker {
 public:
  explicit Worker(Run* run) : run_(*run) {
    const int64_t runs = Aligned(run_.most_runs_ * static_cast<int64_t>(sizeof(RowRun)));
    const bool own_partials = run_.units_per_item_ == 1;
    memory_ = Allocate(run_.scratch_size_ + 2 * runs +
                       (own_partials ? run_.partials_per_item() * run_.partial_size_ : 0));
    scratch_ = memory_.get();
    for (int i = 0; i < 2; ++i) {
      tasks_[i].runs = reinterpret_cast<RowRun*>(scratch_ + run_.scratch_size_ + i * runs);
    }
    partials_ = scratch_ + run_.scratch_size_ + 2 * runs;
  }

  bool has_memory() const { return memory_ != nullptr; }

  // Does units until there is none left to take; how many.
  int64_t DoAll() {
    int64_t done = 0;
    for (Take(); present().index < run_.num_units_; ++done) {
      const Task& task = present();
      if (task.source == Source::kPartials && task.rows() > 0) {
        Attend(task);
      } else {
        Take();
      }
      Finish(task);
    }
    return done;
  }

 private:
  // A unit, and the item that it is of.
  struct Task {
    int64_t index;
    Item item;
    Source source;
    Unit unit;
    RowRun* runs;

    int64_t rows() const {
      return unit.num_rows[kChosen] + unit.num_rows[kShared] + unit.num_rows[kNewest];
    }
  };

  Task& present() { return tasks_[present_]; }

  // Takes the next unit, which is the present one from now on. Another may still be worked on.
  void Take() {
    present_ = 1 - present_;
    Task& task = present();
    task.index = run_.next_.fetch_add(1, std::memory_order_relaxed);
    task.unit = {};
    if (task.index >= run_.num_units_) return;
    task.source = run_.FindItem(task.index / run_.units_per_item_, &task.item);
    if (task.source != Source::kPartials) return;
    FindRuns(run_.plan_.problem, run_.plan_.arrays, task.item, task.runs, &task.unit);
    if (run_.units_per_item_ == 1) return;
    // Each as many rows, in whole tiles.
    const int64_t rows = RoundUp(CeilDiv(task.rows(), run_.units_per_item_), kTileRows);
    const int64_t begin = part(task) * rows;
    Cut(begin, begin + rows, task.runs, &task.unit);
  }

  void Attend(const Task& task) {
    const auto take = [](void* worker) -> const Unit* {
      Worker& self = *static_cast<Worker*>(worker);
      self.Take();
      return self.present().rows() > 0 ? &self.present().unit : nullptr;
    };
    Partial partials[kSections];
    for (int s = 0; s < kSections; ++s) {
      partials[s] = run_.PartialAt(partials_of(task), part(task) + s);
      if (task.unit.num_rows[s] > 0) sections_of(task)[part(task) + s] = static_cast<int8_t>(s);
    }
    run_.kernel_.attend(run_.plan_, task.unit, {take, this}, partials, scratch_);
  }

  // Merges the item if this was its last unit.
  void Finish(const Task& task) {
    const int64_t item = task.index / run_.units_per_item_;
    if (run_.units_per_item_ > 1 &&
        run_.unfinished_[item].fetch_sub(1, std::memory_order_acq_rel) > 1) {
      return;
    }
    if (task.source == Source::kNaN) {
      run_.FillNaN(task.item);
    } else {
      run_.Merge(task.item, partials_of(task), sections_of(task), run_.partials_per_item(),
                 scratch_);
    }
    std::fill_n(own_sections_, kSections, int8_t{-1});
  }

  int64_t part(const Task& task) const { return task.index % run_.units_per_item_; }

  char* partials_of(const Task& task) {
    if (run_.units_per_item_ == 1) return partials_;
    return run_.partials_ +
           task.index / run_.units_per_item_ * run_.partials_per_item() * run_.partial_size_;
  }

  int8_t* sections_of(const Task& task) {
    if (run_.units_per_item_ == 1) return own_sections_;
    return run_.sections_ + task.index / run_.units_per_item_ * run_.partials_per_item();
  }

  Run& run_;
  Memory memory_;
  char* scratch_;
  char* partials_;  // where items have one unit
  int8_t own_sections_[kSections] = {-1, -1, -1};
  Task tasks_[2];
  int present_ = 0;
};

bool Run::Work(const CallHelp&) {
  int64_t done = 0;
  Worker worker(this);
  if (!worker.has_memory()) out_of_memory_ = true;
  if (out_of_memory_) {
    while (next_.fetch_add(1, std::memory_order_relaxed) < num_units_) ++done;
  } else {
    done = worker.DoAll();
  }
  // Who did nothing may come when all is finished.
  return done > 0 && finished_.fetch_add(done, std::memory_order_acq_rel) + done == num_units_;
}

}  // namespace jax_nsa::cpu::select
