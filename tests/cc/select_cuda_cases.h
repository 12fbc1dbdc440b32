// The calls that select_cuda_kernel_test.cc makes, described in a few numbers each.

#ifndef JAX_NSA_TESTS_SELECT_CUDA_CASES_H_
#define JAX_NSA_TESTS_SELECT_CUDA_CASES_H_

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "paged.h"

namespace jax_nsa::cuda::select {

struct Case {
  std::string name;
  DataType dtype = DataType::kBFloat16;
  int sequences = 3, tokens = 2;
  int group = 4, key_value_heads = 2, head_size = 32, value_size = 32;
  int page_size = 64, pages = 8;
  int block_size = 64, select_count = 9, window_size = 200;
  int shortest = 0;  // of the sequences
  bool packed = false, partial = false;
  bool wants_lse = true, aligned = true, float_results = false;
  int bad_ids = 0, bad_pages = 0;  // sequences that have one
  bool faults = false;             // of lengths and counts
  int nans = 0;                    // heads of queries that are NaN
};

inline std::vector<Case> Cases() {
  constexpr DataType kBf16 = DataType::kBFloat16, kF16 = DataType::kFloat16,
                     kF32 = DataType::kFloat32;
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
  const std::pair<int, int> sizes[] = {{64, 64}, {40, 24}, {33, 7},    {128, 128}, {128, 40},
                                       {72, 96}, {65, 65}, {192, 128}, {136, 128}, {191, 127}};
  for (DataType dtype : {kBf16, kF16, kF32}) {
    for (const auto& [head, value] : sizes) {
      const int head_size = head, value_size = value;
      add("dtype " + std::to_string(static_cast<int>(dtype)) + ", " + std::to_string(head) +
              " and " + std::to_string(value),
          [=](Case& c) {
            c.dtype = dtype;
            c.sequences = 2, c.tokens = 1, c.shortest = 1;
            c.head_size = head_size, c.value_size = value_size;
            c.page_size = 32, c.pages = 20;
            c.select_count = 5, c.window_size = 100;
          });
      if (head == 64) add_variant("unaligned", [](Case& c) { c.aligned = c.wants_lse = false; });
    }
  }
  for (int group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const auto usual = [=](Case& c) {
      c.sequences = 2, c.shortest = 70;
      c.group = group, c.value_size = 16;
      c.page_size = 16, c.pages = 19;
      c.block_size = 32, c.window_size = 130;
    };
    const std::string name = "group " + std::to_string(group);
    add(name, usual);
    add_variant("float16", [](Case& c) { c.dtype = kF16; });
    if (group < 32) continue;
    add(name + ", float32", [=](Case& c) {
      usual(c);
      c.dtype = kF32;
      c.sequences = c.tokens = c.key_value_heads = 1;
    });
  }
  // Few columns, over which errors do not average out.
  const auto few = [](Case& c) {
    c.group = 128;
    c.head_size = c.value_size = 1;
    c.page_size = 16, c.shortest = 60;
    c.block_size = 32, c.select_count = 3, c.window_size = 20;
  };
  add("one column", few);
  add("two columns", [=](Case& c) {
    few(c);
    c.dtype = kF16;
    c.head_size = 4, c.value_size = 2;
  });
  // Pages and blocks of all proportions.
  for (int page : {16, 48, 64, 112, 128, 256}) {
    for (int block = 16; block <= 128; block += 16) {
      add("page " + std::to_string(page) + ", block " + std::to_string(block), [=](Case& c) {
        c.group = 2, c.key_value_heads = 1;
        c.head_size = c.value_size = 16;
        c.page_size = page, c.pages = 700 / page;
        c.block_size = block, c.select_count = 4, c.window_size = 77;
        c.packed = block % 32 == 0;
        c.partial = block % 48 == 0;
      });
    }
  }
  // One attention alone; of no size at all, and larger than the sequence.
  add("selected alone", [](Case& c) { c.select_count = 7, c.window_size = 0, c.pages = 6; });
  const auto window = [](int size) {
    return [=](Case& c) {
      c.sequences = 5, c.tokens = 3, c.pages = 6;
      c.select_count = 0, c.window_size = size;
    };
  };
  add("window alone", window(100));
  add("window of one", window(1));
  add("window without end", window(std::numeric_limits<int>::max()));
  // Whole attentions, and parts of several tiles for each warp.
  const auto small = [](Case& c) { c.head_size = c.value_size = 16; };
  add("many rows", [=](Case& c) {
    small(c);
    c.sequences = 150, c.tokens = 1;
    c.group = 1;
    c.select_count = 6, c.window_size = 160;
  });
  add("longer parts", [=](Case& c) {
    small(c);
    c.sequences = 9, c.tokens = 4, c.shortest = 3000;
    c.group = 2, c.key_value_heads = 1;
    c.page_size = 128, c.pages = 30;
    c.block_size = 128, c.select_count = 40, c.window_size = 2000;
  });
  add("longest parts", [=](Case& c) {
    small(c);
    c.sequences = c.tokens = 1, c.shortest = 19000;
    c.group = 2, c.key_value_heads = 1;
    c.page_size = 256, c.pages = 80;
    c.block_size = 128, c.select_count = 90, c.window_size = 20000;
  });
  // Packed rows of many sequences.
  for (int sequences : {1, 31, 33, 70, 1100}) {
    add("packed, " + std::to_string(sequences), [=](Case& c) {
      small(c);
      c.sequences = sequences;
      c.group = c.key_value_heads = 1;
      c.page_size = 16, c.pages = 3;
      c.block_size = 16, c.select_count = 2, c.window_size = 20;
      c.packed = true;
    });
  }
  add("tokens", [](Case& c) {
    c.dtype = kF16;
    c.sequences = c.tokens = 5;
    c.group = 8;
    c.head_size = 72, c.value_size = 40;
    c.page_size = 48, c.pages = 6;
    c.block_size = 48, c.select_count = 5, c.window_size = 64;
    c.packed = true;
  });
  add("partial", [](Case& c) {
    c.sequences = 8, c.tokens = 3, c.pages = 6;
    c.block_size = 32, c.select_count = 12;
    c.partial = c.float_results = true;
  });
  // Faults.
  add("bad ids", [](Case& c) { c.sequences = 9, c.bad_ids = 6; });
  add("bad pages", [](Case& c) { c.sequences = 9, c.bad_pages = 6; });
  add_variant("window alone", [](Case& c) { c.select_count = 0; });
  add("faults", [](Case& c) { c.sequences = 9, c.tokens = 3, c.faults = true; });
  // Of packed rows, a count too large takes another sequence's; it is seen all the same.
  add("faults, packed", [](Case& c) {
    c.sequences = 9, c.tokens = 3, c.faults = true;
    c.packed = true;
  });
  add("NaN queries", [](Case& c) {
    c.sequences = 5, c.tokens = 3, c.shortest = 1;
    c.group = 8, c.head_size = 64;
    c.page_size = 16, c.pages = 40;
    c.select_count = 12, c.window_size = 100;
    c.nans = 9;
  });
  return cases;
}

}  // namespace jax_nsa::cuda::select

#endif  // JAX_NSA_TESTS_SELECT_CUDA_CASES_H_
