// Call frames that lie: whatever decoding lets through must lead nowhere outside the frame's
// arrays.
//
// A fuzzer's bytes are read as edits of a legal call: other sizes, types, names, attributes and
// contents. Built with -fsanitize=address; libFuzzer brings the bytes where clang builds it with
// -fsanitize=fuzzer, and else, with JAX_NSA_OWN_MAIN, a generator here:
//
//   decode_fuzz [runs] [seed]

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "compress_attention_call.h"
#include "compress_call.h"
#include "frame.h"
#include "select_attention_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

using testing::Array;
using testing::Frame;
using testing::Scalars;

constexpr int64_t kMostElements = 1 << 18;  // of an array: sizes that memory is there for

// Reads bytes until there are none, and then zeros.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  bool empty() const { return data_ == end_; }
  uint64_t Take() { return empty() ? 0 : *data_++; }
  size_t Below(size_t n) { return Take() % n; }
  template <class Container>
  auto& Of(Container& container) {
    return container[Below(container.size())];
  }

 private:
  const uint8_t *data_, *const end_;
};

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

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32, kS32 = XLA_FFI_DataType_S32;

// Legal calls. Sequences are 2, pages 5 of 16 rows.
Frame CompressAttentionFrame(bool packed) {
  Frame frame;
  frame.arguments = {
      {"query", kF32, {2, 3, 4, 8}},       {"key", kF32, {5, 16, 16}},
      {"value", kF32, {5, 16, 12}},        {"block_table", kS32, {2, 2}, {0, 4, 1, 3}},
      {"lengths", kS32, {2}, {20, 32}},    {"token_counts", kS32, {2}, {3, 3}},
      {"early_counts", kS32, {2}, {0, 1}}, {"select_lengths", kS32, {2}, {340, 530}}};
  frame.results = {{"attention", kF32, {2, 3, 4, 6}},
                   {"topk_indices", kS32, {2, 3, 2, 5}},
                   {"lse", kF32, {2, 3, 4}},
                   {"block_scores", kF32, {2, 3, 4, 9}}};
  frame.attributes["problem"] = Scalars{{"scale", 0.5f},
                                        {"key_value_heads", int64_t{2}},
                                        {"aligned", int64_t{0}},
                                        {"interleaved", int64_t{0}},
                                        {"compress_block_size", int64_t{32}},
                                        {"causal", int64_t{1}},
                                        {"compress_stride", int64_t{16}},
                                        {"init_blocks", int64_t{1}},
                                        {"select_block_size", int64_t{64}},
                                        {"local_blocks", int64_t{2}}};
  if (packed) {
    frame.arguments.push_back({"first_rows", kS32, {2}, {0, 3}});
    frame.arguments[0].dims = {6, 4, 8};
    frame.results = {{"attention", kF32, {6, 4, 6}}, {"topk_indices", kS32, {6, 2, 5}}};
  }
  return frame;
}

Frame SelectAttentionFrame(bool interleaved) {
  Frame frame;
  frame.arguments = {{"query", kF32, {2, 3, 4, 8}},
                     {"key", kF32, {5, 16, 16}},
                     {"value", kF32, {5, 16, 12}},
                     {"topk_indices", kS32, {2, 3, 2, 2}, {0, 1, -1, 1}},
                     {"block_table", kS32, {2, 2}, {0, 4, 1, 3}},
                     {"lengths", kS32, {2}, {20, 32}},
                     {"token_counts", kS32, {2}, {3, 3}}};
  frame.results = {{"attention", kF32, {2, 3, 4, 6}},
                   {"window_attention", kF32, {2, 3, 4, 6}},
                   {"lse", kF32, {2, 3, 4}},
                   {"window_lse", kF32, {2, 3, 4}}};
  frame.attributes["problem"] = Scalars{{"scale", 0.5f},
                                        {"key_value_heads", int64_t{2}},
                                        {"partial", int64_t{0}},
                                        {"tokens_apart", int64_t{0}},
                                        {"interleaved", int64_t{interleaved}},
                                        {"select_block_size", int64_t{16}},
                                        {"window_size", int64_t{7}}};
  if (interleaved) frame.arguments[1].dims = frame.arguments[2].dims = {5, 16, 28};
  return frame;
}

Frame CompressFrame() {
  Frame frame;
  frame.arguments = {
      {"input_0", kF32, {5, 16, 12}},      {"weight_0", kF32, {32, 2}},
      {"cache_0", kF32, {7, 12}},          {"bias_0", kF32, {2, 6}},
      {"input_1", kF32, {5, 16, 8}},       {"weight_1", kF32, {32, 2}},
      {"cache_1", kF32, {7, 8}},           {"block_table", kS32, {2, 3}, {0, 4, 1, 3, 2, 1}},
      {"lengths", kS32, {2}, {48, 32}},    {"slot_mapping", kS32, {2}, {6, 0}},
      {"token_counts", kS32, {2}, {1, 16}}};
  frame.results = {{"cache_0", kF32, {7, 12}}, {"cache_1", kF32, {7, 8}}};
  frame.attributes["problem"] = Scalars{{"heads", int64_t{2}},
                                        {"compress_block_size", int64_t{32}},
                                        {"compress_stride", int64_t{16}}};
  frame.in_place = "cache_0 cache_1 ";
  return frame;
}

void EditArray(Bytes* bytes, Frame* frame) {
  constexpr int64_t kSizes[] = {0,  1,  2,   3,   4,   6,   8,   12,  15,  16,     17,
                                32, 64, 128, 129, 192, 193, 256, 257, 272, 1 << 15};
  constexpr XLA_FFI_DataType kTypes[] = {kF32,
                                         kS32,
                                         XLA_FFI_DataType_F16,
                                         XLA_FFI_DataType_BF16,
                                         XLA_FFI_DataType_F64,
                                         XLA_FFI_DataType_S64,
                                         XLA_FFI_DataType_PRED};
  constexpr int32_t kContents[] = {0,  1,  2,  3,  4,  5,  16,        31,        32,      33,
                                   48, 63, -1, -2, -7, 99, INT32_MAX, INT32_MIN, 1 << 30, 340};
  std::vector<Array>& list = bytes->Below(3) ? frame->arguments : frame->results;
  if (list.empty()) return;
  const size_t at = bytes->Below(list.size());
  Array& array = list[at];
  switch (bytes->Below(8)) {
    case 0:
    case 1: {
      if (array.dims.empty()) return;
      int64_t& dim = bytes->Of(array.dims);
      const int64_t before = dim;
      dim = kSizes[bytes->Below(std::size(kSizes))];
      int64_t count = 1;
      for (int64_t d : array.dims) count *= std::max<int64_t>(1, d);
      if (count > kMostElements) dim = before;
      return;
    }
    case 2:
      if (bytes->Below(2)) {
        array.dims.push_back(1);
      } else if (!array.dims.empty()) {
        array.dims.pop_back();
      }
      return;
    case 3:
      array.type = kTypes[bytes->Below(std::size(kTypes))];
      return;
    case 4:
      list.erase(list.begin() + static_cast<int64_t>(at));
      return;
    case 5:
      list.push_back(Array(bytes->Of(list)));
      return;
    case 6:
      array.name = bytes->Below(2) ? bytes->Of(list).name : std::string("surprise");
      return;
    default:
      for (size_t i = bytes->Below(6); i > 0; --i) {
        array.contents.push_back(kContents[bytes->Below(std::size(kContents))]);
      }
      return;
  }
}

void EditAttribute(Bytes* bytes, Frame* frame) {
  constexpr int64_t kIntegers[] = {0,  1,  2,   3,   15,  16, 17,  32,        48,        64,
                                   72, 96, 128, 144, 255, -1, -16, INT64_MAX, INT64_MIN, INT32_MAX};
  const int64_t integer = kIntegers[bytes->Below(std::size(kIntegers))];
  const auto of_another_type = [&]() -> testing::Scalar {
    switch (bytes->Below(4)) {
      case 0:
        return static_cast<float>(integer);
      case 1:
        return static_cast<double>(integer);
      case 2:
        return static_cast<int32_t>(integer);
      default:
        return integer > 0;
    }
  };
  auto* const problem = std::get_if<Scalars>(&frame->attributes["problem"]);
  switch (bytes->Below(8)) {
    case 0:
    case 1:
    case 2:
      if (problem && !problem->empty()) {
        auto found = problem->begin();
        std::advance(found, bytes->Below(problem->size()));
        found->second = bytes->Below(4) ? testing::Scalar(integer) : of_another_type();
        if (bytes->Below(16) == 1) problem->erase(found);
      }
      return;
    case 3:
      frame->attributes["maps"] = std::vector<int64_t>{integer, kIntegers[bytes->Below(20)]};
      return;
    case 4:
      frame->attributes["pool_maps"] = testing::Scalar(integer);
      return;
    case 5:
      frame->attributes["faults"] = std::string(bytes->Below(2) ? "nan" : "fail");
      return;
    case 6:
      frame->in_place.clear();
      return;
    default: {
      static const std::string kNames[] = {"operands", "results", "problem", "maps", "is_part"};
      const std::string& name = kNames[bytes->Below(5)];
      switch (bytes->Below(4)) {
        case 0:
          frame->attributes.erase(name);
          return;
        case 1:
          frame->attributes[name] = of_another_type();
          return;
        case 2:
          frame->attributes[name] = std::string("query  key\0 lengths", bytes->Below(19));
          return;
        default:
          frame->attributes[name] = std::vector<int64_t>(bytes->Below(3), integer);
          return;
      }
    }
  }
}

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
      {CompressAttentionFrame(false), kCompressAttention},
      {CompressAttentionFrame(true), kCompressAttention},
      {SelectAttentionFrame(false), kSelectAttention},
      {SelectAttentionFrame(true), kSelectAttention},
      {CompressFrame(), kCompress}};
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
