// The stand-in's aclnnNsaCompressWithCache, checked to the letter of its documentation and computed
// the plain way in double precision. As CANN's, it sees only the windows that end with their
// sequence, and writes wherever a slot says.

#include "operators.h"

using namespace standin;  // the interface below is C's
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

struct Run {
  Tensor input, weight, slots, table, cache;
  std::vector<int64_t> lengths;
  int64_t block, stride;
};

void Compute(const Run& e, int device) {
  const auto* input = Elements<uint16_t>(e.input, device);
  const auto* weight = Elements<uint16_t>(e.weight, device);
  const auto* slots = Elements<int32_t>(e.slots, device);
  auto* cache = Elements<uint16_t>(e.cache, device);
  const int64_t page_size = e.input.dims[1], heads = e.input.dims[2], size = e.input.dims[3];
  const int dtype = e.input.dtype;
  std::vector<int32_t> written;
  for (size_t b = 0; b < e.lengths.size(); ++b) {
    const int64_t length = e.lengths[b];
    if (length < e.block || (length - e.block) % e.stride != 0) continue;
    const int32_t* pages = Elements<int32_t>(e.table, device) + b * e.table.dims[1];
    std::vector<double> sum(heads * size, 0.0);
    for (int64_t t = 0; t < e.block; ++t) {
      const int64_t at = length - e.block + t;
      const int32_t page = pages[at / page_size];
      if (page < 0 || page >= e.input.dims[0]) {
        Violation(kInvalidOperand,
                  "the kernel reads past the pool: blockTable has page " + std::to_string(page));
        return;
      }
      const uint16_t* token = input + (page * page_size + at % page_size) * heads * size;
      for (int64_t i = 0; i < heads * size; ++i) {
        sum[i] += Decode(token[i], dtype) * Decode(weight[t * heads + i / size], dtype);
      }
    }
    if (slots[b] < 0 || slots[b] >= e.cache.dims[0]) {
      Violation(kInvalidOperand,
                "the kernel writes past the cache: slotMapping has " + std::to_string(slots[b]));
      return;
    }
    if (std::count(written.begin(), written.end(), slots[b]) > 0) {
      Violation(kInvalidOperand,
                "the kernel writes a row twice: slotMapping has " + std::to_string(slots[b]));
      return;
    }
    written.push_back(slots[b]);
    for (int64_t i = 0; i < heads * size; ++i) {
      cache[slots[b] * heads * size + i] = Encode(sum[i], dtype);
    }
  }
}

}  // namespace

extern "C" {

STANDIN_EXPORT int aclnnNsaCompressWithCacheGetWorkspaceSize(
    const void* input, const void* weight, const void* slots, const void* lengths,
    const void* table, char* layout, int64_t block, int64_t stride, int64_t lengths_type,
    int64_t page_size, void* cache, uint64_t* workspace_size, void** executor) {
  const Lock lock(Mutex());
  int status = kSuccess;
  const char* const function = "aclnnNsaCompressWithCacheGetWorkspaceSize";
  if (EndsEarly(function, workspace_size, executor, &status)) return status;
  Checks checks(function);
  auto e = std::make_shared<Run>();
  checks.That(layout != nullptr, "layout is null", kNullParameter);
  if (checks.status != kSuccess) return checks.status;
  checks.That(std::string(layout) == "TND", std::string("layout is ") + layout);
  e->input = checks.Contiguous("input", input, {kFloat16, kBFloat16}, 4);
  e->weight = checks.Contiguous("weight", weight, {e->input.dtype}, 2);
  e->slots = checks.Contiguous("slotMapping", slots, {kInt32}, 1);
  // Documented as optional; without them some versions read uninitialised memory.
  e->table = checks.Contiguous("blockTable", table, {kInt32}, 2);
  e->lengths = checks.Integers("actSeqLen", lengths);
  e->cache = checks.Contiguous("outputCache", cache, {e->input.dtype}, 3);
  checks.That(lengths_type == 1, "actSeqLenType is not 1");
  if (checks.status != kSuccess) return checks.status;

  const int64_t sequences = e->slots.dims[0];
  const int64_t heads = e->input.dims[2], size = e->input.dims[3];
  checks.That(sequences <= 2048, "more than 2048 sequences");
  checks.That(heads <= 64, "more than 64 heads");
  checks.That(size % 16 == 0, "head size");
  checks.That(page_size == 64 || page_size == 128, "pageBlockSize");
  checks.That(
      IsWindowSize(block) && block <= 64 && stride % 16 == 0 && stride > 0 && stride <= block,
      "block sizes");
  checks.Dims("input", e->input, {e->input.dims[0], page_size, heads, size});
  checks.Dims("weight", e->weight, {block, heads});
  checks.Dims("outputCache", e->cache, {e->cache.dims[0], heads, size});
  checks.Dims("blockTable", e->table, {sequences, e->table.dims[1]});
  checks.That(static_cast<int64_t>(e->lengths.size()) == sequences,
              "actSeqLen has not one entry per sequence");
  for (int64_t length : e->lengths) {
    checks.That(length >= 0 && length <= e->table.dims[1] * page_size,
                "actSeqLen is " + std::to_string(length));
  }
  checks.That(workspace_size != nullptr && executor != nullptr, "null results", kNullParameter);
  if (checks.status != kSuccess) return checks.status;

  e->block = block;
  e->stride = stride;
  auto run = std::make_shared<Executor>();
  run->handles = {input, weight, slots, table, cache};
  run->tensors = {e->input, e->weight, e->slots, e->table, e->cache};
  run->workspace_size = 1024 + 64 * static_cast<uint64_t>(sequences * heads);
  run->compute = [e](int device) { Compute(*e, device); };
  return Finish(run, workspace_size, executor);
}

STANDIN_EXPORT int aclnnNsaCompressWithCache(void* workspace, uint64_t workspace_size,
                                             void* executor, void* stream) {
  return Launch("aclnnNsaCompressWithCache", workspace, workspace_size, executor, stream);
}

}  // extern "C"
