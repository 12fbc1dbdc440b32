// Which blocks are always chosen and how ties fall: one definition for host and device code.

#ifndef JAX_NSA_SELECTION_H_
#define JAX_NSA_SELECTION_H_

#include <cstdint>

#include "blocks.h"

namespace jax_nsa {

// How many of the first and of the last blocks are chosen whatever their scores.
struct Forced {
  int64_t first;
  int64_t last;

  JAX_NSA_HOST_DEVICE constexpr bool Has(int64_t j, int64_t num_blocks) const {
    return j < first || j >= num_blocks - last;
  }
};

// Descending importance, of equals the lower index first: whether block a goes before block b.
// Importances must be ordered numbers: rank NaN as -1, below every sum of probabilities.
JAX_NSA_HOST_DEVICE constexpr bool GoesBefore(float importance_a, int32_t a, float importance_b,
                                              int32_t b) {
  return importance_a > importance_b || (importance_a == importance_b && a < b);
}

}  // namespace jax_nsa

#endif  // JAX_NSA_SELECTION_H_
