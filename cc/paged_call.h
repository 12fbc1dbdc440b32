// A call over paged caches: its operands, checked, and the sentence for each fault of a sequence.
// What an operator's user calls its arrays is passed in.

#ifndef JAX_NSA_PAGED_CALL_H_
#define JAX_NSA_PAGED_CALL_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "ffi_call.h"
#include "paged.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

// Reads and checks the operands that attention over paged caches has: query, key, value,
// block_table, lengths, and token_counts and first_rows where they are there. Rows of results are
// those of query: `*leading` is its shape without heads and head size.
void ReadPaged(FfiCall* call, PagedProblem* problem, PagedArrays* arrays,
               xla::ffi::Span<const int64_t>* leading);

// What the user called the arrays of a call, for messages about values that only the running
// program knows.
struct CallersNames {
  std::string lengths;           // original or compressed
  std::string original_lengths;  // where an operator has both
  // Sizes of the jax.vmaps that were folded into the sequences, the innermost first, and how many
  // mapped calls' pools lie one after the other in one.
  std::vector<int64_t> maps;
  int64_t pool_maps = 1;
  bool is_part = false;  // whether the call is what one device has of a larger one
};

// Reads the attributes `maps`, `pool_maps` and `is_part`.
void ReadMaps(const xla::ffi::Dictionary& attributes, CallersNames* names);

// Whether faults fail the call; otherwise the sequence's results become NaN and -1.
bool FaultsFail(const xla::ffi::Dictionary& attributes);

// "name[b]" or "name[b, further]" of a sequence as the user counts them, and where it was mapped:
// " at index 2 of jax.vmap".
std::string Place(const std::string& array, const PagedProblem& problem, bool packed,
                  const CallersNames& names, int64_t sequence,
                  std::initializer_list<int64_t> further = {});

// The error for a sequence's fault but kOriginalLength: names the argument, the value and what is
// legal. `page` is the column of block_table, for kPageId.
xla::ffi::Error FaultError(const PagedProblem& problem, const PagedArrays& arrays,
                           const CallersNames& names, Fault fault, int64_t sequence,
                           int64_t page = 0);

}  // namespace jax_nsa

#endif  // JAX_NSA_PAGED_CALL_H_
