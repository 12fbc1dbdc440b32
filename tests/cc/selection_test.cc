// Block geometry and order against their definitions, for every legal window.

#include "selection.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <numeric>
#include <vector>

#include "expect.h"

namespace jax_nsa {

std::ostream& operator<<(std::ostream& out, const Blocks& window) {
  return out << "l=" << window.compress_block_size << " d=" << window.compress_stride
             << " l'=" << window.select_block_size << (window.aligned ? " aligned" : "");
}

namespace {

std::vector<Blocks> LegalWindows() {
  std::vector<Blocks> windows;
  for (int64_t d : {16, 32, 48, 64}) {
    for (int64_t l = 16; l <= 128; l += 16) {
      for (int64_t select = 16; select <= 128; select += 16) {
        if (l < d || select < l || select % d != 0) continue;
        windows.push_back({l, d, select});
        windows.push_back({l, d, select, /*aligned=*/true});
      }
    }
  }
  return windows;
}

// {position: how often the double sum over m < M, n < L takes it into score[j]}.
std::map<int64_t, int64_t> Taken(const Blocks& window, int64_t j) {
  const int64_t m_count = window.select_block_size / window.compress_stride;
  const int64_t n_count = window.compress_block_size / window.compress_stride;
  std::map<int64_t, int64_t> taken;
  for (int64_t m = 0; m < m_count; ++m) {
    for (int64_t n = 0; n < n_count; ++n) {
      ++taken[window.aligned ? m_count * j + m - n : m_count * (j + 1) - m - n];
    }
  }
  return taken;
}

void TestWeightsAndPositions(const Blocks& window) {
  std::map<int64_t, int> blocks_of_position;
  for (int64_t j = 0; j < 12; ++j) {
    const std::map<int64_t, int64_t> taken = Taken(window, j);
    EXPECT(window.FirstPosition(j) == taken.begin()->first) << window << " j=" << j;
    EXPECT(window.LastPosition(j) == taken.rbegin()->first) << window << " j=" << j;
    EXPECT(window.num_taps() == static_cast<int64_t>(taken.size())) << window;
    for (const auto& [position, times] : taken) {
      const int64_t offset = window.LastPosition(j) - position;
      EXPECT(window.Weight(offset) == times) << window << " offset=" << offset;
      ++blocks_of_position[position];
    }
  }
  for (const auto& [position, blocks] : blocks_of_position) {
    EXPECT(blocks <= 2) << window << " position=" << position << " is in " << blocks;
  }
  EXPECT(window.num_taps() <= kMaxTaps) << window;
}

// A block exists for each select_block_size original tokens begun.
void TestNumBlocks(const Blocks& window) {
  EXPECT(window.NumBlocks(0) == 0) << window;
  EXPECT(window.NumBlocks(-1) == 0) << window;
  int64_t blocks = 0;
  for (int64_t length = 1; length <= 2000; ++length) {
    const int64_t tokens = (length - 1) * window.compress_stride + window.compress_block_size;
    while (blocks * window.select_block_size < tokens) ++blocks;
    EXPECT(window.NumBlocks(length) == blocks) << window << " length=" << length;
  }
  const int64_t longest = std::numeric_limits<int32_t>::max();
  EXPECT(window.NumBlocks(longest) <= longest + 1) << window;
}

void TestIllegalWindows() {
  const int64_t huge = std::numeric_limits<int64_t>::max();
  const int64_t least = std::numeric_limits<int64_t>::min();
  for (const Blocks& window :
       {Blocks{32, 0, 64}, Blocks{32, -16, 64}, Blocks{16, 32, 64}, Blocks{64, 16, 32},
        Blocks{32, 16, 72}, Blocks{32, 16, 144}, Blocks{1, 1, 128}, Blocks{huge, 16, huge},
        Blocks{32, 16, huge}, Blocks{least, least, least}, Blocks{0, 0, 0}}) {
    EXPECT(!window.IsLegal()) << window;
  }
}

void TestForced() {
  for (int64_t first : {0, 1, 2, 9}) {
    for (int64_t last : {0, 1, 2, 9}) {
      const Forced forced = {first, last};
      for (int64_t num_blocks = 1; num_blocks < 8; ++num_blocks) {
        for (int64_t j = 0; j < num_blocks; ++j) {
          const bool initial = j < first, local = num_blocks - j <= last;
          EXPECT(forced.Has(j, num_blocks) == (initial || local)) << j << " of " << num_blocks;
        }
      }
    }
  }
}

// Counted by original tokens, a sequence grows by a block with every l' tokens.
void TestUniverse(const Blocks& blocks) {
  for (int64_t tokens = 0; tokens < 400; ++tokens) {
    int64_t positions = 0, count = 0;
    while (positions * blocks.compress_stride + blocks.compress_block_size <= tokens) ++positions;
    while (count * blocks.select_block_size < tokens) ++count;
    EXPECT(blocks.CompressedLength(tokens) == positions) << blocks << " tokens=" << tokens;
    for (int64_t length = 0; length <= positions + 2; ++length) {
      EXPECT(blocks.AreCompressedTo(tokens, length) == (length == positions))
          << blocks << " tokens=" << tokens << " length=" << length;
    }
    EXPECT(!blocks.AreCompressedTo(-1, 0)) << blocks;
    EXPECT(blocks.Universe(tokens) == count) << blocks << " tokens=" << tokens;
    if (blocks.aligned) {
      EXPECT(count <= blocks.MaxBlocks(positions)) << blocks << " tokens=" << tokens;
      if (blocks.CompressedLength(tokens + 1) > positions) {
        EXPECT(count == blocks.MaxBlocks(positions)) << blocks << " tokens=" << tokens;
      }
    } else {
      EXPECT(blocks.MaxBlocks(positions) == blocks.NumBlocks(positions)) << blocks;
    }
  }
}

// Sorting by GoesBefore is a stable sort by descending importance, whatever order it starts from.
void TestOrder() {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> importance = {0.5f, inf,  -1.0f, 0.0f, 0.5f,  -0.0f, inf,
                                         -inf, 2.0f, 0.5f,  0.0f, -1.0f, inf,   1e-45f};
  const auto goes_before = [&](int32_t a, int32_t b) {
    return GoesBefore(importance[a], a, importance[b], b);
  };
  std::vector<int32_t> expected(importance.size());
  std::iota(expected.begin(), expected.end(), 0);
  std::vector<int32_t> sorted(expected.rbegin(), expected.rend());
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
  std::sort(sorted.begin(), sorted.end(), goes_before);
  EXPECT(sorted == expected) << "the order is not the stable one";
  for (int32_t a : expected) {
    for (int32_t b : expected) {
      EXPECT(goes_before(a, b) + goes_before(b, a) == (a != b)) << a << " and " << b;
    }
  }
}

}  // namespace
}  // namespace jax_nsa

int main() {
  const std::vector<jax_nsa::Blocks> windows = jax_nsa::LegalWindows();
  EXPECT(!windows.empty());
  for (const jax_nsa::Blocks& window : windows) {
    EXPECT(window.IsLegal()) << window;
    jax_nsa::TestWeightsAndPositions(window);
    jax_nsa::TestNumBlocks(window);
    jax_nsa::TestUniverse(window);
  }
  jax_nsa::TestIllegalWindows();
  jax_nsa::TestForced();
  jax_nsa::TestOrder();
  return jax_nsa::testing::ExitStatus();
}
