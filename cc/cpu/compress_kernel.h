// What the handler and the kernels of compression agree on. `compress_kernel.cc` is compiled once
// for each instruction set; a Kernel is the result. Only plain data here, as in
// compress_attention_kernel.h, for the same reason.

#ifndef JAX_NSA_CPU_COMPRESS_KERNEL_H_
#define JAX_NSA_CPU_COMPRESS_KERNEL_H_

#include "compress.h"

namespace jax_nsa::cpu::compress {

using jax_nsa::compress::Arrays;
using jax_nsa::compress::Pair;
using jax_nsa::compress::Problem;

// Sums the tokens of one window, which lie at `rows`, into the row of the cache at `target`.
using Kernel = void (*)(const Problem& problem, const Pair& pair, const char* const* rows,
                        char* target);

}  // namespace jax_nsa::cpu::compress

#endif  // JAX_NSA_CPU_COMPRESS_KERNEL_H_
