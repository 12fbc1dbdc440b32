// The stand-in's library of operators: aclnnNsaCompressAttentionInfer, checked to the letter of
// its documentation and computed the plain way in double precision.
//
// Compiled with STANDIN_LIBRARY, the name it counts its launches under; with
// STANDIN_WITHOUT_OPERATOR it is a library of operators that lacks this one.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "standin.h"

using namespace standin;  // the interface below is C's
using Lock = std::lock_guard<std::recursive_mutex>;

#ifdef STANDIN_WITHOUT_OPERATOR
extern "C" STANDIN_EXPORT int aclnnAddGetWorkspaceSize() { return kSuccess; }
#else

namespace {

constexpr int kFloat16 = 1, kInt32 = 3, kBool = 12, kBFloat16 = 27;  // aclDataType
constexpr int kNd = 2;                                               // aclFormat
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Executor {
  const void* tensors[7];  // query, key, value, mask or null, table, output, topk output
  Tensor query, key, value, table, output, topk;
  bool padded, causal;
  std::vector<int64_t> q_lengths, lengths, select_lengths;
  int64_t heads, kv_heads, select_block, select_count, block, stride;
  double scale;
  uint64_t workspace_size;
};

int64_t Size(const Tensor& tensor) {
  return std::accumulate(tensor.dims.begin(), tensor.dims.end(), int64_t{1},
                         std::multiplies<int64_t>());
}

int64_t Bytes(const Tensor& tensor) {
  return Size(tensor) * (tensor.dtype == kInt32 ? 4 : tensor.dtype == kBool ? 1 : 2);
}

double Decode(uint16_t bits, int dtype) {
  if (dtype == kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return fraction ? std::nan("") : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

// Rounds to the nearest, ties to even, by counting in units of the last place.
uint16_t Encode(double value, int dtype) {
  const int precision = dtype == kBFloat16 ? 8 : 11, least = dtype == kBFloat16 ? -126 : -14;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = dtype == kBFloat16 ? 0x7F80 : 0x7C00;
  if (std::isnan(value)) return infinity | 1 << (precision - 2);
  if (std::isinf(value)) return sign | infinity;
  if (value == 0.0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  exponent = std::max(exponent - 1, least);  // of the leading bit
  const auto units =
      static_cast<int64_t>(std::nearbyint(std::ldexp(std::fabs(value), precision - 1 - exponent)));
  // A carry out of the fraction lands in the exponent, as it should.
  const int64_t bits = units + (static_cast<int64_t>(exponent - least) << (precision - 1));
  return sign | static_cast<uint16_t>(std::min<int64_t>(bits, infinity));
}

int64_t NumBlocks(const Executor& e, int64_t length) {
  const int64_t original = (length - 1) * e.stride + e.block;
  return (original + e.select_block - 1) / e.select_block;
}

// --- The first phase: everything is held to the documentation. ----------------------------------

class Checks {
 public:
  int status = kSuccess;

  bool That(bool holds, const std::string& what, int otherwise = kInvalidOperand) {
    if (status == kSuccess && !holds) {
      status = Violation(otherwise, "aclnnNsaCompressAttentionInferGetWorkspaceSize: " + what);
    }
    return status == kSuccess;
  }

  Tensor Contiguous(const char* name, const void* handle, std::vector<int> dtypes, size_t rank) {
    const std::string text = name;
    if (!That(handle != nullptr, text + " is null", kNullParameter)) return {};
    const auto found = std::static_pointer_cast<Tensor>(Find("tensor", handle));
    if (!That(found != nullptr, text + " is not a live tensor")) return {};
    const Tensor& t = *found;
    That(std::count(dtypes.begin(), dtypes.end(), t.dtype) == 1,
         text + " has dtype " + std::to_string(t.dtype));
    That(t.dims.size() == rank, text + " has rank " + std::to_string(t.dims.size()));
    That(t.format == kNd, text + " is not ND");
    That(t.offset == 0, text + " has an offset");
    That(t.storage_dims == t.dims, text + " has a storage shape of its own");
    int64_t stride = 1;
    for (size_t axis = t.dims.size(); axis-- > 0;) {
      That(t.dims[axis] > 0, text + " is empty");
      That(t.strides[axis] == stride, text + " is not contiguous");
      stride *= t.dims[axis];
    }
    if (That(status == kSuccess, "")) {
      That(DeviceBytes(t.data, Bytes(t), CurrentDevice()) != nullptr,
           text + " is not in live device memory of that size");
    }
    return t;
  }

  std::vector<int64_t> Integers(const char* name, const void* handle) {
    if (!That(handle != nullptr, std::string(name) + " is null", kNullParameter)) return {};
    const auto found =
        std::static_pointer_cast<std::vector<int64_t> >(Find("integer array", handle));
    if (!That(found != nullptr, std::string(name) + " is not a live array")) return {};
    return *found;
  }

  void Dims(const char* name, const Tensor& tensor, std::vector<int64_t> expected) {
    That(tensor.dims == expected, std::string(name) + " has the wrong shape");
  }
};

bool IsWindowSize(int64_t size) { return size >= 16 && size <= 128 && size % 16 == 0; }

// --- The second phase, when the stream gets there. ----------------------------------------------

void ComputeRow(const Executor& e, const uint16_t* query, const std::byte* keys,
                const std::byte* values, const int32_t* table, int64_t length, int64_t visible,
                uint16_t* output, int32_t* topk) {
  const int64_t page = e.key.dims[1], head_size = e.query.dims.back();
  const int64_t value_size = e.output.dims.back(), group = e.heads / e.kv_heads;
  const int dtype = e.query.dtype;
  const auto element = [&](const std::byte* pool, int64_t position, int64_t width, int64_t column) {
    const int64_t row = table[position / page] * page + position % page;
    return Decode(reinterpret_cast<const uint16_t*>(pool)[row * width + column], dtype);
  };
  const int64_t blocks = NumBlocks(e, length);
  for (int64_t kv = 0; kv < e.kv_heads; ++kv) {
    std::vector<double> importance(blocks, 0.0);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = kv * group + g;
      std::vector<double> p(visible);
      double largest = -kInfinity, total = 0.0;
      for (int64_t i = 0; i < visible; ++i) {
        double dot = 0.0;
        for (int64_t c = 0; c < head_size; ++c) {
          dot += Decode(query[head * head_size + c], dtype) *
                 element(keys, i, e.kv_heads * head_size, kv * head_size + c);
        }
        p[i] = e.scale * dot;
        largest = std::fmax(largest, p[i]);
      }
      for (double& x : p) total += x = std::exp(x - largest);
      for (double& x : p) x /= total;
      for (int64_t c = 0; c < value_size; ++c) {
        double sum = 0.0;
        for (int64_t i = 0; i < visible; ++i) {
          sum += p[i] * element(values, i, e.kv_heads * value_size, kv * value_size + c);
        }
        output[head * value_size + c] = Encode(sum, dtype);
      }
      const int64_t m_count = e.select_block / e.stride, n_count = e.block / e.stride;
      for (int64_t j = 0; j < blocks; ++j) {
        for (int64_t m = 0; m < m_count; ++m) {
          for (int64_t n = 0; n < n_count; ++n) {
            const int64_t i = m_count * (j + 1) - m - n;
            if (i >= 0 && i < visible) importance[j] += p[i];
          }
        }
      }
    }
    for (int64_t j = 0; j < blocks; ++j) {
      if (std::isnan(importance[j])) importance[j] = -1.0;
      if (j == 0 || j >= blocks - 2) importance[j] = kInfinity;
    }
    std::vector<int32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return importance[a] > importance[b]; });
    std::copy_n(order.begin(), e.select_count, topk + kv * e.select_count);
  }
}

void Compute(const Executor& e, const void* workspace, int device) {
  const auto bytes = [&](const Tensor& tensor) {
    return DeviceBytes(tensor.data, Bytes(tensor), device);
  };
  std::byte* scratch = DeviceBytes(workspace, e.workspace_size, device);
  for (const Tensor* tensor : {&e.query, &e.key, &e.value, &e.table, &e.output, &e.topk}) {
    if (bytes(*tensor) == nullptr || scratch == nullptr) {
      Violation(kInvalidOperand, "the kernel runs on memory that was freed meanwhile");
      return;
    }
  }
  for (const Tensor* pool : {&e.key, &e.value}) {
    const auto* values = reinterpret_cast<const uint16_t*>(bytes(*pool));
    Count("values in the pools that are not finite",
          std::count_if(values, values + Size(*pool),
                        [&](uint16_t bits) { return !std::isfinite(Decode(bits, pool->dtype)); }));
  }
  std::memset(scratch, 0xEE, e.workspace_size);  // it is the kernel's to write
  const auto* query = reinterpret_cast<const uint16_t*>(bytes(e.query));
  const auto* table = reinterpret_cast<const int32_t*>(bytes(e.table));
  auto* output = reinterpret_cast<uint16_t*>(bytes(e.output));
  auto* topk = reinterpret_cast<int32_t*>(bytes(e.topk));
  const int64_t page = e.key.dims[1], columns = e.table.dims[1];

  int64_t packed_row = 0;
  for (size_t b = 0; b < e.lengths.size(); ++b) {
    const int32_t* pages = table + b * columns;
    for (int64_t p = 0; p * page < e.lengths[b]; ++p) {
      if (pages[p] < 0 || pages[p] >= e.key.dims[0]) {
        Violation(kInvalidOperand, "the kernel reads past the pool: block_table has page " +
                                       std::to_string(pages[p]));
        return;
      }
    }
    for (int64_t t = 0; t < e.q_lengths[b]; ++t) {
      int64_t visible = e.lengths[b];
      if (e.causal) {
        const int64_t past = e.select_lengths[b] - ((e.lengths[b] - 1) * e.stride + e.block);
        if (e.q_lengths[b] - 1 - t > past) --visible;
      }
      const int64_t row = e.padded ? b * e.query.dims[1] + t : packed_row + t;
      ComputeRow(e, query + row * e.heads * e.query.dims.back(), bytes(e.key), bytes(e.value),
                 pages, e.lengths[b], visible, output + row * e.heads * e.output.dims.back(),
                 topk + row * e.kv_heads * e.select_count);
    }
    packed_row += e.q_lengths[b];
  }
}

}  // namespace

extern "C" {

STANDIN_EXPORT int aclnnNsaCompressAttentionInferGetWorkspaceSize(
    const void* query, const void* key, const void* value, const void* mask, const void* table,
    const void* q_lengths, const void* lengths, const void* select_lengths, const void* topk_mask,
    int64_t heads, int64_t kv_heads, int64_t select_block, int64_t select_count, int64_t block,
    int64_t stride, double scale, char* layout, int64_t page_size, int64_t sparse_mode,
    const void* output, const void* topk, uint64_t* workspace_size, void** executor) {
  const Lock lock(Mutex());
  int status = kSuccess;
  const Fault fault = Enter("aclnnNsaCompressAttentionInferGetWorkspaceSize", &status);
  if (fault == Fault::kStatus) return status;
  if (fault == Fault::kNull) {
    *workspace_size = 0;
    *executor = nullptr;
    return kSuccess;
  }
  Checks checks;
  auto e = std::make_shared<Executor>();
  checks.That(layout != nullptr, "layout is null", kNullParameter);
  if (checks.status != kSuccess) return checks.status;
  const std::string layout_name = layout;
  checks.That(layout_name == "TND" || layout_name == "BSND", "layout is " + layout_name);
  e->padded = layout_name == "BSND";
  const size_t rank = e->padded ? 4 : 3;
  e->query = checks.Contiguous("query", query, {kFloat16, kBFloat16}, rank);
  e->key = checks.Contiguous("key", key, {e->query.dtype}, 3);
  e->value = checks.Contiguous("value", value, {e->query.dtype}, 3);
  e->table = checks.Contiguous("blockTable", table, {kInt32}, 2);
  e->output = checks.Contiguous("output", output, {e->query.dtype}, rank);
  e->topk = checks.Contiguous("topKOutput", topk, {kInt32}, rank);
  // Documented as optional; some versions read uninitialised memory without it.
  e->q_lengths = checks.Integers("actualQSeqLen", q_lengths);
  e->lengths = checks.Integers("actualCmpKvSeqLen", lengths);
  if (select_lengths != nullptr) {
    e->select_lengths = checks.Integers("actualSelKvSeqLen", select_lengths);
  }
  checks.That(topk_mask == nullptr, "topKMask is reserved");
  checks.That(sparse_mode == 0, "sparseMode is not 0");
  if (checks.status != kSuccess) return checks.status;

  const int64_t sequences = e->table.dims[0];
  checks.That(heads > 0 && kv_heads > 0 && heads % kv_heads == 0, "heads do not divide");
  checks.That(checks.status != kSuccess || 128 % (heads / kv_heads) == 0, "128 % group is not 0");
  if (checks.status != kSuccess) return checks.status;
  const int64_t head_size = e->query.dims.back(), value_size = e->output.dims.back();
  checks.That(head_size <= 192 && value_size <= 128 && value_size <= head_size, "head sizes");
  checks.That(page_size % 16 == 0 && page_size <= 128, "pageBlockSize");
  checks.That(sequences <= 10000, "more than 10000 sequences");
  checks.That(e->query.dims[rank - 2] == heads, "query has not numHeads heads");
  checks.Dims("key", e->key, {e->key.dims[0], page_size, kv_heads * head_size});
  checks.Dims("value", e->value, {e->key.dims[0], page_size, kv_heads * value_size});
  std::vector<int64_t> rows(e->query.dims.begin(), e->query.dims.end() - 2);
  const auto with = [&](int64_t one, int64_t other) {
    std::vector<int64_t> dims = rows;
    dims.insert(dims.end(), {one, other});
    return dims;
  };
  checks.Dims("output", e->output, with(heads, value_size));
  checks.Dims("topKOutput", e->topk, with(kv_heads, select_count));
  checks.That(IsWindowSize(block) && IsWindowSize(select_block) && block >= stride &&
                  (stride == 16 || stride == 32 || stride == 48 || stride == 64) &&
                  select_block >= block && select_block % stride == 0,
              "block sizes");
  const auto per_sequence = [&](const std::vector<int64_t>& values) {
    return static_cast<int64_t>(values.size()) == sequences;
  };
  checks.That(per_sequence(e->q_lengths), "actualQSeqLen has not one entry per sequence");
  checks.That(per_sequence(e->lengths), "actualCmpKvSeqLen has not one entry per sequence");
  if (checks.status != kSuccess) return checks.status;

  e->heads = heads;
  e->kv_heads = kv_heads;
  e->select_block = select_block;
  e->select_count = select_count;
  e->block = block;
  e->stride = stride;
  e->scale = scale;
  int64_t tokens = 0, most = 0;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t length = e->lengths[b], count = e->q_lengths[b];
    checks.That(length >= 1 && length <= 8192 && length <= e->table.dims[1] * page_size,
                "actualCmpKvSeqLen is " + std::to_string(length));
    checks.That(NumBlocks(*e, length) <= 4096, "more than 4096 blocks");
    checks.That(select_count >= 1 && select_count <= NumBlocks(*e, length), "selectBlockCount");
    // CANN would quietly take them for single tokens.
    checks.That(count >= 1 && count <= 4, "actualQSeqLen is " + std::to_string(count));
    tokens += count;
    most = std::max(most, count);
  }
  if (e->padded) {
    checks.That(rows[0] == sequences && rows[1] <= 4 && most <= rows[1], "S of query");
  } else {
    checks.That(rows[0] == tokens, "T is not the sum of actualQSeqLen");
  }
  if (most > 1) {
    if (checks.That(per_sequence(e->select_lengths),
                    "several tokens without an actualSelKvSeqLen for each sequence")) {
      for (int64_t b = 0; b < sequences; ++b) {
        checks.That((e->select_lengths[b] - block) / stride + 1 == e->lengths[b] &&
                        e->select_lengths[b] >= block && e->q_lengths[b] <= e->select_lengths[b],
                    "actualSelKvSeqLen does not compress to actualCmpKvSeqLen");
      }
    }
  }
  e->causal = mask != nullptr;
  if (e->causal) {
    checks.Contiguous("attentionMask", mask, {kBool}, 2);
    checks.That(most > 1, "a mask with one query token does nothing");
  }
  checks.That(workspace_size != nullptr && executor != nullptr, "null results", kNullParameter);
  if (checks.status != kSuccess) return checks.status;

  const void* all[] = {query, key, value, mask, table, output, topk};
  std::copy(std::begin(all), std::end(all), e->tensors);
  e->workspace_size = 1024 + 64 * static_cast<uint64_t>(tokens * heads);
  *workspace_size = e->workspace_size;
  *executor = NewHandle("executor", e);
  return kSuccess;
}

STANDIN_EXPORT int aclnnNsaCompressAttentionInfer(void* workspace, uint64_t workspace_size,
                                                  void* executor, void* stream) {
  const Lock lock(Mutex());
  int status = kSuccess;
  const char* const function = "aclnnNsaCompressAttentionInfer";
  const bool fails = Enter(function, &status) == Fault::kStatus;
  const auto e = std::static_pointer_cast<Executor>(Find("executor", executor));
  if (e == nullptr) {
    return Violation(kInvalidOperand, std::string(function) + ": not an executor, or used before");
  }
  Remove("executor", executor);
  if (fails) return status;
  for (const void* tensor : e->tensors) {
    if (tensor != nullptr && Find("tensor", tensor) == nullptr) {
      return Violation(kInvalidOperand, std::string(function) + ": a tensor was destroyed before");
    }
  }
  if (workspace_size < e->workspace_size) {
    return Violation(kInvalidOperand, std::string(function) + ": the workspace is too small");
  }
  if (DeviceBytes(workspace, e->workspace_size, CurrentDevice()) == nullptr) {
    return Violation(kInvalidOperand, std::string(function) +
                                          ": the workspace is not live device memory of its size");
  }
  Count("launches " STANDIN_LIBRARY, 1);
  return Enqueue(stream, [=](int device) { Compute(*e, workspace, device); });
}

}  // extern "C"

#endif  // STANDIN_WITHOUT_OPERATOR
