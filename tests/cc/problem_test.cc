// Which rows a sequence has, for dense and ragged queries and for operands that hold nonsense.

#include <cstdint>
#include <limits>
#include <vector>

#include "compress_attention.h"
#include "expect.h"

namespace jax_nsa::compress_attention {
namespace {

constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
constexpr int32_t kNonsense[] = {kMin, -2, -1, 0, 1, 3, 4, 5, 9, 10, 11, kMax};

struct Operands {
  std::vector<int32_t> lengths, token_counts, early_counts, first_rows, select_lengths = {};
};

struct Found {
  Fault fault;
  SequenceRows rows;
};

// Sequences with two pages of 16 rows; with `tokens` rows each, or ragged where it is 0.
Found Find(const Operands& operands, int64_t b, int64_t tokens, int64_t rows) {
  Problem problem = {};
  problem.sequences = static_cast<int64_t>(operands.lengths.size());
  problem.rows = rows;
  problem.tokens = tokens;
  problem.page_size = 16;
  problem.pages_per_sequence = 2;
  const auto data = [](const std::vector<int32_t>& values) {
    return values.empty() ? nullptr : values.data();
  };
  Arrays arrays = {};
  arrays.lengths = data(operands.lengths);
  arrays.token_counts = data(operands.token_counts);
  arrays.early_counts = data(operands.early_counts);
  arrays.first_rows = data(operands.first_rows);
  arrays.select_lengths = data(operands.select_lengths);
  problem.blocks = {32, 16, 64, arrays.select_lengths != nullptr};
  Found found = {};
  found.fault = FindRows(problem, arrays, b, &found.rows);
  return found;
}

bool Has(const SequenceRows& rows, int64_t first, int64_t owned, int64_t count, int64_t early) {
  return rows.first == first && rows.owned == owned && rows.count == count && rows.early == early;
}

void TestDense() {
  const Found whole = Find({{8, 0, 32}, {}, {}, {}}, 2, 4, 12);
  EXPECT(whole.fault == Fault::kNone && Has(whole.rows, 8, 4, 4, 0)) << whole.rows.first;
  const Found part = Find({{8, 0, 32}, {4, 3, 0}, {0, 2, 0}, {}}, 1, 4, 12);
  EXPECT(part.fault == Fault::kNone && Has(part.rows, 4, 4, 3, 2)) << part.rows.first;
  EXPECT(Find({{8}, {5}, {0}, {}}, 0, 4, 4).fault == Fault::kTokenCount);
  EXPECT(Find({{8}, {-1}, {0}, {}}, 0, 4, 4).fault == Fault::kTokenCount);
  EXPECT(Find({{8}, {4}, {-1}, {}}, 0, 4, 4).fault == Fault::kOriginalLength);
  EXPECT(Find({{33}, {}, {}, {}}, 0, 4, 4).fault == Fault::kLength);
  EXPECT(Find({{-1}, {}, {}, {}}, 0, 4, 4).fault == Fault::kLength);
}

void TestRagged() {
  const Operands operands = {{8, 0, 32}, {2, 0, 3}, {1, 0, 0}, {0, 2, 2}};
  EXPECT(Has(Find(operands, 0, 0, 10).rows, 0, 2, 2, 1)) << "the first";
  EXPECT(Has(Find(operands, 1, 0, 10).rows, 2, 0, 0, 0)) << "one without tokens";
  EXPECT(Has(Find(operands, 2, 0, 10).rows, 2, 8, 3, 0)) << "the last owns the rest";
  for (int64_t b = 0; b < 3; ++b) EXPECT(Find(operands, b, 0, 10).fault == Fault::kNone) << b;
  EXPECT(Find({{8, 8}, {4, 7}, {0, 0}, {0, 4}}, 1, 0, 10).fault == Fault::kTokenCount);
}

// Whatever the operands hold, rows stay inside the arrays, and only good sequences have tokens.
void TestNonsense() {
  for (int32_t count : kNonsense) {
    for (int32_t early : kNonsense) {
      for (int32_t first : kNonsense) {
        for (int32_t next : kNonsense) {
          const Operands operands = {{8, 8}, {count, count}, {early, early}, {first, next}};
          for (int64_t b : {0, 1}) {
            const Found found = Find(operands, b, 0, 10);
            const SequenceRows& rows = found.rows;
            EXPECT(rows.first >= 0 && rows.owned >= 0 && rows.first + rows.owned <= 10 &&
                   rows.count >= 0 && rows.count <= rows.owned)
                << "count=" << count << " first=" << first << " next=" << next << " b=" << b;
            const bool good = found.fault == Fault::kNone;
            EXPECT(good == (count >= 0 && count <= rows.owned && early >= 0))
                << "count=" << count << " owned=" << rows.owned << " early=" << early;
          }
        }
      }
    }
  }
}

// Original lengths must be those that compress to the sequence's length.
void TestAligned() {
  const auto fault = [](int32_t length, int32_t original) {
    return Find({{length}, {}, {}, {}, {original}}, 0, 1, 1).fault;
  };
  EXPECT(fault(2, 48) == Fault::kNone && fault(2, 63) == Fault::kNone);
  EXPECT(fault(2, 47) == Fault::kOriginalLength && fault(2, 64) == Fault::kOriginalLength);
  EXPECT(fault(0, 0) == Fault::kNone && fault(0, 31) == Fault::kNone);
  EXPECT(fault(0, 32) == Fault::kOriginalLength && fault(0, -1) == Fault::kOriginalLength);
}

void TestVisible() {
  const SequenceRows rows = {0, 3, 3, 2};
  EXPECT(rows.Visible(0, 7) == 6 && rows.Visible(1, 7) == 6 && rows.Visible(2, 7) == 7);
  EXPECT(rows.Visible(0, 1) == 0);
  EXPECT(rows.Visible(0, 0) == 0) << "an empty sequence has no last position";
}

void TestPages() {
  Problem problem = {};
  problem.num_pages = 4;
  for (int32_t id : {0, 3}) EXPECT(IsPage(problem, id)) << id;
  for (int32_t id : {kMin, -1, 4, kMax}) EXPECT(!IsPage(problem, id)) << id;
}

}  // namespace
}  // namespace jax_nsa::compress_attention

int main() {
  jax_nsa::compress_attention::TestDense();
  jax_nsa::compress_attention::TestRagged();
  jax_nsa::compress_attention::TestNonsense();
  jax_nsa::compress_attention::TestAligned();
  jax_nsa::compress_attention::TestVisible();
  jax_nsa::compress_attention::TestPages();
  return jax_nsa::testing::ExitStatus();
}
