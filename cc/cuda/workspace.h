// How much memory on the device each operator's kernel needs beside a call's arrays.

#ifndef JAX_NSA_CUDA_WORKSPACE_H_
#define JAX_NSA_CUDA_WORKSPACE_H_

#include <cstdint>
#include <map>
#include <string>

namespace jax_nsa::cuda {

// A call's sizes by name: those of its axes, by the letters that jax_nsa/operator.py gives them,
// and its problem's integers.
class Sizes {
 public:
  explicit Sizes(const std::map<std::string, int64_t>& named) : named_(named) {}

  bool Has(const char* name) const { return named_.count(name) != 0; }
  int64_t operator[](const char* name) const { return named_.at(name); }
  // Rows of query, packed or not.
  int64_t Rows() const { return Has("n") ? named_.at("n") : named_.at("b") * named_.at("t"); }

 private:
  const std::map<std::string, int64_t>& named_;
};

// Bytes of the result named "workspace"; each defined beside its operator's handler.
int64_t CompressAttentionWorkspace(const Sizes& sizes);
int64_t SelectAttentionWorkspace(const Sizes& sizes);

}  // namespace jax_nsa::cuda

#endif  // JAX_NSA_CUDA_WORKSPACE_H_
