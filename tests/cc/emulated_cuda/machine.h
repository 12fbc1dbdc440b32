// A GPU in plain C++: runs a kernel's thread blocks on one host thread, so that the kernel's logic
// is tested on machines without a GPU.
//
// Every CUDA thread is a fiber. It runs until it has to wait: for the other lanes of its warp, at a
// barrier, or, now and then, without a reason. Who goes on then is drawn from a seed: lanes, warps,
// thread blocks and copies on their way come in a different order with each. Memory that a kernel
// finds uninitialised holds garbage, mostly NaN, which differs with the seed, too.
//
// Thread blocks of a cooperative launch are there all at a time. Others start in the order of their
// indices, a few at a time: one that waits for a later one waits for ever.
//
// What this cannot show: the order in which other threads see writes to memory, which is the
// program's here, and any question of time.

#ifndef JAX_NSA_TESTS_EMULATED_CUDA_MACHINE_H_
#define JAX_NSA_TESTS_EMULATED_CUDA_MACHINE_H_

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulated_cuda {

constexpr int kLanes = 32;

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a thread block can have
  int major;         // of its compute capability
};
// The devices that there are, and the current one.
extern const Device kDevices[];
extern const int kNumDevices;
extern int current_device;

// What the next launch draws its order and its garbage from.
extern uint64_t seed;

// What launches have done so far.
struct Counts {
  int64_t launches, early_launches, blocks, waits, copies, boxes, flags;
  int64_t second_boxes;  // of these, by the second of the compressed branch's loading warps
  int64_t whole_items_lines, cut_items_lines;  // discarded, by whom and so of what
};
extern Counts counts;

// What a kernel that was queued before the next launch does at its end; none if empty. Where that
// launch may begin early, the kernel is through at some moment before AwaitKernelBefore returns,
// otherwise before the launch.
extern std::function<void()> kernel_before;

// Fills memory with what `seed` has for uninitialised memory.
void FillWithGarbage(void* memory, size_t bytes);

// Runs `kernel`, which is one thread's, on a grid, whose thread blocks are there all at a time if
// it is cooperative. Thread blocks have their dynamic shared memory at `shared`, one after the
// other. With `early` it may begin before the kernel before is through, and must wait for it. Ends
// the program if the kernel is at fault.
void Launch(int blocks, int threads, char* shared, int shared_bytes, bool cooperative, bool early,
            const std::function<void()>& kernel);

// Ends the program unless the condition holds.
void Require(bool condition, const char* what);

// Called by the kernel's threads.

// Where `pointer` lies in shared memory, and back.
uint32_t SharedOffset(const void* pointer);
char* SharedPointer(uint32_t offset);

// Lets others go on, once in `odds` times; other thread blocks too.
void MaybeYield(unsigned odds);

// Waits until `threads` threads have come to the thread block's barrier `id`; with 0, all of them.
void Sync(int id, int threads);

// A barrier in shared memory.
void InitBarrier(uint64_t* barrier, int arrivals);
void Arrive(uint64_t* barrier, int count);
// Arrives, and adds so many bytes of boxes to what the phase waits for.
void ArriveExpecting(uint64_t* barrier, int bytes);
void WaitForPhase(uint64_t* barrier, uint32_t parity);

// Waits for another thread to store a value.
void WaitForValue(const uint64_t* from, uint64_t value);

void AwaitKernelBefore();

// Copies 16 bytes, some time before ArriveAfterCopies arrives. Until then they are garbage.
void CopyLater(uint32_t to, const void* from);
void ArriveAfterCopies(uint64_t* barrier);
// Copies rows of 128 bytes, each `pitch` bytes after the one before. Of each, bytes from `existing`
// on become zero. In shared memory unit u of 16 bytes of row r comes to place u ^ (r % 8) of the
// row. They arrive at a barrier in time.
struct Box {
  const char* from;
  int rows, existing;
  int64_t pitch;
};
void CopyBoxLater(uint32_t to, const Box& box, uint64_t* barrier);
// Or makes a batch of this thread's copies, and waits for all but its last `later` ones.
void CommitCopies();
void WaitForCopies(int later);

// Performs an instruction of all lanes of a warp, once all have come to it.
using Instruction = void (*)(void* const (&operands)[kLanes]);
void PerformTogether(const char* name, Instruction instruction, void* operands);

// The same for operands of one type: calls Perform(lanes), an array of pointers to them.
template <auto kPerform, typename Operands>
void Together(const char* name, Operands& own) {
  PerformTogether(
      name,
      [](void* const(&operands)[kLanes]) {
        Operands* lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<Operands*>(operands[i]);
        kPerform(lanes);
      },
      &own);
}

}  // namespace emulated_cuda

// Integers in CUDA, without a sign there; comparisons with signed ones are common.
struct EmulatedIndex {
  int x;
};
extern EmulatedIndex threadIdx, blockIdx;

#endif  // JAX_NSA_TESTS_EMULATED_CUDA_MACHINE_H_
