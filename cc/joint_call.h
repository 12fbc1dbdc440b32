// One custom call that is several: its branches, each a call of its own, as its operator decodes
// it.
//
// Arrays lie one branch after the other. An attribute belongs to the one whose prefix its name has.

#ifndef JAX_NSA_JOINT_CALL_H_
#define JAX_NSA_JOINT_CALL_H_

#include <cstddef>
#include <deque>
#include <string_view>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_nsa {

struct Branch {
  xla::ffi::RemainingArgs args;
  xla::ffi::RemainingRets rets;
  xla::ffi::Dictionary attributes;
};

// What branches refer to is this object's.
class JointCall {
 public:
  JointCall(const xla::ffi::RemainingArgs& args, const xla::ffi::RemainingRets& rets,
            const xla::ffi::Dictionary& attributes);
  JointCall(const JointCall&) = delete;
  JointCall& operator=(const JointCall&) = delete;

  // The next one: of what is left as many arrays as its attributes name. With `earlier`, an
  // operand that has the name of one of that call's results is this result, and not among them.
  Branch Next(std::string_view prefix, const Branch* earlier = nullptr);
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

#endif  // JAX_NSA_JOINT_CALL_H_
