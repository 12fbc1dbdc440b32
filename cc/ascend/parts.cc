#include "ascend/parts.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace jax_nsa::ascend {
namespace {

namespace ffi = xla::ffi;

// Takes the first arrays of a list, `count` of them or all that there are.
template <typename List>
List Take(List* list, void** List::* arrays, int64_t count) {
  List taken = *list;
  taken.size = std::min(list->size, count);
  list->size -= taken.size;
  list->types += taken.size;
  list->*arrays += taken.size;
  return taken;
}

// The lists behind XLA's views of them, which only their heirs see.
struct Args : ffi::RemainingArgs {
  explicit Args(const ffi::RemainingArgs& view) : RemainingArgs(view) {}
  XLA_FFI_Args list() const {
    XLA_FFI_Args rest = *args();
    Take(&rest, &XLA_FFI_Args::args, offset());
    return rest;
  }
};

struct Rets : ffi::RemainingRets {
  explicit Rets(const ffi::RemainingRets& view) : RemainingRets(view) {}
  XLA_FFI_Rets list() const {
    XLA_FFI_Rets rest = *rets();
    Take(&rest, &XLA_FFI_Rets::rets, offset());
    return rest;
  }
};

// An attribute of whatever type.
struct AnyAttribute {
  XLA_FFI_AttrType type;
  void* value;
};

// How many arrays an attribute names; none where it is not there, which decoding refuses.
int64_t CountNames(const ffi::Dictionary& attributes, std::string_view attribute) {
  const ffi::ErrorOr<std::string_view> names = attributes.get<std::string_view>(attribute);
  if (names.has_error() || names->empty()) return 0;
  return std::count(names->begin(), names->end(), ' ') + 1;
}

}  // namespace
}  // namespace jax_nsa::ascend

template <>
struct xla::ffi::AttrDecoding<jax_nsa::ascend::AnyAttribute> {
  using Type = jax_nsa::ascend::AnyAttribute;
  static std::optional<Type> Decode(XLA_FFI_AttrType type, void* value, DiagnosticEngine&) {
    return Type{type, value};
  }
};

namespace jax_nsa::ascend {

Parts::Parts(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
             const ffi::Dictionary& attributes)
    : args_(Args(args).list()), rets_(Rets(rets).list()), attributes_(attributes) {}

Part Parts::Next(std::string_view prefix) {
  Frame& frame = frames_.emplace_back();
  // In the order of their names, which a prefix that they share leaves.
  for (auto it = attributes_.begin(); it != attributes_.end(); ++it) {
    const std::string_view name = *it;
    if (name.substr(0, prefix.size()) != prefix) continue;
    const ffi::ErrorOr<AnyAttribute> attribute = attributes_.get<AnyAttribute>(name);
    if (attribute.has_error()) continue;
    frame.names.push_back({name.data() + prefix.size(), name.size() - prefix.size()});
    frame.types.push_back(attribute->type);
    frame.values.push_back(attribute->value);
  }
  for (XLA_FFI_ByteSpan& name : frame.names) frame.name_pointers.push_back(&name);
  frame.attributes = {XLA_FFI_Attrs_STRUCT_SIZE,
                      nullptr,
                      static_cast<int64_t>(frame.names.size()),
                      frame.types.data(),
                      frame.name_pointers.data(),
                      frame.values.data()};
  const ffi::Dictionary attributes(&frame.attributes);

  frame.args = Take(&args_, &XLA_FFI_Args::args, CountNames(attributes, "operands"));
  frame.rets = Take(&rets_, &XLA_FFI_Rets::rets, CountNames(attributes, "results"));
  return {ffi::RemainingArgs(&frame.args, 0), ffi::RemainingRets(&frame.rets, 0), attributes};
}

}  // namespace jax_nsa::ascend
