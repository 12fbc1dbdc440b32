// One custom call that is several: each of them as a call of its own, as its operator decodes it.
//
// Arrays lie one call after the other. An attribute belongs to the call whose prefix its name has.

#ifndef JAX_NSA_PARTS_H_
#define JAX_NSA_PARTS_H_

#include <cstddef>
#include <deque>
#include <string_view>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

struct Part {
  xla::ffi::RemainingArgs args;
  xla::ffi::RemainingRets rets;
  xla::ffi::Dictionary attributes;
};

// What parts refer to is this object's.
class Parts {
 public:
  Parts(const xla::ffi::RemainingArgs& args, const xla::ffi::RemainingRets& rets,
        const xla::ffi::Dictionary& attributes);
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;

  // The next call: of what is left as many arrays as its attributes name. With `earlier`, an
  // operand that has the name of one of that call's results is this result, and not among them.
  Part Next(std::string_view prefix, const Part* earlier = nullptr);
  // Whether no array is left.
  bool Done() const { return args_.size == 0 && rets_.size == 0; }

 private:
  struct Frame {
    XLA_FFI_Args args;
    XLA_FFI_Rets rets;
    XLA_FFI_Attrs attributes;
    std::vector<void*> operands;
    std::vector<XLA_FFI_ArgType> operand_types;
    std::vector<XLA_FFI_ByteSpan> names;
    std::vector<XLA_FFI_ByteSpan*> name_pointers;
    std::vector<XLA_FFI_AttrType> types;
    std::vector<void*> values;
  };

  XLA_FFI_Args args_;  // what is left
  XLA_FFI_Rets rets_;
  const xla::ffi::Dictionary attributes_;
  std::deque<Frame> frames_;
};

}  // namespace jax_nsa

#endif  // JAX_NSA_PARTS_H_
