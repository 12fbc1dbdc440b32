// The working memory of calls, kept from one to the next: fresh pages from the system cost more
// than the work on them.

#ifndef JAX_NSA_CPU_MEMORY_H_
#define JAX_NSA_CPU_MEMORY_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/alignment.h"

namespace jax_nsa::cpu {

constexpr int64_t kKeptBytes = 64 << 20;  // between calls, at most
constexpr size_t kMostBlocks = 256;       // the same

// Blocks that no call uses at present.
class KeptMemory {
 public:
  static KeptMemory& Get() {
    static KeptMemory* const kept = new KeptMemory;  // never destroyed: threads may outlive statics
    return *kept;
  }

  // A block of at least `size` bytes and at most twice that, or null. Sets `size` to its bytes.
  char* Take(int64_t* size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto fits = [&](const Block& b) { return b.size >= *size && b.size <= 2 * *size; };
      const auto found = std::find_if(blocks_.rbegin(), blocks_.rend(), fits);
      if (found != blocks_.rend()) {
        const Block block = *found;
        blocks_.erase(std::next(found).base());
        bytes_ -= block.size;
        *size = block.size;
        return block.memory;
      }
    }
    return static_cast<char*>(std::aligned_alloc(kAlignment, *size));
  }

  // The oldest make way.
  void Keep(char* memory, int64_t size) {
    if (size > kKeptBytes) return std::free(memory);
#if defined(__SANITIZE_ADDRESS__)
    std::memset(memory, 0xff, size);  // NaN to whoever reads it before it is written again
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.size() == kMostBlocks) DropOldest();
    blocks_.push_back({memory, size});
    bytes_ += size;
    while (bytes_ > kKeptBytes) DropOldest();
  }

 private:
  struct Block {
    char* memory;
    int64_t size;
  };

  KeptMemory() { blocks_.reserve(kMostBlocks); }

  void DropOldest() {
    std::free(blocks_.front().memory);
    bytes_ -= blocks_.front().size;
    blocks_.erase(blocks_.begin());
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // never grows: Keep must not run out of memory
  int64_t bytes_ = 0;
};

struct KeepMemory {
  int64_t size = 0;
  void operator()(char* memory) const { KeptMemory::Get().Keep(memory, size); }
};

// Aligned, not cleared. Null if there is none.
using Memory = std::unique_ptr<char, KeepMemory>;

// `size` is a multiple of kAlignment.
inline Memory Allocate(int64_t size) {
  char* const memory = KeptMemory::Get().Take(&size);
  return Memory(memory, KeepMemory{size});
}

}  // namespace jax_nsa::cpu

#endif  // JAX_NSA_CPU_MEMORY_H_
