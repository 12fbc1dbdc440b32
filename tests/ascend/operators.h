// What the operators of the stand-in share: checks of arguments to the letter of CANN's
// documentation, numbers of 16 bits, and both phases of a run.

#ifndef OPERATORS_H_
#define OPERATORS_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "standin.h"

namespace standin {

inline constexpr int kFloat16 = 1, kInt32 = 3, kBool = 12, kBFloat16 = 27;  // aclDataType
inline constexpr int kNd = 2;                                               // aclFormat
inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

int64_t Size(const Tensor& tensor);
int64_t Bytes(const Tensor& tensor);

double Decode(uint16_t bits, int dtype);
// Rounds to the nearest, ties to even.
uint16_t Encode(double value, int dtype);

// Holds the arguments of a first phase to the documentation; the first breach is the status.
class Checks {
 public:
  explicit Checks(const char* function) : function_(function) {}

  int status = kSuccess;

  bool That(bool holds, const std::string& what, int otherwise = kInvalidOperand);
  // A tensor of one of these types, ND and packed, in live memory of the thread's device.
  Tensor Contiguous(const char* name, const void* handle, std::vector<int> dtypes, size_t rank);
  std::vector<int64_t> Integers(const char* name, const void* handle);
  void Dims(const char* name, const Tensor& tensor, std::vector<int64_t> expected);

 private:
  const std::string function_;
};

bool IsWindowSize(int64_t size);

// A run of an operator between its phases.
struct Executor {
  std::vector<const void*> handles;  // of tensors; null where it has none
  std::vector<Tensor> tensors;
  uint64_t workspace_size;
  std::function<void(int device)> compute;
};

// Begins a first phase: whether a test wants it to end here, with `status`.
bool EndsEarly(const char* function, uint64_t* workspace_size, void** executor, int* status);

// Ends a first phase.
int Finish(std::shared_ptr<Executor> run, uint64_t* workspace_size, void** executor);

// The second phase of every operator.
int Launch(const char* function, void* workspace, uint64_t workspace_size, void* executor,
           void* stream);

// The elements of a tensor on a device, when the stream gets there.
template <typename T>
T* Elements(const Tensor& tensor, int device) {
  return reinterpret_cast<T*>(DeviceBytes(tensor.data, Bytes(tensor), device));
}

// Counts what is not finite in a pool.
void CountNotFinite(const Tensor& pool, int device);

}  // namespace standin

#endif  // OPERATORS_H_
