// Which positions, rows and windows a call reads, against their definitions position by position.

#include <cstdint>
#include <limits>
#include <vector>

#include "compress.h"
#include "compress_attention.h"
#include "expect.h"
#include "select_attention.h"
#include "spans.h"

namespace jax_nsa {
namespace {

constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();

bool Contains(const Span& span, int64_t position) {
  return span.begin <= position && position < span.end;
}

void TestSpans() {
  for (int64_t end : {0, 1, 15, 16, 17, 40, 48}) {
    for (int64_t id = 0; id < 4; ++id) {
      const Span span = BlockSpan(16, id, end);
      int64_t size = 0;
      for (int64_t p = 0; p < 80; ++p) {
        const bool held = p / 16 == id && p < end;
        EXPECT(Contains(span, p) == held) << "block " << id << " below " << end << ": " << p;
        size += held;
      }
      EXPECT(span.size() == size) << "block " << id << " below " << end;
    }
    for (int64_t count : {1, 2, 7, 100}) {
      for (int64_t limit : {0, 1, 6, 7, 8, 60}) {
        const Span span = NewestSpan(count, limit, end);
        for (int64_t p = 0; p < 80; ++p) {
          EXPECT(Contains(span, p) == (p < limit && p >= limit - count && p < end))
              << count << " newest of " << limit << " below " << end << ": " << p;
        }
        EXPECT(span.begin >= 0);
      }
    }
  }
}

void TestRuns() {
  const int32_t pages[] = {5, 2, 9, 0};
  for (int64_t begin = 0; begin <= 64; ++begin) {
    for (int64_t end = 0; end <= 64; ++end) {
      int64_t position = begin, runs = 0;
      ForRuns(pages, 16, {begin, end}, [&](const RowRun& run) {
        EXPECT(run.count > 0) << begin << " to " << end;
        for (int64_t i = 0; i < run.count; ++i, ++position) {
          EXPECT(run.first + i == pages[position / 16] * 16 + position % 16)
              << begin << " to " << end << " at " << position;
        }
        ++runs;
      });
      EXPECT(position == (end > begin ? end : begin)) << begin << " to " << end;
      EXPECT(runs == (end > begin ? (end - 1) / 16 - begin / 16 + 1 : 0)) << begin << " to " << end;
    }
  }
}

void TestSizes() {
  PagedProblem problem = {};
  problem.heads = 12, problem.key_value_heads = 3;
  problem.page_size = 48, problem.pages_per_sequence = 3;
  EXPECT(problem.group() == 4 && problem.capacity() == 144);
  for (int32_t length : {0, 1, 143, 144}) EXPECT(IsLength(problem, length)) << length;
  for (int32_t length : {kMin, -1, 145, kMax}) EXPECT(!IsLength(problem, length)) << length;
  problem.head_size = 7, problem.value_size = 5;
  EXPECT(problem.key_pitch().head == 7 && problem.key_pitch().row == 21);
  EXPECT(problem.value_pitch().head == 5 && problem.value_pitch().row == 15);
  problem.interleaved = true;
  EXPECT(problem.key_pitch().head == 12 && problem.key_pitch().row == 36);
  EXPECT(problem.value_pitch().head == 12 && problem.value_pitch().row == 36);
  const SequenceRows rows = {0, 4, 4};
  EXPECT(rows.Visible(0, 9) == 9) << "no token is early unless it is said";
}

}  // namespace

namespace compress {
namespace {

// Two sequences with pages of 32 rows, of which the second is tested.
struct Case {
  std::vector<int32_t> table = {7, 7, 7, 7, 4, 0, 3, 1};
  std::vector<int32_t> lengths = {0, 0}, slots = {0, 5}, counts = {1, 1};
  Problem problem = {};
  Arrays arrays = {};

  Case(int64_t size, int64_t stride) {
    problem.sequences = 2, problem.pages_per_sequence = 4;
    problem.num_pages = 5, problem.page_size = 32, problem.rows = 9;
    problem.compress_block_size = size, problem.compress_stride = stride;
    arrays.block_table = table.data(), arrays.lengths = lengths.data();
    arrays.slots = slots.data(), arrays.token_counts = counts.data();
  }
};

void TestWindows(int64_t size, int64_t stride) {
  Case c(size, stride);
  EXPECT(c.problem.capacity() == 128);
  for (int32_t length : {kMin, -1, 129, kMax}) {
    int64_t first;
    c.lengths[1] = length;
    EXPECT(FindWindow(c.problem, c.arrays, 1, &first) == SequenceFault::kLength) << length;
    EXPECT(first == kNoWindow);
  }
  for (int32_t length = 0; length <= 128; ++length) {
    c.lengths[1] = length;
    for (int32_t count : {-1, 0, 1, 2, 15, 16, 17, 31, 32, 33}) {
      int64_t first, want = kNoWindow;
      c.counts[1] = count;
      const bool legal = count >= 0 && count <= stride;
      for (int64_t w = 0; legal && w * stride + size <= length; ++w) {
        if (w * stride + size > length - count) want = w * stride;
      }
      const SequenceFault fault = FindWindow(c.problem, c.arrays, 1, &first);
      EXPECT(fault == (legal ? SequenceFault::kNone : SequenceFault::kTokenCount)) << count;
      EXPECT(first == want) << "l=" << size << " d=" << stride << " length=" << length
                            << " count=" << count << ": " << first << ", not " << want;
      for (int32_t slot : {kMin, -1, 0, 8, 9, kMax}) {
        c.slots[1] = slot;
        EXPECT(NamesRow(c.problem, c.arrays, 1, first) ==
               (want != kNoWindow && slot >= 0 && slot < 9))
            << slot;
      }
      if (first == kNoWindow) continue;
      for (int64_t column = 0; column < 4; ++column) {
        const bool needed = column * 32 < first + size && (column + 1) * 32 > first;
        for (int32_t page : {kMin, -1, 5, kMax}) {
          Case bad(size, stride);
          bad.table[4 + column] = page;
          EXPECT(FindBadPage(bad.problem, bad.arrays, 1, first) == (needed ? column : -1))
              << "column " << column << " window at " << first;
        }
      }
      EXPECT(FindBadPage(c.problem, c.arrays, 1, first) == -1) << "pages 0 and 4 are of 5";
    }
    if (length < 128) {
      EXPECT(RowOfToken(c.problem, c.arrays, 1, length) ==
             c.table[4 + length / 32] * 32 + length % 32)
          << length;
    }
  }
  c.arrays.token_counts = nullptr;
  int64_t first;
  c.lengths[1] = static_cast<int32_t>(size + stride);
  FindWindow(c.problem, c.arrays, 1, &first);
  EXPECT(first == stride) << "one token each where no counts are given";
  ++c.lengths[1];
  FindWindow(c.problem, c.arrays, 1, &first);
  EXPECT(first == kNoWindow) << "one token each where no counts are given";
}

}  // namespace
}  // namespace compress

namespace compress_attention {
namespace {

void TestBlocksOfTokens() {
  Problem problem = {};
  problem.page_size = 16, problem.pages_per_sequence = 2;
  const int32_t lengths[] = {0, 30}, original[] = {0, 513};
  Arrays arrays = {};
  arrays.lengths = lengths, arrays.select_lengths = original;
  for (bool aligned : {false, true}) {
    problem.blocks = {32, 16, 64, aligned};
    // Of 30 windows 16 tokens apart, or of 513 tokens.
    const int64_t blocks = aligned ? (513 + 63) / 64 : (29 * 16 + 32 + 63) / 64;
    EXPECT(NumBlocks(problem, arrays, 1, 3, 0) == blocks);
    // 32 windows, and as many more tokens as make no further one.
    EXPECT(problem.max_blocks() == (31 * 16 + 32 + (aligned ? 15 : 0) + 63) / 64);
  }
  problem.causal = true;
  for (int64_t t = 0; t < 60; ++t) {
    EXPECT(NumBlocks(problem, arrays, 1, 60, t) == (513 - (59 - t) + 63) / 64) << t;
  }
}

}  // namespace
}  // namespace compress_attention

namespace select_attention {
namespace {

// Two packed sequences of 3 and 2 tokens with two kv heads, the second with pages 4 and 0 of 16.
struct Case {
  std::vector<int32_t> table = {7, 7, 4, 0}, lengths = {0, 20}, counts = {3, 2}, firsts = {0, 3};
  std::vector<int32_t> ids = std::vector<int32_t>(5 * 2 * 2, -1);
  Problem problem = {};
  Arrays arrays = {};

  Case() {
    problem.sequences = 2, problem.rows = 5, problem.tokens = 0;
    problem.heads = problem.key_value_heads = 2;
    problem.num_pages = 5, problem.page_size = 16, problem.pages_per_sequence = 2;
    problem.select_block_size = 16, problem.select_count = 2;
    arrays.block_table = table.data(), arrays.lengths = lengths.data();
    arrays.token_counts = counts.data(), arrays.first_rows = firsts.data();
    arrays.topk_indices = ids.data();
  }

  // What the last token reads for the second kv head, and the column that is at fault.
  RowFault Check(int64_t* column) const {
    return CheckRow(problem, arrays, 1, 4, 1, Limit(arrays, 1, 2, 1), column);
  }
};

void TestReads() {
  Case c;
  c.problem.window_size = 6;
  EXPECT(c.problem.End(20) == 20 && c.problem.End(32) == 32 && c.problem.End(33) == 32);
  for (int64_t limit : {0, 1, 16, 20, 32, 40}) {
    for (int64_t p = 0; p < 48; ++p) {
      EXPECT(Contains(c.problem.Block(1, limit), p) == (p / 16 == 1 && p < limit && p < 32))
          << "limit " << limit << ": " << p;
      EXPECT(Contains(c.problem.Window(limit), p) == (p < limit && p >= limit - 6 && p < 32))
          << "limit " << limit << ": " << p;
    }
  }
  EXPECT(Limit(c.arrays, 1, 2, 1) == 20 && Limit(c.arrays, 1, 2, 0) == 19);
  for (int64_t row = 0; row < 5; ++row) {
    for (int64_t head : {0, 1}) {
      EXPECT(ChosenBlocks(c.problem, c.arrays, row, head) == &c.ids[(row * 2 + head) * 2]);
    }
  }
}

void TestFaults() {
  for (int32_t length : {kMin, -1, 33, kMax}) {
    Case c;
    SequenceRows rows;
    c.lengths[1] = length;
    EXPECT(FindRows(c.problem, c.arrays, 1, &rows) == Fault::kLength) << length;
    c.problem.partial = true;
    EXPECT(FindRows(c.problem, c.arrays, 1, &rows) == Fault::kNone) << length;
    c.counts[1] = 3;
    EXPECT(FindRows(c.problem, c.arrays, 1, &rows) == Fault::kTokenCount) << length;
  }
  Case c;
  for (int32_t id : {-1, 0, 1}) EXPECT(IsBlock(c.problem, 20, id)) << id;
  EXPECT(IsBlock(c.problem, 17, 1) && !IsBlock(c.problem, 16, 1));
  for (int32_t id : {kMin, -2, 2, kMax}) {
    Case bad;
    EXPECT(!IsBlock(bad.problem, 20, id)) << id;
    for (int64_t at : {0, 1}) {
      Case one;
      int64_t column = -1;
      one.ids[(4 * 2 + 1) * 2 + at] = id;
      EXPECT(one.Check(&column) == RowFault::kBlock && column == at) << id << " at " << at;
    }
    bad.problem.partial = true;
    EXPECT(IsBlock(bad.problem, 20, id)) << id;
  }
}

void TestPagesOfRows() {
  for (int64_t at : {0, 1}) {
    for (int32_t page : {kMin, -1, 5, kMax}) {
      for (int32_t id : {-1, 0, 1}) {
        for (int64_t window : {0, 4, 5, 20}) {
          for (int64_t rank : {0, 1}) {
            Case c;
            int64_t column = -1;
            c.table[2 + at] = page;
            c.ids[(4 * 2 + 1) * 2 + rank] = id;
            c.problem.window_size = window;
            // Positions 16 to 19 lie in the second page; the window's last are these.
            const bool read = id == at || (window > 0 && (at == 1 || window > 4));
            EXPECT(c.Check(&column) == (read ? RowFault::kPage : RowFault::kNone))
                << "page " << at << " block " << id << " window " << window;
            EXPECT(!read || column == at) << column;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace select_attention
}  // namespace jax_nsa

int main() {
  jax_nsa::TestSpans();
  jax_nsa::TestRuns();
  jax_nsa::TestSizes();
  for (int64_t stride : {16, 32}) {
    for (int64_t size : {32, 48, 64}) jax_nsa::compress::TestWindows(size, stride);
  }
  jax_nsa::compress_attention::TestBlocksOfTokens();
  jax_nsa::select_attention::TestReads();
  jax_nsa::select_attention::TestFaults();
  jax_nsa::select_attention::TestPagesOfRows();
  return jax_nsa::testing::ExitStatus();
}
