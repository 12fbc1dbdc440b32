#include "ascend/parts.h"

#include <algorithm>
#include <cstdint>
#include <optional>

namespace jax_nsa::ascend {
namespace {

namespace ffi = xla::ffi;

// The array lists behind XLA's views of them, which only their heirs see.
struct Args : ffi::RemainingArgs {
  explicit Args(const ffi::RemainingArgs& view) : RemainingArgs(view) {}
  XLA_FFI_Args list() const {
    XLA_FFI_Args rest = *args();
    rest.size -= offset();
    rest.types += offset();
    rest.args += offset();
    return rest;
  }
};

struct Rets : ffi::RemainingRets {
  explicit Rets(const ffi::RemainingRets& view) : RemainingRets(view) {}
  XLA_FFI_Rets list() const {
    XLA_FFI_Rets rest = *rets();
    rest.size -= offset();
    rest.types += offset();
    rest.rets += offset();
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

  frame.args = args_;
  frame.args.size = std::min(args_.size, CountNames(attributes, "operands"));
  args_.size -= frame.args.size;
  args_.types += frame.args.size;
  args_.args += frame.args.size;
  frame.rets = rets_;
  frame.rets.size = std::min(rets_.size, CountNames(attributes, "results"));
  rets_.size -= frame.rets.size;
  rets_.types += frame.rets.size;
  rets_.rets += frame.rets.size;
  return {ffi::RemainingArgs(&frame.args, 0), ffi::RemainingRets(&frame.rets, 0), attributes};
}

}  // namespace jax_nsa::ascend
