// What one run of an operator of CANN is given, and the run itself.

#ifndef JAX_NSA_ASCEND_TENSOR_H_
#define JAX_NSA_ASCEND_TENSOR_H_

#include <cstdint>
#include <vector>

#include "ascend/context.h"
#include "ascend/runtime.h"
#include "paged.h"

namespace jax_nsa::ascend {

using Dims = std::vector<int64_t>;

constexpr size_t kElementSize = 2;  // of float16 and bfloat16, all that CANN's operators take

inline aclDataType AclType(DataType dtype) {
  return dtype == DataType::kBFloat16 ? ACL_BF16 : ACL_FLOAT16;
}

// The arguments of one run, which live until it is enqueued. The first failure to make one is kept
// as the error; what is asked for after it is null.
class Arguments {
 public:
  explicit Arguments(const Api& api) : api_(api) {}

  // A tensor over device memory, its axes packed.
  aclTensor* AddTensor(const Dims& dims, aclDataType type, const void* data);
  aclIntArray* AddIntegers(const std::vector<int64_t>& values);
  const ffi::Error& error() const { return error_; }

  // Gives all of them back. The destructor does so too, but cannot report what went wrong.
  ffi::Error Release();

 private:
  const Api& api_;
  ffi::Error error_ = ffi::Error::Success();
  std::vector<Tensor> tensors_;
  std::vector<IntArray> arrays_;
};

// The second phase of an operator, and what its first phase left for it.
struct Execution {
  using Function = aclnnStatus(void* workspace, uint64_t workspace_size, aclOpExecutor* executor,
                               aclrtStream stream);
  const char* name;
  Function* function;
  uint64_t workspace_size = 0;
  aclOpExecutor* executor = nullptr;
};

// Enqueues the operator on the context's stream; does not wait.
ffi::Error Execute(const Execution& execution, Context& context);

}  // namespace jax_nsa::ascend

#endif  // JAX_NSA_ASCEND_TENSOR_H_
