// Many calls of all handlers on the stand-in, of changing shapes and with failing CANN calls
// between, from several threads. For sanitizers: exits with the number of wrong outcomes.
//
//     soak CALLS THREADS

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ascend/context.h"
#include "call_frame.h"

extern "C" {
XLA_FFI_Error* jax_nsa_compress_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_attention_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_select_attention_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_ascend_host(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_step_ascend(XLA_FFI_CallFrame*);

int aclrtSetDevice(int32_t);
int aclrtCreateStream(void**);
int aclrtSynchronizeStream(void*);
int aclrtDestroyStream(void*);
int aclrtMalloc(void**, size_t, int);
int aclrtFree(void*);
void standin_plan_fault(const char*, int64_t, int, int);
int standin_poke(void*, const void*, size_t);
int standin_peek(void*, const void*, size_t);
int64_t standin_counter(const char*);
}

namespace {

std::atomic<int> wrong = 0;

void Expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  ++wrong;
}

int Draw(std::mt19937& random, int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(random);
}

// An operand or result, as bytes.
struct Array {
  const char* name;
  bool is_result;
  XLA_FFI_DataType type;
  std::vector<int64_t> dims;
  std::vector<uint16_t> words;  // two of them for each int32

  size_t bytes() const { return words.size() * sizeof(uint16_t); }
};

Array Integers(const char* name, std::vector<int64_t> dims, const std::vector<int32_t>& values) {
  Array array{name, false, XLA_FFI_DataType_S32, std::move(dims), {}};
  array.words.resize(2 * values.size());
  std::memcpy(array.words.data(), values.data(), array.bytes());
  return array;
}

// Values from 0.5 to 2, in bfloat16.
Array Floats(const char* name, std::vector<int64_t> dims, std::mt19937& random) {
  size_t size = 1;
  for (int64_t dim : dims) size *= dim;
  Array array{name, false, XLA_FFI_DataType_BF16, std::move(dims), {}};
  array.words.resize(size);
  for (uint16_t& bits : array.words) bits = static_cast<uint16_t>(Draw(random, 0x3F00, 0x3FFF));
  return array;
}

Array Result(const char* name, XLA_FFI_DataType type, std::vector<int64_t> dims) {
  size_t size = type == XLA_FFI_DataType_S32 ? 2 : 1;
  for (int64_t dim : dims) size *= dim;
  return {name, true, type, std::move(dims), std::vector<uint16_t>(size)};
}

// One call of an operator.
struct Call {
  XLA_FFI_Handler *host, *device;
  std::vector<std::pair<const char*, int64_t>> problem;  // its integers
  std::vector<Array> arrays;
  // Of each result, from where to where its words are.
  uint16_t least = 0x3F00, most = 0x4000;
  // Of one custom call that is several: its attributes' prefix, and the calls after it.
  const char* prefix = "";
  std::vector<Call> rest = {};

  bool ResultsLookRight() const {
    bool right = true;
    for (const Call& call : rest) right = right && call.ResultsLookRight();
    for (const Array& array : arrays) {
      if (!array.is_result) continue;
      for (uint16_t bits : array.words) {
        right = right && (array.type == XLA_FFI_DataType_S32 ? bits == 0  // block 0 leads each row
                                                             : bits >= least && bits <= most);
      }
    }
    return right;
  }
};

// A few sequences with one to three tokens each. The mean of values from 0.5 to 2 is one of them.
Call CompressAttention(std::mt19937& random) {
  constexpr int64_t kPage = 16, kHeads = 2, kHeadSize = 4, kValueSize = 3, kPages = 20;
  constexpr int kColumns = 8;
  const int64_t sequences = Draw(random, 1, 4);
  std::vector<int32_t> counts, lengths, early, first_rows, table;
  int64_t rows = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    counts.push_back(Draw(random, 1, 3));
    lengths.push_back(Draw(random, 1, kColumns * kPage));
    early.push_back(lengths[b] > 1 ? Draw(random, 0, counts[b] - 1) : 0);  // each sees something
    first_rows.push_back(static_cast<int32_t>(rows));
    rows += counts[b];
    for (int p = 0; p < kColumns; ++p) {
      table.push_back(p * kPage < lengths[b] ? Draw(random, 0, kPages - 1) : -1);
    }
  }
  return {jax_nsa_compress_attention_ascend_host,
          jax_nsa_compress_attention_ascend,
          {{"key_value_heads", 1},
           {"compress_block_size", 32},
           {"compress_stride", 16},
           {"select_block_size", 64},
           {"aligned", 0},
           {"init_blocks", 1},
           {"local_blocks", 2},
           {"causal", 0},
           {"interleaved", 0}},
          {Floats("query", {rows, kHeads, kHeadSize}, random),
           Floats("key", {kPages, kPage, kHeadSize}, random),
           Floats("value", {kPages, kPage, kValueSize}, random),
           Integers("block_table", {sequences, kColumns}, table),
           Integers("lengths", {sequences}, lengths), Integers("token_counts", {sequences}, counts),
           Integers("early_counts", {sequences}, early),
           Integers("first_rows", {sequences}, first_rows),
           Result("attention", XLA_FFI_DataType_BF16, {rows, kHeads, kValueSize}),
           Result("topk_indices", XLA_FFI_DataType_S32, {rows, 1, 1})}};
}

// A row of query for each sequence, safe as the program makes it.
Call SelectAttention(std::mt19937& random) {
  constexpr int64_t kPage = 64, kHeads = 2, kPages = 6;
  constexpr int kColumns = 2, kCount = 2;
  const int64_t sequences = Draw(random, 1, 4);
  std::vector<int32_t> lengths, table, ids;
  for (int64_t b = 0; b < sequences; ++b) {
    lengths.push_back(Draw(random, 1, kColumns * kPage));
    for (int p = 0; p < kColumns; ++p) table.push_back(Draw(random, 0, kPages - 1));
    ids.push_back(Draw(random, 0, (lengths[b] - 1) / 32));
    ids.push_back(Draw(random, -1, (lengths[b] - 1) / 32));
  }
  return {
      jax_nsa_select_attention_ascend_host,
      jax_nsa_select_attention_ascend,
      {{"key_value_heads", 1},
       {"select_block_size", 32},
       {"window_size", 0},
       {"partial", 0},
       {"tokens_apart", 0},
       {"interleaved", 0}},
      {Floats("query", {sequences, 1, kHeads, 192}, random),
       Floats("key", {kPages, kPage, 192}, random), Floats("value", {kPages, kPage, 128}, random),
       Integers("block_table", {sequences, kColumns}, table),
       Integers("lengths", {sequences}, lengths),
       Integers("topk_indices", {sequences, 1, 1, kCount}, ids),
       Result("attention", XLA_FFI_DataType_BF16, {sequences, 1, kHeads, 128})}};
}

// The cache holds values from 0.5 to 2 where no window is written, and 16 products of such values
// add up to 4 to 64.
Call Compress(std::mt19937& random) {
  constexpr int64_t kPage = 64, kHeads = 2, kHeadSize = 16, kPages = 6, kRows = 5;
  constexpr int kColumns = 2;
  const int64_t sequences = Draw(random, 1, 4);
  std::vector<int32_t> counts, lengths, table, slots;
  for (int64_t b = 0; b < sequences; ++b) {
    counts.push_back(Draw(random, 0, 16));
    lengths.push_back(Draw(random, 0, kColumns * kPage));
    slots.push_back(static_cast<int32_t>(b));
    for (int p = 0; p < kColumns; ++p) table.push_back(Draw(random, 0, kPages - 1));
  }
  return {jax_nsa_compress_ascend_host,
          jax_nsa_compress_ascend,
          {{"heads", kHeads}, {"compress_block_size", 16}, {"compress_stride", 16}},
          {Floats("input_0", {kPages, kPage, kHeads * kHeadSize}, random),
           Floats("weight_0", {16, kHeads}, random),
           Floats("cache_0", {kRows, kHeads, kHeadSize}, random),
           Integers("block_table", {sequences, kColumns}, table),
           Integers("lengths", {sequences}, lengths), Integers("slot_mapping", {sequences}, slots),
           Integers("token_counts", {sequences}, counts),
           Result("cache_0", XLA_FFI_DataType_BF16, {kRows, kHeads, kHeadSize})},
          0x3F00,
          0x4280};
}

// A step of the operators' calls: their rows, and lengths that reach the blocks.
Call Step(std::mt19937& random) {
  Call chosen = SelectAttention(random), window = SelectAttention(random);
  const int64_t rows = chosen.arrays[0].dims[0];
  constexpr int64_t kPages = 3, kPage = 16, kHeads = 2;
  std::vector<int32_t> lengths, table, ends(rows, 128);
  for (int64_t b = 0; b < rows; ++b) {
    lengths.push_back(Draw(random, 1, 2));
    table.push_back(Draw(random, 0, kPages - 1));
  }
  Call call = CompressAttention(random);
  call.device = jax_nsa_step_ascend;
  call.prefix = "compressed_";
  call.arrays = {Floats("query", {rows, 1, kHeads, 192}, random),
                 Floats("key", {kPages, kPage, 192}, random),
                 Floats("value", {kPages, kPage, 128}, random),
                 Integers("block_table", {rows, 1}, table),
                 Integers("lengths", {rows}, lengths),
                 Result("attention", XLA_FFI_DataType_BF16, {rows, 1, kHeads, 128}),
                 Result("topk_indices", XLA_FFI_DataType_S32, {rows, 1, 1, 1})};
  chosen.prefix = "chosen_";
  chosen.arrays[4] = Integers("lengths", {rows}, ends);
  chosen.arrays[5] = Integers("topk_indices", {rows, 1, 1, 1}, std::vector<int32_t>(rows));
  window.prefix = "window_";
  call.rest = {std::move(chosen), std::move(window)};
  return call;
}

void SetProblem(const Call& call, CallFrame& frame) {
  frame.SetProblemFloat("scale", 0.5f);
  for (const auto& [name, value] : call.problem) frame.SetProblemInteger(name, value);
}

// Adds the arrays to a frame where `place` has put them: results that have an operand's name lie in
// its memory.
template <typename Place>
void AddArrays(Call& call, CallFrame& frame, const Place& place) {
  std::map<std::string, void*> operands;
  for (Array& array : call.arrays) {
    const auto operand = operands.find(array.name);
    if (!array.is_result) {
      void* const data = operands[array.name] = place(array, nullptr);
      frame.AddArgument(array.name, array.type, array.dims, data);
    } else {
      void* const known = operand == operands.end() ? nullptr : operand->second;
      frame.AddResult(array.name, array.type, array.dims, place(array, known));
    }
  }
}

// Whether the call failed, which it does for planned faults alone.
bool Fails(CallFrame& frame, XLA_FFI_Handler* handler) {
  const auto error = frame.Run(handler);
  if (error == nullptr) return false;
  Expect(error->message.find("injected fault") != std::string::npos, error->message.c_str());
  return true;
}

bool RunOnHost(Call& call) {
  CallFrame frame;
  SetProblem(call, frame);
  frame.SetInteger("device", 0);
  std::vector<std::pair<Array*, void*>> results;
  AddArrays(call, frame, [&](Array& array, void* known) {
    void* const data = known != nullptr ? known : array.words.data();
    if (array.is_result) results.push_back({&array, data});
    return data;
  });
  const bool failed = Fails(frame, call.host);
  for (const auto& [array, data] : results) {
    std::memmove(array->words.data(), data, array->bytes());
  }
  return failed;
}

bool RunOnDevice(Call& call, void* stream) {
  CallFrame frame;
  frame.SetStream(stream, 1);
  std::vector<void*> memory;
  std::vector<std::pair<Array*, void*>> results;
  const auto add = [&](Call& part) {
    frame.Begin(part.prefix);
    SetProblem(part, frame);
    frame.SetIntegers("host_lengths", {});
    AddArrays(part, frame, [&](Array& array, void* known) {
      void* device = known;
      if (device == nullptr) {
        Expect(aclrtMalloc(&device, array.bytes(), 0) == 0, "an array of the caller's");
        standin_poke(device, array.words.data(), array.bytes());
        memory.push_back(device);
      }
      if (array.is_result) results.push_back({&array, device});
      return device;
    });
  };
  add(call);
  for (Call& part : call.rest) add(part);
  const bool failed = Fails(frame, call.device);
  Expect(aclrtSynchronizeStream(stream) == 0, "the caller's stream runs");
  for (const auto& [array, device] : results) {
    standin_peek(array->words.data(), device, array->bytes());
  }
  for (void* device : memory) Expect(aclrtFree(device) == 0, "the caller's array is freed");
  return failed;
}

void Work(int seed, int calls) {
  std::mt19937 random(seed);
  void* stream = nullptr;
  for (int i = 0; i < calls; ++i) {
    const int which = i % 7;  // each operator on either route, and the step
    Call call = which == 6       ? Step(random)
                : which % 3 == 0 ? CompressAttention(random)
                : which % 3 == 1 ? SelectAttention(random)
                                 : Compress(random);
    const bool on_device = which >= 3;
    if (on_device) {
      Expect(aclrtSetDevice(1) == 0, "the caller sets its device");
      if (stream == nullptr) Expect(aclrtCreateStream(&stream) == 0, "the caller's stream");
    }
    const bool failed = on_device ? RunOnDevice(call, stream) : RunOnHost(call);
    Expect(failed || call.ResultsLookRight(), "a call that succeeds has right results");
  }
  jax_nsa::ascend::Contexts::Get().Release();  // before the stream goes that some are kept for
  aclrtSetDevice(1);
  if (stream != nullptr) Expect(aclrtDestroyStream(stream) == 0, "the caller's stream goes");
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 100,
            threads = argc > 2 ? std::atoi(argv[2]) : 1;
  if (jax_nsa::ascend::LoadApi().has_error()) return 99;
  // Only one thread at a time can tell whose call a planned fault will hit.
  if (threads == 1) {
    for (int i = 1; i < calls; i += 10) {
      for (const char* function : {"aclCreateTensor", "aclnnNsaCompressAttentionInfer",
                                   "aclnnNsaSelectedAttentionInfer", "aclnnNsaCompressWithCache"}) {
        standin_plan_fault(function, 7 * i, 507899, 0);
      }
    }
  }
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(Work, i, calls / threads);
  for (std::thread& worker : workers) worker.join();
  Expect(!jax_nsa::ascend::Contexts::Get().Release().failure(), "the memory goes back");
  std::printf("%d calls, %lld launches, %d wrong\n", calls,
              static_cast<long long>(standin_counter("launches libopapi.so")), wrong.load());
  return wrong;
}
