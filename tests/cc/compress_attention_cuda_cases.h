// The calls that compress_attention_cuda_kernel_test.cc makes, described in a few numbers each.

#ifndef JAX_NSA_TESTS_COMPRESS_ATTENTION_CUDA_CASES_H_
#define JAX_NSA_TESTS_COMPRESS_ATTENTION_CUDA_CASES_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "blocks.h"
#include "paged.h"
#include "selection.h"

namespace jax_nsa::cuda::compressed {

enum class Lengths { kEqual, kRagged };

struct Case {
  std::string name;
  DataType dtype;
  int sequences, tokens, group, key_value_heads, head_size, value_size, page_size, pages;
  Blocks window;
  int select_count;
  Lengths lengths;
  int shortest;         // of kRagged; equal ones are all the longest that there can be
  bool ragged = false;  // query rows
  float spread = 1.3f;  // of the scores
  // Equal scores of some positions, lower ones of all others. With one position a block, those of
  // three of the groups in which compress_attention_topk.cuh looks for a bound.
  bool peaks = false;
  bool wants_lse = true, wants_scores = false, aligned_rows = true;
  Forced forced = {1, 2};
  bool causal = false;
  int bad_pages = 0;    // sequences that have one
  bool faults = false;  // of lengths and counts
  int nans = 0;         // heads of queries that are NaN
  int devices = 1;      // every so many-th of the emulated ones
};

// Few blocks, none, and more than there are.
constexpr Forced kForced[] = {{1, 2}, {0, 1}, {0, 0}, {3, 0}, {300, 400}, {int64_t{1} << 40, 9}};

inline std::vector<Case> Cases() {
  constexpr DataType kBf16 = DataType::kBFloat16, kF16 = DataType::kFloat16,
                     kF32 = DataType::kFloat32;
  constexpr Lengths kEqual = Lengths::kEqual, kRagged = Lengths::kRagged;
  const Blocks usual = {32, 16, 64}, dense = {16, 16, 16};
  std::vector<Case> cases;
  // Each kernel with its own sizes, with smaller ones, and with some that leave nothing aligned.
  const std::pair<int, int> sizes[] = {{64, 64}, {40, 24},   {33, 7},    {128, 128}, {72, 96},
                                       {65, 65}, {192, 128}, {136, 128}, {191, 127}};
  for (DataType dtype : {kBf16, kF16, kF32}) {
    for (const auto& [head, value] : sizes) {
      const std::string name = "dtype " + std::to_string(static_cast<int>(dtype)) + ", " +
                               std::to_string(head) + " and " + std::to_string(value);
      Case c = {name, dtype, 2, 1, 4, 2, head, value, 16, 10, usual, 8, kRagged, 1};
      c.wants_scores = head % 2 != 0;
      cases.push_back(c);
      Case other = c;
      if (head == 64) {
        other.name += ", unaligned";
        other.aligned_rows = other.wants_lse = false;
        cases.push_back(other);
      }
      if (head == 192) {  // whole tiles lie in a page
        other.name += ", longer pages";
        other.page_size = 64;
        other.pages = 3;
        cases.push_back(other);
      }
    }
  }
  for (int group : {1, 2, 4, 8, 16, 32, 64, 128}) {
    const std::string name = "group " + std::to_string(group);
    cases.push_back({name, kBf16, 2, 1, group, 1, 32, 16, 16, 9, usual, 9, kRagged, 70});
    if (group > 2) continue;
    cases.push_back(
        {name + ", tokens", kBf16, 2, 7, group, 1, 32, 16, 16, 9, usual, 9, kRagged, 1});
  }
  // Several tokens: some early, some absent, some in chunks.
  Case tokens = {"tokens", kBf16, 4, 4, 8, 2, 64, 32, 64, 4, usual, 70, kRagged, 0};
  tokens.wants_scores = true;
  cases.push_back(tokens);
  cases.push_back({"tokens, equal", kBf16, 4, 4, 4, 2, 64, 32, 64, 4, usual, 20, kEqual, 0});
  tokens = {"tokens, ragged", kF16, 5, 5, 8, 2, 72, 40, 48, 6, {48, 16, 96}, 5, kRagged, 0};
  tokens.ragged = true;
  cases.push_back(tokens);
  tokens = {"chunks", kBf16, 2, 3, 128, 1, 64, 32, 16, 9, dense, 12, kRagged, 1};
  tokens.wants_scores = true;
  cases.push_back(tokens);
  cases.push_back({"chunks, equal", kBf16, 2, 5, 64, 1, 32, 16, 16, 9, usual, 12, kEqual, 0});
  // Pages of more than 128 rows, that tiles of the kernel divide or straddle.
  for (int page : {144, 240, 256}) {
    Case pages = {
        "page " + std::to_string(page), kBf16, 3, 2, 4, 2, 40, 24, page, 4, usual, 9, kRagged, 1};
    pages.wants_scores = true;
    pages.devices = 2;
    cases.push_back(pages);
    pages.name += ", bad pages";
    pages.dtype = kF32;
    pages.bad_pages = 2;
    cases.push_back(pages);
  }
  // Faults.
  Case faulty = {"bad pages", kBf16, 6, 2, 4, 2, 64, 64, 64, 12, usual, 9, kRagged, 0};
  faulty.wants_scores = true;
  faulty.bad_pages = 3;
  cases.push_back(faulty);
  faulty = {"bad rows", kBf16, 12, 3, 4, 1, 32, 32, 16, 6, usual, 9, kRagged, 0};
  faulty.faults = true;
  cases.push_back(faulty);
  faulty.name = "bad rows, ragged";
  faulty.ragged = true;
  faulty.bad_pages = 2;
  cases.push_back(faulty);
  // Items of several parts, records beyond shared memory, blocks beyond it.
  cases.push_back({"long", kBf16, 1, 1, 4, 2, 64, 64, 128, 20, usual, 16, kEqual, 0});
  cases.push_back({"more parts", kBf16, 1, 1, 1, 1, 16, 8, 128, 280, usual, 16, kEqual, 0});
  cases.push_back({"long, three", kBf16, 3, 1, 2, 1, 32, 32, 128, 12, usual, 16, kEqual, 0});
  cases.push_back({"long, unequal", kBf16, 3, 1, 2, 2, 32, 32, 128, 12, usual, 16, kRagged, 30});
  cases.push_back({"long, tokens", kF16, 2, 3, 8, 1, 32, 32, 128, 8, dense, 40, kRagged, 500});
  cases.push_back({"wide", kBf16, 1, 1, 128, 1, 32, 16, 128, 8, usual, 16, kEqual, 0});
  Case scores = {"wide, scores", kBf16, 2, 2, 32, 1, 32, 16, 128, 7, dense, 16, kRagged, 600};
  scores.wants_scores = true;
  cases.push_back(scores);
  scores = {"few chosen, scores", kBf16, 1, 2, 4, 1, 32, 16, 128, 8, usual, 3, kEqual, 0};
  scores.wants_scores = true;
  cases.push_back(scores);
  cases.push_back({"wide, several", kBf16, 3, 1, 64, 1, 136, 64, 128, 3, dense, 16, kRagged, 300});
  // Records of whole and of cut items side by side, none at the start of a cache line.
  cases.push_back({"wide, cut anywhere", kBf16, 5, 23, 4, 1, 72, 32, 16, 30, dense, 9, kEqual, 0});
  cases.push_back({"five items", kBf16, 5, 1, 4, 1, 32, 32, 128, 6, usual, 16, kEqual, 0});
  cases.push_back({"seven items", kBf16, 7, 1, 4, 1, 32, 32, 128, 5, usual, 16, kEqual, 0});
  cases.push_back({"ten items", kBf16, 5, 1, 16, 2, 32, 32, 128, 5, usual, 16, kEqual, 0});
  Case many = {"2300 blocks", kBf16, 1, 1, 2, 1, 32, 16, 128, 18, dense, 16, kEqual, 0};
  cases.push_back(many);
  many.name = "ties";
  many.spread = 0.0f;
  many.devices = 3;
  cases.push_back(many);
  many = {"fewer ties", kBf16, 2, 1, 2, 1, 16, 16, 128, 9, dense, 16, kRagged, 300};
  many.spread = 0.0f;
  cases.push_back(many);
  many = {"peaks", kBf16, 1, 1, 2, 1, 16, 16, 128, 18, dense, 16, kEqual, 0};
  many.peaks = true;
  many.devices = 3;
  cases.push_back(many);
  many.name = "peaks, 150 chosen";
  many.select_count = 150;
  cases.push_back(many);
  many = {"1500 chosen", kBf16, 2, 1, 1, 1, 16, 16, 128, 18, dense, 1500, kRagged, 1200};
  many.devices = 5;
  cases.push_back(many);
  // So many blocks that cut items are joint, unless there are several tokens or too many items.
  Case joint = {"joint", kBf16, 1, 1, 16, 2, 32, 32, 128, 20, dense, 16, kEqual, 0};
  joint.wants_scores = true;
  joint.devices = 3;
  cases.push_back(joint);
  joint = {"joint, no scores", kBf16, 2, 1, 32, 1, 16, 16, 128, 40, {32, 16, 32}, 16, kEqual, 0};
  joint.devices = 3;
  cases.push_back(joint);
  joint = {"joint, unequal", kBf16, 4, 1, 2, 1, 16, 16, 128, 24, dense, 40, kRagged, 1800};
  joint.wants_scores = true;
  joint.devices = 1;
  cases.push_back(joint);
  joint.name += ", aligned";
  joint.window.aligned = joint.causal = true;
  cases.push_back(joint);
  joint.name += ", bad pages";
  joint.bad_pages = 2;
  cases.push_back(joint);
  joint = {"joint, ties", kBf16, 1, 1, 4, 1, 16, 16, 128, 84, {64, 16, 64}, 300, kEqual, 0};
  joint.spread = 0.0f;
  joint.devices = 3;
  cases.push_back(joint);
  joint = {"2560 blocks, tokens", kBf16, 2, 3, 4, 1, 16, 16, 128, 20, dense, 9, kRagged, 2000};
  joint.wants_scores = true;
  joint.devices = 5;
  cases.push_back(joint);
  many = {"400 sequences", kBf16, 400, 1, 2, 1, 16, 16, 16, 3, usual, 6, kRagged, 0};
  many.devices = 7;
  cases.push_back(many);
  Case nans = {"NaN queries", kBf16, 5, 3, 8, 2, 64, 32, 16, 40, usual, 12, kRagged, 1};
  nans.nans = 9;
  nans.devices = 2;
  cases.push_back(nans);
  Case records = {
      "many records of cut items", kBf16, 3, 3, 128, 1, 16, 16, 16, 64, dense, 12, kRagged, 400};
  records.wants_scores = true;
  records.bad_pages = 1;
  records.devices = 4;
  cases.push_back(records);
  // Other blocks forced, in every way of choosing the rest.
  const Blocks dense_aligned = {16, 16, 16, true};
  for (const Forced& forced : kForced) {
    const std::string name =
        "forced " + std::to_string(forced.first) + " and " + std::to_string(forced.last);
    for (const auto& [pages, count] : {std::pair(1, 4), {3, 20}, {9, 16}, {9, 100}, {18, 16}}) {
      Case c = {name + ", pages " + std::to_string(pages) + ", choosing " + std::to_string(count),
                kBf16,
                1,
                1,
                2,
                1,
                16,
                16,
                128,
                pages,
                dense_aligned,
                count,
                kRagged,
                100 * pages};
      c.forced = forced;
      c.devices = 7;
      cases.push_back(c);
      c.name += ", cann";
      c.window.aligned = false;
      cases.push_back(c);
    }
    // Sequences that end anywhere in a tile, all of whose blocks are chosen.
    for (const Blocks& window : {usual, {128, 16, 128}, {48, 16, 96, true}}) {
      Case c = {name + ", " + std::to_string(window.num_taps()) + " positions",
                kBf16,
                40,
                1,
                4,
                1,
                16,
                16,
                16,
                8,
                window,
                40,
                kRagged,
                1};
      c.forced = forced;
      c.devices = 9;
      cases.push_back(c);
    }
  }
  for (const Case& c : std::vector<Case>(cases)) {
    const bool wide = c.name == "wide, cut anywhere", tokens = c.name == "tokens, ragged";
    if (!wide && !tokens && c.name != "bad rows" && c.name != "bad rows, ragged" &&
        c.name != "long, unequal" && c.name != "1500 chosen" && c.name != "peaks" &&
        c.name != "fewer ties" && c.name != "NaN queries") {
      continue;
    }
    Case other = c;
    other.name += ", aligned";
    other.window.aligned = true;
    other.causal = tokens || wide;
    other.forced = {0, 1};
    other.devices = 3;
    cases.push_back(other);
  }
  // Ties of blocks in one tile and in two, in one batch of records and in two.
  for (const Blocks& window : {usual, {48, 16, 96}, {128, 16, 128}, {48, 16, 96, true}}) {
    for (int group : {2, 32, 128}) {
      Case c = {"ties of " + std::to_string(window.num_taps()) + " positions, group " +
                    std::to_string(group) + (window.aligned ? ", aligned" : ""),
                kBf16,
                2,
                1,
                group,
                1,
                16,
                16,
                128,
                group > 2 ? 12 : 70,
                window,
                300,
                kRagged,
                100};
      c.spread = 0.0f;
      c.devices = 5;
      cases.push_back(c);
    }
  }
  cases.push_back(
      {"wide, few in a batch", kBf16, 1, 1, 128, 1, 16, 16, 128, 8, {32, 16, 32}, 16, kEqual, 0});
  // All windows.
  int windows = 0;
  for (int stride : {16, 32, 48, 64}) {
    for (int size = stride; size <= kMaxBlockSize; size += 16) {
      for (int select = size; select <= kMaxBlockSize; select += 16) {
        const Blocks window = {size, stride, select};
        if (!window.IsLegal()) continue;
        const std::string name = "window " + std::to_string(size) + "/" + std::to_string(stride) +
                                 "/" + std::to_string(select);
        Case c = {name, kBf16, 2, 1, 4, 1, 32, 16, 16, 12, window, 6, kRagged, 1};
        c.wants_scores = true;
        c.devices = 11;
        cases.push_back(c);
        // Blocks counted by original tokens, of tokens that see fewer and fewer of them.
        c.name += ", aligned";
        c.sequences = 5;
        c.tokens = 40;
        c.shortest = 0;
        c.select_count = 70;
        c.window.aligned = true;
        c.causal = windows % 4 != 3;
        c.forced = kForced[windows++ % 6];
        cases.push_back(c);
      }
    }
  }
  return cases;
}

}  // namespace jax_nsa::cuda::compressed

#endif  // JAX_NSA_TESTS_COMPRESS_ATTENTION_CUDA_CASES_H_
