// The emulated machine: threads on stacks of their own, of which one runs at a time.
//
// One file, and longer than others: barriers, copies and instructions of a whole warp are each a
// few lines on the state that the choice of the next thread reads, and nobody else may touch it.

#undef _FORTIFY_SOURCE  // it forbids longjmp between stacks

#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

EmulatedIndex threadIdx, blockIdx;

namespace emulated_cuda {

constexpr int kHopper = 232448, kAmpere = 166912, kSmall = 101376;
const Device kDevices[] = {
    {1, kHopper, 9},   {2, kHopper, 9},   {3, kHopper, 9},  {5, kHopper, 9}, {7, kHopper, 9},
    {132, kHopper, 9}, {1, kAmpere, 8},   {2, kAmpere, 8},  {3, kAmpere, 8}, {5, kAmpere, 8},
    {7, kAmpere, 8},   {132, kAmpere, 8}, {1, kSmall, 12},  {2, kSmall, 8},  {3, kSmall, 12},
    {5, kSmall, 8},    {7, kSmall, 12},   {132, kSmall, 8},
};
const int kNumDevices = sizeof kDevices / sizeof kDevices[0];
int current_device = 0;
uint64_t seed = 1;
Counts counts;
std::function<void()> kernel_before;

namespace {

constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr int kMaxResident = 4, kNamedBarriers = 3;
constexpr int kNoWarp = -1;
constexpr int kBoxRow = 128;  // bytes
// The pitch is no power of two, so that the fibers' stacks lie in different cache sets.
constexpr size_t kStackBytes = (64 << 10) + 832;

uint64_t random_state;
uint32_t Random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 32);
}
uint32_t Random(uint32_t below) { return static_cast<uint32_t>(uint64_t{Random()} * below >> 32); }

struct PhaseBarrier {
  static constexpr uint16_t kInitialised = 0xba11;
  uint64_t initialised : 16, arrivals : 10, pending : 10, phase : 4, bytes : 24;
};
static_assert(sizeof(PhaseBarrier) == sizeof(uint64_t));

PhaseBarrier* AsBarrier(uint64_t* memory) {
  auto* barrier = reinterpret_cast<PhaseBarrier*>(memory);
  Require(barrier->initialised == PhaseBarrier::kInitialised, "a barrier that is none");
  return barrier;
}
void EndPhase(PhaseBarrier* barrier) {
  if (barrier->pending != 0 || barrier->bytes != 0) return;
  barrier->pending = barrier->arrivals;
  ++barrier->phase;
}
bool IsOver(uint64_t* barrier, uint32_t parity) {
  return (AsBarrier(barrier)->phase & 1) != (parity & 1);
}

struct Copy {
  char* to;
  const void* from;
};
// Copies of one thread, and the barrier that they arrive at: of 16 bytes each, or a box.
struct Transfer {
  int thread;
  uint64_t* barrier;
  std::vector<Copy> copies;
  char* to;
  Box box;
};

struct Block;

struct Thread {
  jmp_buf context;
  bool started = false;
  Block* block = nullptr;
  int index = 0;
  // What it waits for, if it is not ready.
  uint64_t* barrier = nullptr;
  uint32_t parity = 0;
  const uint64_t* stored = nullptr;
  uint64_t value = 0;
  void* operands = nullptr;
  std::vector<Copy> copies;  // since it last arrived after copies, or committed them
  std::deque<std::vector<Copy>> committed;
};

// Lanes as bits.
struct Warp {
  uint32_t all, ready, at_phase, at_value, at_instruction, synced[kNamedBarriers];
  Instruction instruction;
  const char* name;
};

// A place for a thread block, which others take after it.
struct Block {
  int index = 0;
  int running = 0;  // threads
  Warp warps[kMaxWarps];
  Thread threads[kMaxThreads];
  int synced[kNamedBarriers];
  std::deque<Transfer> transfers;
  std::vector<char> shared;  // while another thread block's is in place
  char* stacks = nullptr;
};

// The launch.
std::vector<std::unique_ptr<Block>> blocks;
std::vector<Block*> resident;
int next_block, num_blocks;
int num_threads, num_warps;
char* shared_memory;
size_t shared_size;
const std::function<void()>* body;
jmp_buf host;
uint32_t end_odds;   // that the kernel before is not yet through is so much more likely
uint32_t stay_odds;  // that a warp goes on is so much more likely than that it doesn't
int slow_agent;      // a warp, or num_warps for the copies, that goes on when no other can
Block* in_place;     // whose shared memory is
Thread* current;
uint64_t before_is_through;  // 1 when it is

void EndKernelBefore() {
  if (kernel_before) kernel_before();
  kernel_before = nullptr;
  before_is_through = 1;
}

[[noreturn]] void Report(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s (seed %llu)\n", what,
               static_cast<unsigned long long>(seed));
  if (current != nullptr) {
    std::fprintf(stderr, "  in thread %d of block %d\n", current->index, current->block->index);
  }
  for (Block* block : resident) {
    std::fprintf(stderr, "  block %d, %zu transfers on their way\n", block->index,
                 block->transfers.size());
    for (int w = 0; w < num_warps; ++w) {
      const Warp& warp = block->warps[w];
      if (warp.all == 0) continue;
      std::fprintf(stderr, "    warp %d, lanes %08x: ready %08x", w, warp.all, warp.ready);
      if (warp.at_instruction) std::fprintf(stderr, ", at %s %08x", warp.name, warp.at_instruction);
      for (int id = 0; id < kNamedBarriers; ++id) {
        if (warp.synced[id]) std::fprintf(stderr, ", at barrier %d %08x", id, warp.synced[id]);
      }
      if (warp.at_value) std::fprintf(stderr, ", at a value %08x", warp.at_value);
      if (warp.at_phase) {
        const Thread& first = block->threads[w * kLanes + __builtin_ctz(warp.at_phase)];
        std::fprintf(stderr, ", %08x at the shared barrier at %d for parity %u", warp.at_phase,
                     static_cast<int>(reinterpret_cast<char*>(first.barrier) - shared_memory),
                     first.parity);
      }
      std::fprintf(stderr, "\n");
    }
  }
  std::abort();
}

Warp& WarpOf(const Thread& thread) { return thread.block->warps[thread.index / kLanes]; }
uint32_t LaneBit(const Thread& thread) { return 1u << thread.index % kLanes; }

void PutInPlace(Block* block) {
  if (in_place == block) return;
  if (in_place != nullptr) std::memcpy(in_place->shared.data(), shared_memory, shared_size);
  std::memcpy(shared_memory, block->shared.data(), shared_size);
  in_place = block;
}

void CompleteTransfer(Block* block) {
  auto& transfers = block->transfers;
  const int thread = transfers[Random(static_cast<uint32_t>(transfers.size()))].thread;
  auto first = transfers.begin();  // of that thread: its own stay in order
  while (first->thread != thread) ++first;
  const Transfer transfer = std::move(*first);
  transfers.erase(first);
  for (const Copy& copy : transfer.copies) std::memcpy(copy.to, copy.from, 16);
  const Box& box = transfer.box;
  for (int r = 0; r < box.rows; ++r) {
    char row[kBoxRow] = {};
    std::memcpy(row, box.from + r * box.pitch, box.existing);
    for (int u = 0; u < kBoxRow / 16; ++u) {
      std::memcpy(transfer.to + r * kBoxRow + (u ^ r % 8) * 16, row + u * 16, 16);
    }
  }
  if (box.rows == 0) {
    Arrive(transfer.barrier, 1);
  } else {
    PhaseBarrier* const barrier = AsBarrier(transfer.barrier);
    const int bytes = box.rows * kBoxRow;
    Require(bytes <= static_cast<int>(barrier->bytes), "more bytes than a barrier waits for");
    barrier->bytes -= static_cast<unsigned>(bytes) & 0xfffff;
    EndPhase(barrier);
  }
}

// Whether a lane of the warp can go on.
bool IsReady(Block* block, int w) {
  Warp& warp = block->warps[w];
  for (uint32_t rest = warp.at_phase; rest != 0; rest &= rest - 1) {
    const Thread& thread = block->threads[w * kLanes + __builtin_ctz(rest)];
    if (!IsOver(thread.barrier, thread.parity)) continue;
    warp.at_phase &= ~LaneBit(thread);
    warp.ready |= LaneBit(thread);
  }
  for (uint32_t rest = warp.at_value; rest != 0; rest &= rest - 1) {
    const Thread& thread = block->threads[w * kLanes + __builtin_ctz(rest)];
    if (*thread.stored != thread.value) continue;
    warp.at_value &= ~LaneBit(thread);
    warp.ready |= LaneBit(thread);
  }
  return warp.ready != 0;
}

Thread* ChooseLane(Block* block, int w) {
  const uint32_t ready = block->warps[w].ready, turn = Random(kLanes);
  const uint32_t turned = turn ? ready >> turn | ready << (kLanes - turn) : ready;
  return &block->threads[w * kLanes + (__builtin_ctz(turned) + turn) % kLanes];
}

// A warp of the block that can go on, or kNoWarp.
int ChooseWarp(Block* block) {
  PutInPlace(block);
  if (Random(512) == 0) slow_agent = static_cast<int>(Random(num_warps + 4));
  while (true) {
    bool copied = false;
    const auto try_agent = [&](int agent) {
      if (agent < num_warps) return IsReady(block, agent);
      if (!block->transfers.empty()) {
        for (uint32_t i = Random(40); i > 0 && !block->transfers.empty(); --i) {
          CompleteTransfer(block);
        }
        copied = true;
      }
      return false;
    };
    const int first = static_cast<int>(Random(num_warps + 1));
    for (int i = 0; i <= num_warps && !copied; ++i) {
      const int agent = (first + i) % (num_warps + 1);
      if (agent != slow_agent && try_agent(agent)) return agent;
    }
    if (!copied && slow_agent <= num_warps && try_agent(slow_agent)) return slow_agent;
    if (!copied) return kNoWarp;
  }
}

Thread* Choose(bool other_block) {
  if (!before_is_through && Random(end_odds) == 0) EndKernelBefore();
  Block* block = current->block;
  const bool is_resident = block->running > 0;
  if (is_resident && !other_block && Random(stay_odds) != 0) {
    const int w = current->index / kLanes;
    if (block->warps[w].ready) return ChooseLane(block, w);
  }
  const uint32_t count = static_cast<uint32_t>(resident.size());
  uint32_t first = Random(count);
  if (is_resident && !other_block && Random(1024) != 0) {
    while (resident[first] != block) first = (first + 1) % count;
  }
  for (uint32_t i = 0; i < count; ++i) {
    Block* candidate = resident[(first + i) % count];
    const int w = ChooseWarp(candidate);
    if (w != kNoWarp) return ChooseLane(candidate, w);
  }
  if (!before_is_through) {
    EndKernelBefore();
    return Choose(other_block);
  }
  Report("no thread can go on");
}

void ThreadMain();

[[noreturn]] void Resume(Thread* next) {
  current = next;
  PutInPlace(next->block);
  threadIdx.x = next->index;
  blockIdx.x = next->block->index;
  if (next->started) _longjmp(next->context, 1);
  next->started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = next->block->stacks + next->index * kStackBytes;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, ThreadMain, 0);
  setcontext(&start);
  std::abort();
}

void Yield(bool other_block = false) {
  Thread* next = Choose(other_block);
  blockIdx.x = next->block->index;  // even its own may be another one than before
  if (next == current) return;
  if (_setjmp(current->context) == 0) Resume(next);
}

// The current thread waits for something; it has been entered where.
void Suspend() {
  ++counts.waits;
  WarpOf(*current).ready &= ~LaneBit(*current);
  Yield();
}

// Starts the next thread block.
void StartBlock(Block* block) {
  block->index = next_block++;
  block->running = num_threads;
  block->shared.resize(shared_size);
  PutInPlace(block);
  FillWithGarbage(shared_memory, shared_size);
  for (int w = 0; w < num_warps; ++w) block->warps[w] = {~0u, ~0u, 0, 0, 0, {}, nullptr, nullptr};
  for (int id = 0; id < kNamedBarriers; ++id) block->synced[id] = 0;
  ++counts.blocks;
}

void EndBlock(Block* block) {
  Require(block->transfers.empty(), "a thread block ends before its copies do");
  if (next_block < num_blocks) {
    StartBlock(block);
    return;
  }
  for (Block*& other : resident) {
    if (other == block) {
      other = resident.back();
      resident.pop_back();
      break;
    }
  }
  in_place = nullptr;
  if (resident.empty()) {
    current->started = false;  // nothing remembers where it is
    _longjmp(host, 1);
  }
}

void ThreadMain() {
  while (true) {
    (*body)();
    Require(current->copies.empty() && current->committed.empty(),
            "a thread ends with copies that nothing waits for");
    Warp& warp = WarpOf(*current);
    warp.ready &= ~LaneBit(*current);
    warp.all &= ~LaneBit(*current);
    if (--current->block->running == 0) EndBlock(current->block);
    Yield();  // until the next thread block takes this place
  }
}

// Whether the current thread is the last to come to a barrier. Those who wait are ready then.
bool ComeTo(int id, int threads) {
  Block& block = *current->block;
  if (++block.synced[id] < (threads ? threads : num_threads)) return false;
  block.synced[id] = 0;
  for (int w = 0; w < num_warps; ++w) {
    block.warps[w].ready |= block.warps[w].synced[id];
    block.warps[w].synced[id] = 0;
  }
  return true;
}

}  // namespace

void Require(bool condition, const char* what) {
  if (!condition) Report(what);
}

void FillWithGarbage(void* memory, size_t bytes) {
  // Both halves and the whole are NaN, as numbers of 16 and 32 bits; sometimes 0.
  uint64_t state = seed * 0x9e3779b97f4a7c15u | 1;
  const bool zeros = seed % 4 == 3;
  auto* to = static_cast<char*>(memory);
  for (size_t i = 0; i < bytes; i += 4) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t word = zeros ? 0 : 0x7fff7fff | static_cast<uint32_t>(state >> 32 & 0x80008000);
    std::memcpy(to + i, &word, bytes - i < 4 ? bytes - i : 4);
  }
}

void Launch(int grid, int threads, char* shared, int shared_bytes, bool cooperative, bool early,
            const std::function<void()>& kernel) {
  random_state = seed * 0x9e3779b97f4a7c15u ^ 0xd1b54a32d192ed03u;
  for (int i = 0; i < 16; ++i) Random();
  Require(threads % kLanes == 0 && threads <= kMaxThreads, "no such thread block");
  num_threads = threads;
  num_warps = threads / kLanes;
  shared_memory = shared;
  shared_size = shared_bytes;
  body = &kernel;
  before_is_through = 0;
  if (early) ++counts.early_launches;
  if (!early) EndKernelBefore();
  end_odds = 1u << 4 * Random(7);
  stay_odds = 4u << 3 * Random(4);
  slow_agent = static_cast<int>(Random(num_warps + 4));
  next_block = 0;
  num_blocks = grid;
  ++counts.launches;

  const int few = 1 + static_cast<int>(Random(kMaxResident));
  const int places = cooperative ? grid : few;
  in_place = nullptr;
  resident.clear();
  for (int i = 0; i < places && next_block < num_blocks; ++i) {
    if (i == static_cast<int>(blocks.size())) {
      blocks.push_back(std::make_unique<Block>());
      Block& block = *blocks.back();
      void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      Require(stacks != MAP_FAILED, "no memory for stacks");
      block.stacks = static_cast<char*>(stacks);
      for (int t = 0; t < kMaxThreads; ++t) {
        block.threads[t].block = &block;
        block.threads[t].index = t;
      }
    }
    resident.push_back(blocks[i].get());
    StartBlock(blocks[i].get());
  }
  current = &resident[0]->threads[0];
  if (_setjmp(host) == 0) Resume(Choose(true));
  current = nullptr;
  Require(before_is_through, "a kernel ends before the one before it");
}

uint32_t SharedOffset(const void* pointer) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - shared_memory;
  Require(offset >= 0 && offset < static_cast<ptrdiff_t>(shared_size), "not in shared memory");
  return static_cast<uint32_t>(offset);
}

char* SharedPointer(uint32_t offset) {
  Require(offset < shared_size, "past shared memory");
  return shared_memory + offset;
}

void MaybeYield(unsigned odds) {
  if (Random(odds) == 0) Yield(Random(4) == 0);
}

void Sync(int id, int threads) {
  WarpOf(*current).synced[id] |= LaneBit(*current);
  if (ComeTo(id, threads)) {
    Yield();
  } else {
    Suspend();
  }
}

void InitBarrier(uint64_t* barrier, int arrivals) {
  SharedOffset(barrier);
  PhaseBarrier value = {};
  value.initialised = PhaseBarrier::kInitialised;
  value.arrivals = value.pending = static_cast<unsigned>(arrivals) & 1023;
  std::memcpy(barrier, &value, sizeof value);
}

void Arrive(uint64_t* barrier, int count) {
  SharedOffset(barrier);
  PhaseBarrier* const state = AsBarrier(barrier);
  Require(count <= static_cast<int>(state->pending), "more arrivals than a barrier waits for");
  state->pending -= static_cast<unsigned>(count) & 1023;
  EndPhase(state);
}

void ArriveExpecting(uint64_t* barrier, int bytes) {
  PhaseBarrier* const state = AsBarrier(barrier);
  Require(state->bytes + bytes < 1 << 20, "more bytes than a barrier counts");
  state->bytes += static_cast<unsigned>(bytes) & 0xfffff;
  Arrive(barrier, 1);
}

void WaitForPhase(uint64_t* barrier, uint32_t parity) {
  SharedOffset(barrier);
  if (IsOver(barrier, parity)) return;
  current->barrier = barrier;
  current->parity = parity;
  WarpOf(*current).at_phase |= LaneBit(*current);
  Suspend();
}

void WaitForValue(const uint64_t* from, uint64_t value) {
  MaybeYield(2);
  if (*from == value) return;
  current->stored = from;
  current->value = value;
  WarpOf(*current).at_value |= LaneBit(*current);
  Suspend();
}

void AwaitKernelBefore() { WaitForValue(&before_is_through, 1); }

void CopyLater(uint32_t to, const void* from) {
  Require(to % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0, "a copy is not aligned");
  char* const pointer = SharedPointer(to);
  std::memset(pointer, 0xff, 16);
  current->copies.push_back({pointer, from});
  ++counts.copies;
}

void ArriveAfterCopies(uint64_t* barrier) {
  SharedOffset(barrier);
  current->block->transfers.push_back(
      {current->index, barrier, std::move(current->copies), nullptr, {}});
  current->copies.clear();
}

void CopyBoxLater(uint32_t to, const Box& box, uint64_t* barrier) {
  Require(to % 1024 == 0, "a box is not aligned");  // where the rows' pattern begins anew
  char* const pointer = SharedPointer(to);
  SharedPointer(to + box.rows * kBoxRow - 1);
  std::memset(pointer, 0xff, size_t{1} * box.rows * kBoxRow);
  current->block->transfers.push_back({current->index, barrier, {}, pointer, box});
  ++counts.boxes;
  if (threadIdx.x / kLanes == 9) ++counts.second_boxes;
}

void CommitCopies() {
  current->committed.push_back(std::move(current->copies));
  current->copies.clear();
}

void WaitForCopies(int later) {
  auto& batches = current->committed;
  while (static_cast<int>(batches.size()) > later) {
    for (const Copy& copy : batches.front()) std::memcpy(copy.to, copy.from, 16);
    batches.pop_front();
    MaybeYield(16);
  }
}

void PerformTogether(const char* name, Instruction instruction, void* operands) {
  Block& block = *current->block;
  Warp& warp = WarpOf(*current);
  if (warp.at_instruction == 0) {
    warp.instruction = instruction;
    warp.name = name;
  }
  Require(warp.instruction == instruction, name);
  Require(warp.all == ~0u, "lanes are missing");
  warp.at_instruction |= LaneBit(*current);
  current->operands = operands;
  if (warp.at_instruction != ~0u) {
    Suspend();
    return;
  }
  void* all[kLanes];
  const int first = current->index / kLanes * kLanes;
  for (int i = 0; i < kLanes; ++i) all[i] = block.threads[first + i].operands;
  instruction(all);
  warp.ready = ~0u;
  warp.at_instruction = 0;
}

}  // namespace emulated_cuda
