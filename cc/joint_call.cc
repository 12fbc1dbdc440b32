#include "joint_call.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

namespace jax_nsa {
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

// The arrays that an attribute names; none where it is not there, which decoding refuses.
std::vector<std::string_view> Names(const ffi::Dictionary& attributes, std::string_view attribute) {
  std::vector<std::string_view> names;
  const ffi::ErrorOr<std::string_view> list = attributes.get<std::string_view>(attribute);
  if (list.has_error() || list->empty()) return names;
  for (std::string_view rest = *list;;) {
    const size_t end = rest.find(' ');
    names.push_back(rest.substr(0, end));
    if (end == std::string_view::npos) return names;
    rest.remove_prefix(end + 1);
  }
}

using Named = std::vector<std::pair<std::string_view, void*>>;

Named ResultsOf(const Branch& branch) {
  const std::vector<std::string_view> names = Names(branch.attributes, "results");
  const XLA_FFI_Rets rets = Rets(branch.rets).list();
  Named results;
  for (int64_t i = 0; i < std::min<int64_t>(names.size(), rets.size); ++i) {
    results.emplace_back(names[i], rets.rets[i]);
  }
  return results;
}

// What has the name; null if nothing has.
void* Find(const Named& among, std::string_view name) {
  for (const auto& [other, found] : among) {
    if (other == name) return found;
  }
  return nullptr;
}

}  // namespace
}  // namespace jax_nsa

template <>
struct xla::ffi::AttrDecoding<jax_nsa::AnyAttribute> {
  using Type = jax_nsa::AnyAttribute;
  static std::optional<Type> Decode(XLA_FFI_AttrType type, void* value, DiagnosticEngine&) {
    return Type{type, value};
  }
};

namespace jax_nsa {

JointCall::JointCall(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                     const ffi::Dictionary& attributes)
    : args_(Args(args).list()), rets_(Rets(rets).list()), attributes_(attributes) {}

Branch JointCall::Next(std::string_view prefix, const Branch* earlier) {
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

  const Named results = earlier == nullptr ? Named() : ResultsOf(*earlier);
  for (const std::string_view name : Names(attributes, "operands")) {
    if (void* const result = Find(results, name)) {
      frame.operands.push_back(result);
      frame.operand_types.push_back(XLA_FFI_ArgType_BUFFER);
    } else if (const XLA_FFI_Args next = Take(&args_, &XLA_FFI_Args::args, 1); next.size == 1) {
      frame.operands.push_back(*next.args);
      frame.operand_types.push_back(*next.types);
    }
  }
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(frame.operands.size()),
                frame.operand_types.data(), frame.operands.data()};
  const auto count = static_cast<int64_t>(Names(attributes, "results").size());
  frame.rets = Take(&rets_, &XLA_FFI_Rets::rets, count);
  return {ffi::RemainingArgs(&frame.args, 0), ffi::RemainingRets(&frame.rets, 0), attributes};
}

}  // namespace jax_nsa
