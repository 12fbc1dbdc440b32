// A call over paged caches: its operands, checked, and the sentence for each fault of a sequence.
// What an operator's user calls its arrays is passed in.

#ifndef JAX_NSA_PAGED_CALL_H_
#define JAX_NSA_PAGED_CALL_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "ffi_call.h"
#include "paged.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

// Reads and checks the operands that attention over paged caches has: query, key, value,
// block_table, lengths, and token_counts and first_rows where they are there. Rows of results are
// those of query: `*leading` is its shape without heads and head size.
void ReadPaged(FfiCall* call, PagedProblem* problem, PagedArrays* arrays,
               xla::ffi::Span<const int64_t>* leading);

// Reads topk_indices, an operand or a result [*leading, key_value_heads, count], and its count;
// null and 0 where something is wrong.
int32_t* ReadChosen(FfiCall* call, const PagedProblem& problem,
                    xla::ffi::Span<const int64_t> leading, int64_t* count);

// What the user called the arrays of a call, for messages about values that only the running
// program knows.
struct CallersNames {
  std::string_view lengths;           // original or compressed
  std::string_view original_lengths;  // where an operator has both
  // In a call that is made of several operators, what its user calls their arguments.
  std::optional<xla::ffi::Dictionary> known_as;
  // Sizes of the jax.vmaps that were folded into the sequences, the innermost first, and how many
  // mapped calls' pools lie one after the other in one.
  xla::ffi::Span<const int64_t> maps;
  int64_t pool_maps = 1;
  bool is_part = false;  // whether the call is what one device has of a larger one
};

// What any operator's call has beside its problem and arrays.
struct PagedCall {
  CallersNames names;
  bool faults_fail;  // otherwise what a fault concerns becomes NaN and -1, or is not written
  // Memory that a kernel asked for as a result of its own; null where it asked for none.
  void* workspace;
  int64_t workspace_bytes;
};

// Reads it, but for the names of arrays.
void ReadCall(const FfiCall& ffi_call, const xla::ffi::Dictionary& attributes, PagedCall* call);

// "name[b]" or "name[b, further]" of a sequence as the user names and counts them, and where it was
// mapped: " at index 2 of jax.vmap".
std::string Place(std::string_view array, const PagedSequences& sequences, bool packed,
                  const CallersNames& names, int64_t sequence,
                  std::initializer_list<int64_t> further = {});

// An index past the end of `all` that a mapped call has, as it was past the end of its `own`.
int64_t AsGiven(int64_t index, int64_t all, int64_t own);

// The errors for a length, and for an entry of block_table, which stand at `place`: name the
// argument, the value and what is legal. `pool` is what the user calls the arrays of pages.
xla::ffi::Error LengthError(const PagedSequences& sequences, const std::string& place,
                            int32_t length);
xla::ffi::Error PageError(const PagedSequences& sequences, const CallersNames& names,
                          const std::string& place, int32_t id, const std::string& pool);

// The error for a sequence's fault but kOriginalLength, in the same way. `page` is the column of
// block_table, for kPageId.
xla::ffi::Error FaultError(const PagedProblem& problem, const PagedArrays& arrays,
                           const CallersNames& names, Fault fault, int64_t sequence,
                           int64_t page = 0);

}  // namespace jax_nsa

#endif  // JAX_NSA_PAGED_CALL_H_
