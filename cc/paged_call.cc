#include "paged_call.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace jax_nsa {

namespace ffi = xla::ffi;

void ReadPaged(FfiCall* call, PagedProblem* problem, PagedArrays* arrays,
               ffi::Span<const int64_t>* leading) {
  const bool packed = call->Find("first_rows").has_value();
  const size_t query_rank = packed ? 3 : 4;
  const FfiCall::Array query = call->Get("query"), key = call->Get("key"),
                       value = call->Get("value"), table = call->Get("block_table");
  call->Rank(query, query_rank);
  call->Rank(key, 3);
  call->Rank(value, 3);
  call->Rank(table, 2);
  // The sizes of an array that exists, none of them 0, have a product that cannot overflow.
  for (const FfiCall::Array& array : {query, key, value, table}) call->NotEmpty(array);
  if (!call->ok()) return;
  const std::optional<DataType> dtype = FromFfi(query.element_type());
  call->That(dtype.has_value(), "query must be bfloat16, float16 or float32");
  const ffi::Span<const int64_t> query_shape = query.dimensions();
  const int64_t heads = query_shape[query_rank - 2];
  problem->key_value_heads = call->Integer("key_value_heads");
  call->That(problem->key_value_heads > 0 && heads % problem->key_value_heads == 0,
             "query's heads must be a multiple of key_value_heads, got ", heads, " and ",
             problem->key_value_heads);
  problem->scale = call->Float("scale");
  problem->interleaved = call->Integer("interleaved") != 0;
  call->That(table.dimensions()[1] <= std::numeric_limits<int32_t>::max() / key.dimensions()[1],
             "block_table names more positions than lengths can count");
  if (!call->ok()) return;

  problem->dtype = *dtype;
  problem->sequences = table.dimensions()[0];
  problem->pages_per_sequence = table.dimensions()[1];
  problem->tokens = packed ? 0 : query_shape[1];
  problem->rows = packed ? query_shape[0] : query_shape[0] * query_shape[1];
  problem->heads = heads;
  problem->head_size = query_shape[query_rank - 1];
  problem->num_pages = key.dimensions()[0];
  problem->page_size = key.dimensions()[1];
  problem->value_size = value.dimensions()[2] / problem->key_value_heads;
  if (problem->interleaved) problem->value_size -= problem->head_size;

  const auto at_most = [&](const char* name, int64_t size, int64_t limit) {
    call->That(size <= limit, name, " must be at most ", limit, ", got ", size);
  };
  call->That(kMaxGroup % problem->group() == 0, "query's heads for each of key's must divide ",
             kMaxGroup, ", got ", problem->group());
  at_most("query's head size", problem->head_size, kMaxHeadSize);
  at_most("value's head size", problem->value_size, kMaxValueSize);
  call->That(IsPageSize(problem->page_size), "page size must be a multiple of ", kPageGranule,
             " up to ", kMaxPage, ", got ", problem->page_size);
  call->Type(key, query.element_type());
  call->Type(value, query.element_type());
  call->Shape(key, {problem->num_pages, problem->page_size, problem->key_pitch().row});
  call->Shape(value, {problem->num_pages, problem->page_size, problem->value_pitch().row});
  call->That(problem->value_size > 0, "value's head size must be positive, got ",
             problem->value_size);
  call->That(packed || query_shape[0] == problem->sequences,
             "query and block_table must have as many sequences");
  call->That(call->Find("lengths").has_value(), "needs lengths");
  call->That(!packed || call->Find("token_counts").has_value(),
             "needs token_counts beside first_rows");
  // An interleaved pool comes as key and as value.
  const size_t first_value =
      problem->interleaved ? problem->head_size * ffi::ByteWidth(key.element_type()) : 0;
  arrays->query = query.untyped_data();
  arrays->key = key.untyped_data();
  arrays->value = static_cast<const char*>(value.untyped_data()) + first_value;
  arrays->block_table =
      call->Integers("block_table", {problem->sequences, problem->pages_per_sequence});
  arrays->lengths = call->Integers("lengths", {problem->sequences});
  arrays->token_counts = call->Integers("token_counts", {problem->sequences});
  arrays->first_rows = call->Integers("first_rows", {problem->sequences});
  *leading = query_shape.first(query_rank - 2);
}

int32_t* ReadChosen(FfiCall* call, const PagedProblem& problem, ffi::Span<const int64_t> leading,
                    int64_t* count) {
  *count = 0;
  const FfiCall::Array chosen = call->Get("topk_indices");
  call->Type(chosen, ffi::DataType::S32);
  call->Rank(chosen, leading.size() + 2);
  call->NotEmpty(chosen);
  if (!call->ok()) return nullptr;
  *count = chosen.dimensions().back();
  call->Shape(chosen, {problem.key_value_heads, *count}, leading);
  return call->ok() ? chosen.typed_data<int32_t>() : nullptr;
}

void ReadCall(const FfiCall& ffi_call, const ffi::Dictionary& attributes, PagedCall* call) {
  call->names.maps = Attribute(attributes, "maps", ffi::Span<const int64_t>());
  call->names.pool_maps = std::max<int64_t>(1, Attribute<int64_t>(attributes, "pool_maps", 1));
  call->names.is_part = Attribute<int64_t>(attributes, "is_part", 0) != 0;
  call->names.known_as = FindAttribute<ffi::Dictionary>(attributes, "known_as");
  call->faults_fail = Attribute(attributes, "faults", std::string_view("fail")) != "nan";
  if (const std::optional<FfiCall::Array> workspace = ffi_call.Find("workspace")) {
    call->workspace = workspace->untyped_data();
    call->workspace_bytes = static_cast<int64_t>(workspace->size_bytes());
  }
}

std::string Place(std::string_view array, const PagedSequences& sequences, bool packed,
                  const CallersNames& names, int64_t sequence,
                  std::initializer_list<int64_t> further) {
  // Each map was folded in its turn: inside a sequence, or around all of packed rows' sequences.
  std::vector<int64_t> at;
  for (size_t i = names.maps.size(); i-- > 0;) {
    const int64_t size = std::max<int64_t>(1, names.maps[i]);
    int64_t inner = 1;  // sequences of a call before this map
    if (packed) {
      inner = sequences.sequences;
      for (size_t n = i; n < names.maps.size(); ++n) {
        inner /= std::max<int64_t>(1, names.maps[n]);
      }
      inner = std::max<int64_t>(1, inner);
      at.push_back(sequence / inner);
      sequence %= inner;
    } else {
      at.push_back(sequence % size);
      sequence /= size;
    }
  }
  if (names.known_as) array = Attribute(*names.known_as, array, array);
  std::string text(array);
  text += "[" + std::to_string(sequence);
  for (int64_t index : further) text += ", " + std::to_string(index);
  text += "]";
  if (names.is_part) text += " of one device's part";
  if (at.size() == 1) return text + " at index " + std::to_string(at[0]) + " of jax.vmap";
  if (at.size() > 1) {
    text += " at indices (";
    for (size_t i = 0; i < at.size(); ++i) text += (i ? ", " : "") + std::to_string(at[i]);
    text += ") of jax.vmap";
  }
  return text;
}

int64_t AsGiven(int64_t index, int64_t all, int64_t own) {
  return index < 0 ? index : index - (all - own);
}

ffi::Error LengthError(const PagedSequences& sequences, const std::string& place, int32_t length) {
  return InvalidArgument(place + " must be in [0, " + std::to_string(sequences.capacity()) + "] (" +
                         std::to_string(sequences.pages_per_sequence) + " pages of " +
                         std::to_string(sequences.page_size) + " rows), got " +
                         std::to_string(length));
}

ffi::Error PageError(const PagedSequences& sequences, const CallersNames& names,
                     const std::string& place, int32_t id, const std::string& pool) {
  const int64_t all = sequences.num_pages, own = all / names.pool_maps;
  return InvalidArgument(place + " must be in [0, " + std::to_string(own) + "), the pages of " +
                         pool + ", got " + std::to_string(AsGiven(id, all, own)));
}

ffi::Error FaultError(const PagedProblem& problem, const PagedArrays& arrays,
                      const CallersNames& names, Fault fault, int64_t sequence, int64_t page) {
  const bool packed = arrays.first_rows != nullptr;
  const auto place = [&](std::string_view array, std::initializer_list<int64_t> further = {}) {
    return Place(array, problem, packed, names, sequence, further);
  };
  switch (fault) {
    case Fault::kNone:
      return ffi::Error::Success();
    case Fault::kLength:
      return LengthError(problem, place(names.lengths), arrays.lengths[sequence]);
    case Fault::kTokenCount: {
      SequenceRows rows;
      FindRows(problem, arrays, sequence, &rows);
      return InvalidArgument(
          place("actual_seq_qlen") + " must be in [0, " +
          std::to_string(packed ? problem.rows - rows.first : problem.tokens) + "] (" +
          (packed
               ? "what earlier sequences leave of query's " + std::to_string(problem.rows) + " rows"
               : std::string("query's rows for each sequence")) +
          "), got " + std::to_string(arrays.token_counts[sequence]));
    }
    case Fault::kPageId:
      return PageError(problem, names, place("block_table", {page}),
                       arrays.block_table[sequence * problem.pages_per_sequence + page],
                       "key and value");
    case Fault::kOriginalLength:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, "unknown fault");
}

}  // namespace jax_nsa
