// Problems for the compressed branch's CUDA kernel: every size that it is compiled for, every way
// of splitting the work, every fault.

#ifndef JAX_NSA_TESTS_CUDA_KERNEL_CASES_H_
#define JAX_NSA_TESTS_CUDA_KERNEL_CASES_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "compress_attention.h"

namespace jax_nsa::cuda {

struct Case {
  std::string name;
  DataType dtype = DataType::kBFloat16;
  int sequences = 1, tokens = 1;
  int group = 2, key_value_heads = 1, head_size = 16, value_size = 16;
  int page_size = 128, pages = 8;
  Blocks blocks = {32, 16, 64};
  Forced forced = {1, 2};
  bool causal = false;
  int select_count = 16;
  std::optional<int> shortest = {};  // of the sequences; else all are the longest there can be
  bool packed = false;               // query rows
  float spread = 1.3f;               // of the scores
  // Equal scores of some positions, lower ones of all others. With one position a block, those of
  // three of the groups in which topk.cuh looks for a bound.
  bool peaks = false;
  bool wants_lse = true, wants_scores = false, aligned_rows = true;
  int bad_pages = 0;    // sequences that have one
  bool faults = false;  // of lengths and counts
  int nans = 0;         // heads of queries that are NaN
  int devices = 1;      // every so many-th of the emulated ones
};

// Few blocks, none, and more than there are.
constexpr Forced kForced[] = {{1, 2}, {0, 1}, {0, 0}, {3, 0}, {300, 400}, {int64_t{1} << 40, 9}};

inline std::vector<Case> Cases() {
  constexpr DataType kF16 = DataType::kFloat16, kF32 = DataType::kFloat32;
  const Blocks dense = {16, 16, 16};
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, auto set) {
    Case c;
    c.name = name;
    set(c);
    cases.push_back(c);
  };
  // The last case again, but for some of it.
  const auto add_variant = [&](const std::string& name, auto set) {
    Case c = cases.back();
    c.name += ", " + name;
    set(c);
    cases.push_back(c);
  };
  // Each kernel with its own sizes, with smaller ones, and with some that leave nothing aligned.
  const std::pair<int, int> sizes[] = {{64, 64}, {40, 24},   {33, 7},    {128, 128}, {72, 96},
                                       {65, 65}, {192, 128}, {136, 128}, {191, 127}};
  for (DataType dtype : {DataType::kBFloat16, kF16, kF32}) {
    for (const auto& [head, value] : sizes) {
      const int head_size = head, value_size = value;
      add("dtype " + std::to_string(static_cast<int>(dtype)) + ", " + std::to_string(head) +
              " and " + std::to_string(value),
          [=](Case& c) {
            c.dtype = dtype;
            c.sequences = 2, c.shortest = 1;
            c.group = 4, c.key_value_heads = 2;
            c.head_size = head_size, c.value_size = value_size;
            c.page_size = 16, c.pages = 10;
            c.select_count = 8;
            c.wants_scores = head_size % 2 != 0;
          });
      if (head == 64) {
        add_variant("unaligned", [](Case& c) { c.aligned_rows = c.wants_lse = false; });
      }
    }
  }
  for (int group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    add("group " + std::to_string(group), [=](Case& c) {
      c.sequences = 2, c.shortest = 70;
      c.group = group, c.head_size = 32;
      c.page_size = 16, c.pages = 9;
      c.select_count = 9;
    });
    if (group <= 2) add_variant("tokens", [](Case& c) { c.tokens = 7, c.shortest = 1; });
  }
  // Several tokens: some early, some absent, some in chunks.
  add("tokens", [](Case& c) {
    c.sequences = c.tokens = 4, c.shortest = 0;
    c.group = 8, c.key_value_heads = 2, c.head_size = 64, c.value_size = 32;
    c.page_size = 64, c.pages = 4;
    c.select_count = 70;
    c.wants_scores = true;
  });
  add("tokens, equal", [](Case& c) {
    c.sequences = c.tokens = 4;
    c.group = 4, c.key_value_heads = 2, c.head_size = 64, c.value_size = 32;
    c.page_size = 64, c.pages = 4;
    c.select_count = 20;
  });
  add("tokens, packed", [](Case& c) {
    c.dtype = kF16;
    c.sequences = c.tokens = 5, c.shortest = 0;
    c.group = 8, c.key_value_heads = 2, c.head_size = 72, c.value_size = 40;
    c.page_size = 48, c.pages = 6;
    c.blocks = {48, 16, 96}, c.select_count = 5;
    c.packed = true;
  });
  add("chunks", [=](Case& c) {
    c.sequences = 2, c.tokens = 3, c.shortest = 1;
    c.group = 128, c.head_size = 64, c.value_size = 32;
    c.page_size = 16, c.pages = 9;
    c.blocks = dense, c.select_count = 12;
    c.wants_scores = true;
  });
  add("chunks, equal", [](Case& c) {
    c.sequences = 2, c.tokens = 5;
    c.group = 64, c.head_size = 32;
    c.page_size = 16, c.pages = 9;
    c.select_count = 12;
  });
  // Pages of more than 128 rows, that tiles of the kernel divide or straddle.
  for (int page : {144, 240, 256}) {
    add("page " + std::to_string(page), [=](Case& c) {
      c.sequences = 3, c.tokens = 2, c.shortest = 1;
      c.group = 4, c.key_value_heads = 2, c.head_size = 40, c.value_size = 24;
      c.page_size = page, c.pages = 4;
      c.select_count = 9;
      c.wants_scores = true;
      c.devices = 2;
    });
    add_variant("bad pages", [](Case& c) {
      c.dtype = kF32;
      c.bad_pages = 2;
    });
  }
  // Faults.
  add("bad pages", [](Case& c) {
    c.sequences = 6, c.tokens = 2, c.shortest = 0;
    c.group = 4, c.key_value_heads = 2, c.head_size = c.value_size = 64;
    c.page_size = 64, c.pages = 12;
    c.select_count = 9;
    c.wants_scores = true;
    c.bad_pages = 3;
  });
  add("bad rows", [](Case& c) {
    c.sequences = 12, c.tokens = 3, c.shortest = 0;
    c.group = 4, c.head_size = c.value_size = 32;
    c.page_size = 16, c.pages = 6;
    c.select_count = 9;
    c.faults = true;
  });
  add_variant("packed", [](Case& c) {
    c.packed = true;
    c.bad_pages = 2;
  });
  // Items of several parts, records beyond shared memory, blocks beyond it.
  add("long", [](Case& c) {
    c.group = 4, c.key_value_heads = 2, c.head_size = c.value_size = 64;
    c.pages = 20;
  });
  add("long, three", [](Case& c) {
    c.sequences = 3;
    c.head_size = c.value_size = 32;
    c.pages = 12;
  });
  add("long, unequal", [](Case& c) {
    c.sequences = 3, c.shortest = 30;
    c.key_value_heads = 2, c.head_size = c.value_size = 32;
    c.pages = 12;
  });
  add("long, tokens", [=](Case& c) {
    c.dtype = kF16;
    c.sequences = 2, c.tokens = 3, c.shortest = 500;
    c.group = 8, c.head_size = c.value_size = 32;
    c.blocks = dense, c.select_count = 40;
  });
  add("wide", [](Case& c) { c.group = 128, c.head_size = 32; });
  add("wide, scores", [=](Case& c) {
    c.sequences = c.tokens = 2, c.shortest = 600;
    c.group = 32, c.head_size = 32;
    c.pages = 7;
    c.blocks = dense;
    c.wants_scores = true;
  });
  add("few chosen, scores", [](Case& c) {
    c.tokens = 2;
    c.group = 4, c.head_size = 32;
    c.select_count = 3;
    c.wants_scores = true;
  });
  add("wide, several", [=](Case& c) {
    c.sequences = 3, c.shortest = 300;
    c.group = 64, c.head_size = 136, c.value_size = 64;
    c.pages = 3;
    c.blocks = dense;
  });
  add("wide, few in a batch", [](Case& c) {
    c.group = 128;
    c.blocks = {32, 16, 32};
  });
  // Records of whole and of cut items side by side, none at the start of a cache line.
  add("wide, cut anywhere", [=](Case& c) {
    c.sequences = 5, c.tokens = 23;
    c.group = 4, c.head_size = 72, c.value_size = 32;
    c.page_size = 16, c.pages = 30;
    c.blocks = dense, c.select_count = 9;
  });
  const auto items = [&](const std::string& name, int sequences, int pages) {
    add(name + " items", [=](Case& c) {
      c.sequences = sequences;
      c.group = 4, c.head_size = c.value_size = 32;
      c.pages = pages;
    });
  };
  items("five", 5, 6);
  items("seven", 7, 5);
  items("ten", 5, 5);
  cases.back().group = 16, cases.back().key_value_heads = 2;
  const auto many = [=](Case& c) {
    c.pages = 18;
    c.blocks = dense;
  };
  add("2300 blocks", [=](Case& c) {
    many(c);
    c.head_size = 32;
  });
  add("ties", [=](Case& c) {
    many(c);
    c.head_size = 32;
    c.spread = 0.0f;
    c.devices = 3;
  });
  add("fewer ties", [=](Case& c) {
    c.sequences = 2, c.shortest = 300;
    c.pages = 9;
    c.blocks = dense;
    c.spread = 0.0f;
  });
  add("peaks", [=](Case& c) {
    many(c);
    c.peaks = true;
    c.devices = 3;
  });
  add_variant("150 chosen", [](Case& c) { c.select_count = 150; });
  add("1500 chosen", [=](Case& c) {
    many(c);
    c.sequences = 2, c.shortest = 1200;
    c.group = 1;
    c.select_count = 1500;
    c.devices = 5;
  });
  add("400 sequences", [](Case& c) {
    c.sequences = 400, c.shortest = 0;
    c.page_size = 16, c.pages = 3;
    c.select_count = 6;
    c.devices = 7;
  });
  add("NaN queries", [](Case& c) {
    c.sequences = 5, c.tokens = 3, c.shortest = 1;
    c.group = 8, c.key_value_heads = 2, c.head_size = 64, c.value_size = 32;
    c.page_size = 16, c.pages = 40;
    c.select_count = 12;
    c.nans = 9;
    c.devices = 2;
  });
  add("many records of cut items", [=](Case& c) {
    c.sequences = c.tokens = 3, c.shortest = 400;
    c.group = 128;
    c.page_size = 16, c.pages = 64;
    c.blocks = dense, c.select_count = 12;
    c.wants_scores = true;
    c.bad_pages = 1;
    c.devices = 4;
  });
  // Blocks as open training codes choose them, for many of these.
  const std::set<std::string> repeated = {
      "wide, cut anywhere", "tokens, packed", "bad rows",   "bad rows, packed", "long, unequal",
      "1500 chosen",        "peaks",          "fewer ties", "NaN queries"};
  for (const Case& c : std::vector<Case>(cases)) {
    if (repeated.count(c.name) == 0) continue;
    cases.push_back(c);
    cases.back().name += ", aligned";
    cases.back().blocks.aligned = true;
    cases.back().causal = c.name == "wide, cut anywhere" || c.name == "tokens, packed";
    cases.back().forced = {0, 1};
    cases.back().devices = 3;
  }
  // Other blocks forced, in every way of choosing the rest.
  for (const Forced& forced : kForced) {
    for (const auto& [pages, count] : {std::pair(1, 4), {3, 20}, {9, 16}, {9, 100}, {18, 16}}) {
      const int num_pages = pages, select_count = count;
      add("forced " + std::to_string(forced.first) + " and " + std::to_string(forced.last) +
              ", pages " + std::to_string(pages) + ", choosing " + std::to_string(count),
          [=](Case& c) {
            c.shortest = 100 * num_pages;
            c.pages = num_pages;
            c.blocks = dense, c.select_count = select_count;
            c.forced = forced;
            c.devices = 7;
          });
      add_variant("aligned", [](Case& c) { c.blocks.aligned = true; });
    }
  }
  // Ties of blocks in one tile and in two, in one batch of records and in two.
  for (const Blocks& blocks :
       {Blocks{32, 16, 64}, {48, 16, 96}, {128, 16, 128}, {48, 16, 96, /*aligned=*/true}}) {
    for (int group : {2, 32, 128}) {
      add("ties of " + std::to_string(blocks.num_taps()) + " positions, group " +
              std::to_string(group) + (blocks.aligned ? ", aligned" : ""),
          [=](Case& c) {
            c.sequences = 2, c.shortest = 100;
            c.group = group;
            c.pages = group > 2 ? 12 : 70;
            c.blocks = blocks, c.select_count = 300;
            c.spread = 0.0f;
            c.devices = 5;
          });
    }
  }
  // All geometries of blocks.
  int number = 0;
  for (int stride : {16, 32, 48, 64}) {
    for (int size = stride; size <= kMaxBlockSize; size += 16) {
      for (int select = size; select <= kMaxBlockSize; select += 16) {
        const Blocks blocks = {size, stride, select};
        if (!blocks.IsLegal()) continue;
        add("blocks " + std::to_string(size) + "/" + std::to_string(stride) + "/" +
                std::to_string(select),
            [=](Case& c) {
              c.sequences = 2, c.shortest = 1;
              c.group = 4, c.head_size = 32;
              c.page_size = 16, c.pages = 12;
              c.blocks = blocks, c.select_count = 6;
              c.wants_scores = true;
              c.devices = 11;
            });
        // Blocks counted by original tokens, of tokens that see fewer and fewer of them.
        add_variant("aligned", [=](Case& c) {
          c.sequences = 5, c.tokens = 40, c.shortest = 0;
          c.blocks.aligned = true, c.select_count = 70;
          c.causal = number % 4 != 3;
          c.forced = kForced[number % 6];
        });
        ++number;
      }
    }
  }
  return cases;
}

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_TESTS_CUDA_KERNEL_CASES_H_
