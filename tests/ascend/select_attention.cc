// The stand-in's aclnnNsaSelectedAttentionInfer, checked to the letter of its documentation and
// computed the plain way in double precision, with the faults that CANN's has: it reads the blocks
// of the first key/value head for all heads, and a leading -1 never ends.

#include "operators.h"

using namespace standin;  // the interface below is C's
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

struct Run {
  Tensor query, key, value, topk, table, output;
  std::vector<int64_t> q_lengths, lengths;
  int64_t heads, kv_heads, block, count;
  double scale;
};

bool Breach(const std::string& what) {
  Violation(kInvalidOperand, "the kernel " + what);
  return false;
}

// The positions that a row reads; false after a breach.
bool Positions(const Run& e, const int32_t* ids, const int32_t* pages, int64_t visible,
               std::vector<int64_t>* positions) {
  if (ids[0] < 0) return Breach("never ends: topkIndices begins with -1");
  for (int64_t i = 0; i < e.count; ++i) {
    if (ids[i] < 0) {
      for (; i < e.count; ++i) {
        if (ids[i] >= 0) return Breach("passes over a block that stands after -1");
      }
      break;
    }
    const int64_t begin = ids[i] * e.block;
    if (begin >= visible) return Breach("reads block " + std::to_string(ids[i]) + " past the end");
    for (int64_t at = begin; at < std::min(begin + e.block, visible); ++at) {
      const int32_t page = pages[at / e.key.dims[1]];
      if (page < 0 || page >= e.key.dims[0]) {
        return Breach("reads past the pool: block_table has page " + std::to_string(page));
      }
      positions->push_back(page * e.key.dims[1] + at % e.key.dims[1]);
    }
  }
  return true;
}

void ComputeRow(const Run& e, int device, int64_t row, const std::vector<int64_t>& positions) {
  const auto* keys = Elements<uint16_t>(e.key, device);
  const auto* values = Elements<uint16_t>(e.value, device);
  const int64_t head_size = e.query.dims[3], value_size = e.output.dims[3];
  for (int64_t head = 0; head < e.heads; ++head) {
    const int64_t kv = head / (e.heads / e.kv_heads);
    const uint16_t* query =
        Elements<uint16_t>(e.query, device) + (row * e.heads + head) * head_size;
    uint16_t* output = Elements<uint16_t>(e.output, device) + (row * e.heads + head) * value_size;
    std::vector<double> p;
    for (int64_t at : positions) {
      const uint16_t* key = keys + (at * e.kv_heads + kv) * head_size;
      double dot = 0.0;
      for (int64_t c = 0; c < head_size; ++c) {
        dot += Decode(query[c], e.query.dtype) * Decode(key[c], e.query.dtype);
      }
      p.push_back(e.scale * dot);
    }
    double largest = -kInfinity, total = 0.0;
    for (double x : p) largest = std::fmax(largest, x);
    for (double& x : p) total += x = std::exp(x - largest);
    for (int64_t c = 0; c < value_size; ++c) {
      double sum = 0.0;
      for (size_t i = 0; i < p.size(); ++i) {
        const uint16_t* value = values + (positions[i] * e.kv_heads + kv) * value_size;
        sum += p[i] / total * Decode(value[c], e.query.dtype);
      }
      output[c] = Encode(sum, e.query.dtype);
    }
  }
}

void Compute(const Run& e, int device) {
  CountNotFinite(e.key, device);
  CountNotFinite(e.value, device);
  const int64_t tokens = e.query.dims[1];
  for (int64_t b = 0; b < e.query.dims[0]; ++b) {
    for (int64_t t = 0; t < e.q_lengths[b]; ++t) {
      const int64_t row = b * tokens + t;
      const int32_t* ids = Elements<int32_t>(e.topk, device) + row * e.kv_heads * e.count;
      std::vector<int64_t> positions;
      if (!Positions(e, ids, Elements<int32_t>(e.table, device) + b * e.table.dims[1],
                     e.lengths[b] - (e.q_lengths[b] - 1 - t), &positions)) {
        return;
      }
      ComputeRow(e, device, row, positions);
    }
  }
}

}  // namespace

extern "C" {

STANDIN_EXPORT int aclnnNsaSelectedAttentionInferGetWorkspaceSize(
    const void* query, const void* key, const void* value, const void* topk, const void* mask,
    const void* table, const void* q_lengths, const void* lengths, char* layout, int64_t heads,
    int64_t kv_heads, int64_t block, int64_t count, int64_t page_size, double scale,
    int64_t sparse_mode, void* output, uint64_t* workspace_size, void** executor) {
  const Lock lock(Mutex());
  int status = kSuccess;
  const char* const function = "aclnnNsaSelectedAttentionInferGetWorkspaceSize";
  if (EndsEarly(function, workspace_size, executor, &status)) return status;
  Checks checks(function);
  auto e = std::make_shared<Run>();
  checks.That(layout != nullptr, "layout is null", kNullParameter);
  if (checks.status != kSuccess) return checks.status;
  checks.That(std::string(layout) == "BSND", std::string("layout is ") + layout);
  e->query = checks.Contiguous("query", query, {kFloat16, kBFloat16}, 4);
  e->key = checks.Contiguous("key", key, {e->query.dtype}, 4);
  e->value = checks.Contiguous("value", value, {e->query.dtype}, 4);
  e->topk = checks.Contiguous("topkIndices", topk, {kInt32}, 4);
  e->table = checks.Contiguous("blockTable", table, {kInt32}, 2);
  e->output = checks.Contiguous("output", output, {e->query.dtype}, 4);
  checks.That(mask == nullptr, "attenMask is not supported");
  checks.That(sparse_mode == 0, "sparseMode is not 0");
  // Documented as optional; some versions read uninitialised memory without it.
  e->q_lengths = checks.Integers("actualQSeqLen", q_lengths);
  e->lengths = checks.Integers("actualKvSeqLen", lengths);
  if (checks.status != kSuccess) return checks.status;

  const int64_t sequences = e->query.dims[0], tokens = e->query.dims[1];
  checks.That(sequences <= 3072, "more than 3072 sequences");
  checks.That(tokens <= 4, "more than 4 tokens");
  checks.That(heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= 16,
              "numHeads / numKeyValueHeads");
  checks.That(page_size == 64 || page_size == 128, "pageBlockSize");
  checks.That(block > 0 && block % 16 == 0, "selectBlockSize");
  checks.Dims("query", e->query, {sequences, tokens, heads, 192});
  checks.Dims("key", e->key, {e->key.dims[0], page_size, kv_heads, 192});
  checks.Dims("value", e->value, {e->key.dims[0], page_size, kv_heads, 128});
  checks.Dims("topkIndices", e->topk, {sequences, tokens, kv_heads, count});
  checks.Dims("output", e->output, {sequences, tokens, heads, 128});
  checks.Dims("blockTable", e->table, {sequences, e->table.dims[1]});
  const auto per_sequence = [&](const std::vector<int64_t>& values) {
    return static_cast<int64_t>(values.size()) == sequences;
  };
  checks.That(per_sequence(e->q_lengths), "actualQSeqLen has not one entry per sequence");
  checks.That(per_sequence(e->lengths), "actualKvSeqLen has not one entry per sequence");
  if (checks.status != kSuccess) return checks.status;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t length = e->lengths[b], count = e->q_lengths[b];
    checks.That(count >= 1 && count <= tokens, "actualQSeqLen is " + std::to_string(count));
    checks.That(length >= count && length <= e->table.dims[1] * page_size,
                "actualKvSeqLen is " + std::to_string(length));
  }
  checks.That(workspace_size != nullptr && executor != nullptr, "null results", kNullParameter);
  if (checks.status != kSuccess) return checks.status;

  e->heads = heads;
  e->kv_heads = kv_heads;
  e->block = block;
  e->count = count;
  e->scale = scale;
  auto run = std::make_shared<Executor>();
  run->handles = {query, key, value, topk, table, output};
  run->tensors = {e->query, e->key, e->value, e->topk, e->table, e->output};
  run->workspace_size = 1024 + 64 * static_cast<uint64_t>(sequences * heads);
  run->compute = [e](int device) { Compute(*e, device); };
  return Finish(run, workspace_size, executor);
}

STANDIN_EXPORT int aclnnNsaSelectedAttentionInfer(void* workspace, uint64_t workspace_size,
                                                  void* executor, void* stream) {
  return Launch("aclnnNsaSelectedAttentionInfer", workspace, workspace_size, executor, stream);
}

}  // extern "C"
