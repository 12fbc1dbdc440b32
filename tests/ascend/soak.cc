// Many calls of both handlers on the stand-in, of changing shapes and with failing CANN calls
// between, from several threads. For sanitizers: exits with the number of wrong outcomes.
//
//     soak CALLS THREADS

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "ascend/context.h"
#include "call_frame.h"

extern "C" {
XLA_FFI_Error* jax_nsa_compress_attention_ascend(XLA_FFI_CallFrame*);
XLA_FFI_Error* jax_nsa_compress_attention_ascend_host(XLA_FFI_CallFrame*);

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

// A call of a few sequences with one to three tokens each.
struct Operands {
  static constexpr int64_t kPage = 16, kHeads = 2, kHeadSize = 4, kValueSize = 3, kColumns = 8;
  static constexpr int64_t kPages = 20;

  explicit Operands(std::mt19937& random) {
    const auto draw = [&](int least, int most) {
      return std::uniform_int_distribution<int>(least, most)(random);
    };
    const int sequences = draw(1, 4);
    int row = 0;
    for (int b = 0; b < sequences; ++b) {
      counts.push_back(draw(1, 3));
      lengths.push_back(draw(1, kColumns * kPage));
      early.push_back(lengths[b] > 1 ? draw(0, counts[b] - 1) : 0);  // each sees something
      first_rows.push_back(row);
      row += counts[b];
      for (int p = 0; p < kColumns; ++p) {
        table.push_back(p * kPage < lengths[b] ? draw(0, kPages - 1) : -1);
      }
    }
    const auto fill = [&](std::vector<uint16_t>& array, size_t size) {
      array.resize(size);
      for (uint16_t& bits : array) bits = static_cast<uint16_t>(draw(0x3F00, 0x3FFF));  // 0.5 to 2
    };
    fill(query, row * kHeads * kHeadSize);
    fill(key, kPages * kPage * kHeadSize);
    fill(value, kPages * kPage * kValueSize);
    attention.resize(row * kHeads * kValueSize);
    indices.resize(row);
  }

  // Calls `add(name, is_result, type, dims, data, bytes)` for each operand and result.
  template <typename Add>
  void ForEach(const Add& add) {
    const int64_t rows = static_cast<int64_t>(indices.size());
    const int64_t sequences = static_cast<int64_t>(counts.size());
    const auto buffer = [&](const char* name, bool is_result, XLA_FFI_DataType type,
                            std::vector<int64_t> dims, auto& array) {
      add(name, is_result, type, std::move(dims), array.data(), array.size() * sizeof(array[0]));
    };
    buffer("query", false, XLA_FFI_DataType_BF16, {rows, kHeads, kHeadSize}, query);
    buffer("key", false, XLA_FFI_DataType_BF16, {kPages, kPage, kHeadSize}, key);
    buffer("value", false, XLA_FFI_DataType_BF16, {kPages, kPage, kValueSize}, value);
    buffer("block_table", false, XLA_FFI_DataType_S32, {sequences, kColumns}, table);
    buffer("lengths", false, XLA_FFI_DataType_S32, {sequences}, lengths);
    buffer("token_counts", false, XLA_FFI_DataType_S32, {sequences}, counts);
    buffer("early_counts", false, XLA_FFI_DataType_S32, {sequences}, early);
    buffer("first_rows", false, XLA_FFI_DataType_S32, {sequences}, first_rows);
    buffer("attention", true, XLA_FFI_DataType_BF16, {rows, kHeads, kValueSize}, attention);
    buffer("topk_indices", true, XLA_FFI_DataType_S32, {rows, 1, 1}, indices);
  }

  // Block 0 leads each row, and the mean of values from 0.5 to 2 is one of them.
  bool ResultsLookRight() const {
    bool right = true;
    for (int32_t index : indices) right = right && index == 0;
    for (uint16_t bits : attention) right = right && bits >= 0x3F00 && bits <= 0x4000;
    return right;
  }

  std::vector<int32_t> counts, lengths, early, first_rows, table, indices;
  std::vector<uint16_t> query, key, value, attention;
};

void SetProblem(CallFrame& frame) {
  frame.SetProblemFloat("scale", 0.5f);
  frame.SetProblemInteger("key_value_heads", 1);
  frame.SetProblemInteger("compress_block_size", 32);
  frame.SetProblemInteger("compress_stride", 16);
  frame.SetProblemInteger("select_block_size", 64);
  frame.SetProblemInteger("aligned", 0);
  frame.SetProblemInteger("init_blocks", 1);
  frame.SetProblemInteger("local_blocks", 2);
  frame.SetProblemInteger("causal", 0);
}

// Whether the call failed.
bool RunOnHost(Operands& operands) {
  CallFrame frame;
  SetProblem(frame);
  frame.SetInteger("device", 0);
  operands.ForEach([&](const char* name, bool is_result, XLA_FFI_DataType type,
                       std::vector<int64_t> dims, void* data, size_t) {
    is_result ? frame.AddResult(name, type, std::move(dims), data)
              : frame.AddArgument(name, type, std::move(dims), data);
  });
  return frame.Run(jax_nsa_compress_attention_ascend_host) != nullptr;
}

bool RunOnDevice(Operands& operands, void* stream) {
  CallFrame frame;
  SetProblem(frame);
  frame.SetIntegers("host_lengths", {});
  frame.SetStream(stream, 1);
  struct Copy {
    void *device, *host;
    size_t bytes;
    bool is_result;
  };
  std::vector<Copy> copies;
  operands.ForEach([&](const char* name, bool is_result, XLA_FFI_DataType type,
                       std::vector<int64_t> dims, void* data, size_t bytes) {
    void* device = nullptr;
    Expect(aclrtMalloc(&device, bytes, 0) == 0, "an array of the caller's");
    standin_poke(device, data, bytes);
    copies.push_back({device, data, bytes, is_result});
    is_result ? frame.AddResult(name, type, std::move(dims), device)
              : frame.AddArgument(name, type, std::move(dims), device);
  });
  const bool failed = frame.Run(jax_nsa_compress_attention_ascend) != nullptr;
  Expect(aclrtSynchronizeStream(stream) == 0, "the caller's stream runs");
  for (const Copy& copy : copies) {
    if (copy.is_result) standin_peek(copy.host, copy.device, copy.bytes);
    Expect(aclrtFree(copy.device) == 0, "the caller's array is freed");
  }
  return failed;
}

void Work(int seed, int calls) {
  std::mt19937 random(seed);
  void* stream = nullptr;
  for (int i = 0; i < calls; ++i) {
    Operands operands(random);
    const bool on_device = i % 2 == 1;
    if (on_device) {
      Expect(aclrtSetDevice(1) == 0, "the caller sets its device");
      if (stream == nullptr) Expect(aclrtCreateStream(&stream) == 0, "the caller's stream");
    }
    const bool failed = on_device ? RunOnDevice(operands, stream) : RunOnHost(operands);
    Expect(failed || operands.ResultsLookRight(), "a call that succeeds has right results");
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
      for (const char* function : {"aclCreateTensor", "aclnnNsaCompressAttentionInfer"}) {
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
