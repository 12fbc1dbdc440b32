#include "cpu/select_rows.h"

#include <algorithm>
#include <bitset>

namespace jax_nsa::cpu::select {
namespace {

// Blocks of the window that may be noted to be chosen too. Those beyond are read for each
// attention.
constexpr int64_t kMostNoted = 1024;

// Appends the runs of spans to the sections of a unit, in order.
class Runs {
 public:
  Runs(const Problem& problem, const int32_t* pages, RowRun* next, Unit* unit)
      : pages_(pages), page_size_(problem.page_size), next_(next), unit_(unit) {}

  void Add(Section section, const Span& span) {
    ForRuns(pages_, page_size_, span, [&](const RowRun& run) {
      *next_++ = run;
      ++unit_->num_runs[section];
      unit_->num_rows[section] += run.count;
    });
  }

 private:
  const int32_t* const pages_;
  const int64_t page_size_;
  RowRun* next_;
  Unit* const unit_;
};

// Blocks of the window, numbered from that of its first position.
class WindowBlocks {
 public:
  WindowBlocks(int64_t block_size, const Span& window)
      : block_size_(block_size),
        window_(window),
        first_(window.begin / block_size),
        count_(window.size() == 0 ? 0 : (window.end - 1) / block_size + 1 - first_) {}

  // Notes that a block is chosen; false where it was before, or cannot be noted.
  bool Note(int64_t id) {
    const int64_t n = id - first_;
    if (n < 0 || n >= std::min(count_, kMostNoted) || chosen_[n]) return false;
    chosen_[n] = true;
    return true;
  }

  // Adds the stretches of blocks that are chosen, or of those that are not.
  void AddTo(Runs* runs, Section section, bool chosen) const {
    for (int64_t n = 0; n < count_;) {
      const int64_t begin = n;
      while (n < count_ && IsChosen(n) == chosen) ++n;
      runs->Add(section, {std::max(window_.begin, (first_ + begin) * block_size_),
                          std::min(window_.end, (first_ + n) * block_size_)});
      while (n < count_ && IsChosen(n) != chosen) ++n;
    }
  }

 private:
  bool IsChosen(int64_t n) const { return n < kMostNoted && chosen_[n]; }

  const int64_t block_size_;
  const Span window_;
  const int64_t first_, count_;
  std::bitset<kMostNoted> chosen_;
};

}  // namespace

int64_t MostRuns(const Problem& problem) {
  const int64_t window = std::min(problem.window_size, problem.capacity());
  // Wherever a span begins, it may lie in one page more than it fills; a block that the window
  // shares cuts the latter in two.
  const auto most = [&](int64_t positions) { return positions / problem.page_size + 2; };
  return problem.select_count * (most(problem.select_block_size) + 2) + most(window);
}

void FindRuns(const Problem& problem, const Arrays& arrays, const Item& item, RowRun* runs,
              Unit* unit) {
  *unit = {};
  unit->row = item.row;
  unit->head = item.head;
  unit->runs = runs;
  const Span window = problem.Window(item.limit);
  Runs sections(problem, arrays.block_table + item.sequence * problem.pages_per_sequence, runs,
                unit);
  if (problem.select_count == 0) return sections.Add(kNewest, window);
  WindowBlocks blocks(problem.select_block_size, window);
  const int32_t* const ids = ChosenBlocks(problem, arrays, item.row, item.head);
  for (int64_t i = 0; i < problem.select_count; ++i) {
    if (ids[i] < 0) continue;
    Span span = problem.Block(ids[i], item.limit);
    if (span.size() > 0 && blocks.Note(ids[i])) span.end = std::min(span.end, window.begin);
    sections.Add(kChosen, span);
  }
  blocks.AddTo(&sections, kShared, true);
  blocks.AddTo(&sections, kNewest, false);
}

void Cut(int64_t begin, int64_t end, RowRun* runs, Unit* unit) {
  RowRun* target = runs;
  const RowRun* source = runs;
  int64_t at = 0;  // rows before the source
  for (int s = 0; s < kSections; ++s) {
    const int64_t count = unit->num_runs[s];
    unit->num_runs[s] = unit->num_rows[s] = 0;
    for (const RowRun* const last = source + count; source != last; ++source) {
      const RowRun run = *source;
      const int64_t first = std::max<int64_t>(0, begin - at), stop = std::min(run.count, end - at);
      at += run.count;
      if (first >= stop) continue;
      *target++ = {run.first + first, stop - first};
      ++unit->num_runs[s];
      unit->num_rows[s] += stop - first;
    }
  }
}

}  // namespace jax_nsa::cpu::select
