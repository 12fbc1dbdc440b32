// Call frames that lie: whatever decoding lets through must lead nowhere outside the frame's
// arrays.
//
// A fuzzer's bytes are read as edits of a legal call. Built with -fsanitize=address; libFuzzer
// brings the bytes where clang builds it with -fsanitize=fuzzer, and else, with JAX_NSA_OWN_MAIN, a
// generator here:
//
//   decode_fuzz [runs] [seed]

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "compress_attention_call.h"
#include "compress_call.h"
#include "edits.h"
#include "frame.h"
#include "legal_frames.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

using testing::Array;
using testing::Bytes;
using testing::Frame;

// Touches the first and the last of `count` elements, as a kernel would.
volatile char touched;
void Touch(const void* array, int64_t count, int64_t size) {
  if (array == nullptr || count <= 0) return;
  const char* const bytes = static_cast<const char*>(array);
  touched = bytes[0];
  touched = bytes[count * size - 1];
}

int64_t SizeOf(DataType dtype) { return dtype == DataType::kFloat32 ? 4 : 2; }

// What lies in the pools: rows of heads, each of `size` elements.
void TouchPool(const PagedProblem& p, const void* first, const Pitch& pitch, int64_t size) {
  const int64_t last_row = p.num_pages * p.page_size - 1, last_head = p.key_value_heads - 1;
  Touch(first, last_row * pitch.row + last_head * pitch.head + size, SizeOf(p.dtype));
}

void TouchPaged(const PagedProblem& p, const PagedArrays& a) {
  Touch(a.query, p.rows * p.heads * p.head_size, SizeOf(p.dtype));
  TouchPool(p, a.key, p.key_pitch(), p.head_size);
  TouchPool(p, a.value, p.value_pitch(), p.value_size);
  Touch(a.block_table, p.sequences * p.pages_per_sequence, 4);
  Touch(a.lengths, p.sequences, 4);
  Touch(a.token_counts, p.sequences, 4);
  Touch(a.first_rows, p.sequences, 4);
}

// Decoding, then all that handlers read before their kernels run.
ffi::Error DecodeCompressAttention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                   ffi::Dictionary attributes) {
  namespace op = compress_attention;
  ffi::ErrorOr<op::Call> call = op::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  const op::Problem& p = call->problem;
  TouchPaged(p, call->arrays);
  Touch(call->arrays.early_counts, p.sequences, 4);
  Touch(call->arrays.select_lengths, p.sequences, 4);
  Touch(call->arrays.attention, p.rows * p.heads * p.value_size, SizeOf(p.attention_dtype));
  Touch(call->arrays.topk_indices, p.rows * p.key_value_heads * p.select_count, 4);
  Touch(call->arrays.lse, p.rows * p.heads, 4);
  Touch(call->arrays.block_scores, p.rows * p.heads * p.max_blocks(), 4);
  for (int64_t b = 0; b < p.sequences; ++b) {
    SequenceRows rows;
    const Fault fault = op::FindRows(p, call->arrays, b, &rows);
    if (rows.first < 0 || rows.owned < rows.count || rows.first + rows.owned > p.rows) abort();
    if (fault != Fault::kNone) return op::FaultError(*call, fault, b, 0);
  }
  return ffi::Error::Success();
}

ffi::Error DecodeSelectAttention(ffi::RemainingArgs args, ffi::RemainingRets rets,
                                 ffi::Dictionary attributes) {
  namespace op = select_attention;
  ffi::ErrorOr<op::Call> call = op::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  const op::Problem& p = call->problem;
  const int64_t size = SizeOf(p.attention_dtype);
  TouchPaged(p, call->arrays);
  Touch(call->arrays.topk_indices, p.rows * p.key_value_heads * p.select_count, 4);
  Touch(call->arrays.attention, p.rows * p.heads * p.value_size, size);
  Touch(call->arrays.window_attention, p.rows * p.heads * p.value_size, size);
  Touch(call->arrays.lse, p.rows * p.heads, 4);
  Touch(call->arrays.window_lse, p.rows * p.heads, 4);
  return op::FindFault(*call);
}

ffi::Error DecodeCompress(ffi::RemainingArgs args, ffi::RemainingRets rets,
                          ffi::Dictionary attributes) {
  namespace op = compress;
  ffi::ErrorOr<op::Call> call = op::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  const op::Problem& p = call->problem;
  for (int64_t i = 0; i < p.pairs; ++i) {
    const op::Pair& pair = call->arrays.pairs[i];
    const int64_t width = p.heads * pair.head_size, size = SizeOf(p.dtype);
    Touch(pair.input, p.num_pages * p.page_size * width, size);
    Touch(pair.cache, p.rows * width, size);
    Touch(pair.weight, p.compress_block_size * p.heads, SizeOf(pair.weight_dtype));
    Touch(pair.bias, width, SizeOf(pair.bias_dtype));
  }
  ffi::ErrorOr<std::vector<op::Write>> writes = op::FindWrites(*call);
  if (writes.has_error()) return writes.error();
  for (const op::Write& write : *writes) {
    if (write.row < 0 || write.row >= p.rows || write.first < 0) abort();
    for (int64_t t = 0; t < p.compress_block_size; ++t) {
      const int64_t row = op::RowOfToken(p, call->arrays, write.sequence, write.first + t);
      if (row < 0 || row >= p.num_pages * p.page_size) abort();
    }
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kCompressAttention, DecodeCompressAttention,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(kSelectAttention, DecodeSelectAttention,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());
XLA_FFI_DEFINE_HANDLER(kCompress, DecodeCompress,
                       ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

std::string Names(const std::vector<Array>& arrays) {
  std::string names;
  for (const Array& array : arrays) names += (names.empty() ? "" : " ") + array.name;
  return names;
}

struct Operator {
  Frame frame;
  XLA_FFI_Handler* handler;
};

const std::vector<Operator>& Operators() {
  static const std::vector<Operator> operators = {
      {testing::CompressAttentionFrame(false), kCompressAttention},
      {testing::CompressAttentionFrame(true), kCompressAttention},
      {testing::SelectAttentionFrame(false), kSelectAttention},
      {testing::SelectAttentionFrame(true), kSelectAttention},
      {testing::CompressFrame(), kCompress}};
  return operators;
}

// One call; the error's message.
std::string Try(Bytes bytes) {
  const Operator& chosen = Operators()[bytes.Below(Operators().size())];
  Frame frame = chosen.frame;
  const bool names_first = bytes.Below(4) == 0;  // or they are those of the arrays as edited
  const auto name = [&] {
    frame.attributes["operands"] = Names(frame.arguments);
    frame.attributes["results"] = Names(frame.results);
  };
  name();
  while (!bytes.empty()) {
    const bool array = bytes.Below(2);
    array ? EditArray(&bytes, &frame) : EditAttribute(&bytes, &frame);
    if (array && !names_first) name();
  }
  return testing::Call(frame).Run(chosen.handler);
}

}  // namespace
}  // namespace jax_nsa

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  jax_nsa::Try({data, size});
  return 0;
}

#ifdef JAX_NSA_OWN_MAIN
int main(int count, char** arguments) {
  const int64_t runs = count > 1 ? std::atoll(arguments[1]) : 100000;
  const int64_t seed = count > 2 ? std::atoll(arguments[2]) : 1;
  int64_t taken = 0;
  for (uint8_t i = 0; i < jax_nsa::Operators().size(); ++i) {
    if (const std::string message = jax_nsa::Try({&i, 1}); !message.empty()) {
      std::printf("the legal call %d is refused: %s\n", i, message.c_str());
      return 1;
    }
  }
  for (int64_t run = 0; run < runs; ++run) {
    // A crash tells its seed: the run is one's own seed where runs is 1.
    std::mt19937_64 random(static_cast<uint64_t>(seed + run));
    std::vector<uint8_t> bytes(2 + random() % 24);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    if (run % 1000 == 0) std::fprintf(stderr, "\r%lld of %lld", (long long)run, (long long)runs);
    taken += jax_nsa::Try({bytes.data(), bytes.size()}).empty();
  }
  std::printf("\n%lld calls from seed %lld, %lld taken\n", (long long)runs, (long long)seed,
              (long long)taken);
}
#endif
