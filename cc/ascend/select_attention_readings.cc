#include "ascend/select_attention_readings.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "ascend/handlers.h"
#include "ascend/runtime.h"
#include "ascend/tensor.h"

namespace jax_nsa::ascend {
namespace {

using select_attention::Problem;

constexpr int64_t kMaxPositions = 8192;  // of a sequence, as torch_npu documents

}  // namespace

ffi::Error Readings::Collect() {
  const Problem& problem = call_.problem;
  if (call_.faults_fail) JAX_NSA_RETURN_IF_ERROR(select_attention::FindFault(call_));
  const size_t bytes = problem.rows * problem.heads * problem.value_size * kElementSize;
  for (void* attention : {call_.arrays.attention, call_.arrays.window_attention}) {
    if (attention != nullptr) std::memset(attention, 0, bytes);
  }
  for (int64_t b = 0; b < problem.sequences; ++b) {
    SequenceRows rows;
    const bool faulty = FindRows(problem, call_.arrays, b, &rows) != Fault::kNone;
    for (int64_t t = 0; t < (faulty ? rows.owned : rows.count); ++t) {
      const int64_t row = rows.first + t, limit = Limit(call_.arrays, b, rows.count, t);
      for (int64_t h = 0; h < problem.key_value_heads; ++h) {
        int64_t column;
        if (faulty || CheckRow(problem, call_.arrays, b, row, h, limit, &column) !=
                          select_attention::RowFault::kNone) {
          FillWithNaN(row, h);
        } else {
          JAX_NSA_RETURN_IF_ERROR(AddRow(b, row, h, limit));
        }
      }
    }
  }
  return ffi::Error::Success();
}

ffi::Error Readings::AddRow(int64_t sequence, int64_t row, int64_t head, int64_t limit) {
  const Problem& problem = call_.problem;
  Reading chosen = {};
  chosen.row = row;
  chosen.head = head;
  chosen.pages = call_.arrays.block_table + sequence * problem.pages_per_sequence;
  Reading window = chosen;
  chosen.attention = call_.arrays.attention;
  const int32_t* const ids = ChosenBlocks(problem, call_.arrays, row, head);
  for (int64_t i = 0; i < problem.select_count; ++i) {
    if (ids[i] >= 0) chosen.spans.push_back(problem.Block(ids[i], limit));
  }
  window.attention = call_.arrays.window_attention;
  window.spans.push_back(problem.Window(limit));
  JAX_NSA_RETURN_IF_ERROR(Add(std::move(chosen)));
  return Add(std::move(window));
}

ffi::Error Readings::Add(Reading reading) {
  for (const Span& span : reading.spans) reading.size += span.size();
  if (reading.size == 0) return ffi::Error::Success();
  if (reading.size > kMaxPositions) {
    return Unserved("nsa_select_attention_infer", "reads at most " + std::to_string(kMaxPositions) +
                                                      " positions for a row of query, and row " +
                                                      std::to_string(reading.row) + " asks for " +
                                                      std::to_string(reading.size));
  }
  reading.first_page = num_pages_;
  num_pages_ += reading.num_pages();
  longest_ = std::max(longest_, reading.size);
  readings_.push_back(std::move(reading));
  return ffi::Error::Success();
}

void Readings::FillWithNaN() {
  for (int64_t row = 0; row < call_.problem.rows; ++row) {
    for (int64_t h = 0; h < call_.problem.key_value_heads; ++h) FillWithNaN(row, h);
  }
}

void Readings::FillWithNaN(int64_t row, int64_t head) {
  const Problem& problem = call_.problem;
  const uint16_t nan = problem.dtype == DataType::kBFloat16 ? 0x7fc0 : 0x7e00;
  const int64_t size = problem.group() * problem.value_size;
  for (void* attention : {call_.arrays.attention, call_.arrays.window_attention}) {
    if (attention == nullptr) continue;
    std::fill_n(static_cast<uint16_t*>(attention) + (row * problem.key_value_heads + head) * size,
                size, nan);
  }
}

void Gather(const Problem& problem, const Reading& reading, const void* pool, int64_t size,
            int64_t padded_size, std::byte* pages) {
  const size_t pool_row = problem.key_value_heads * size * kElementSize;
  const size_t used = size * kElementSize, row_bytes = padded_size * kElementSize;
  const size_t page_bytes = kGatheredPage * row_bytes;
  const std::byte* const head = static_cast<const std::byte*>(pool) + reading.head * used;
  std::byte* out = pages + reading.first_page * page_bytes;
  std::memset(out, 0, reading.num_pages() * page_bytes);
  for (const Span& span : reading.spans) {
    ForRuns(reading.pages, problem.page_size, span, [&](const RowRun& run) {
      for (int64_t i = 0; i < run.count; ++i, out += row_bytes) {
        std::memcpy(out, head + (run.first + i) * pool_row, used);
      }
    });
  }
}

}  // namespace jax_nsa::ascend
