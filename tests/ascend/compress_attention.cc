// The stand-in's aclnnNsaCompressAttentionInfer, checked to the letter of its documentation and
// computed the plain way in double precision.

#include "operators.h"

using namespace standin;  // the interface below is C's
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

struct Run {
  Tensor query, key, value, table, output, topk;
  bool padded, causal;
  std::vector<int64_t> q_lengths, lengths, select_lengths;
  int64_t heads, kv_heads, select_block, select_count, block, stride;
  double scale;
};

int64_t NumBlocks(const Run& e, int64_t length) {
  const int64_t original = (length - 1) * e.stride + e.block;
  return (original + e.select_block - 1) / e.select_block;
}

// --- When the stream gets there.
// ------------------------------------------------------------------

void ComputeRow(const Run& e, const uint16_t* query, const std::byte* keys, const std::byte* values,
                const int32_t* table, int64_t length, int64_t visible, uint16_t* output,
                int32_t* topk) {
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

void Compute(const Run& e, int device) {
  CountNotFinite(e.key, device);
  CountNotFinite(e.value, device);
  const auto* query = Elements<uint16_t>(e.query, device);
  const auto* keys = Elements<std::byte>(e.key, device);
  const auto* values = Elements<std::byte>(e.value, device);
  const auto* table = Elements<int32_t>(e.table, device);
  auto* output = Elements<uint16_t>(e.output, device);
  auto* topk = Elements<int32_t>(e.topk, device);
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
      ComputeRow(e, query + row * e.heads * e.query.dims.back(), keys, values, pages, e.lengths[b],
                 visible, output + row * e.heads * e.output.dims.back(),
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
  const char* const function = "aclnnNsaCompressAttentionInferGetWorkspaceSize";
  if (EndsEarly(function, workspace_size, executor, &status)) return status;
  Checks checks(function);
  auto e = std::make_shared<Run>();
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

  auto run = std::make_shared<Executor>();
  run->handles = {query, key, value, mask, table, output, topk};
  run->tensors = {e->query, e->key, e->value, e->table, e->output, e->topk};
  run->workspace_size = 1024 + 64 * static_cast<uint64_t>(tokens * heads);
  run->compute = [e](int device) { Compute(*e, device); };
  return Finish(run, workspace_size, executor);
}

STANDIN_EXPORT int aclnnNsaCompressAttentionInfer(void* workspace, uint64_t workspace_size,
                                                  void* executor, void* stream) {
  return Launch("aclnnNsaCompressAttentionInfer", workspace, workspace_size, executor, stream);
}

}  // extern "C"
