// Call frames of a whole step: a legal one is taken, with the first call's result as the blocks
// that the second one reads, and frames that lie are refused.

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "frame.h"
#include "legal_frames.h"
#include "step_call.h"
#include "xla/ffi/api/ffi.h"

namespace jax_nsa {
namespace {

namespace ffi = xla::ffi;

using testing::Array;
using testing::Frame;

const void* chosen_blocks;  // that the handler found, and those that it reads
const void* blocks_read;
bool has_window;

ffi::Error DecodeStep(ffi::RemainingArgs args, ffi::RemainingRets rets,
                      ffi::Dictionary attributes) {
  const ffi::ErrorOr<step::Call> call = step::Decode(args, rets, attributes);
  if (call.has_error()) return call.error();
  chosen_blocks = call->compressed.arrays.topk_indices;
  blocks_read = call->chosen.arrays.topk_indices;
  has_window = call->window.has_value();
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER(kStep, DecodeStep, ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs());

// Adds one call to a frame. `handed_on` is among its operands by name alone.
void Add(const std::string& prefix, const Frame& part, const std::string& handed_on, Frame* to) {
  std::string operands, results;
  for (const Array& array : part.arguments) {
    operands += (operands.empty() ? "" : " ") + array.name;
    if (array.name != handed_on) to->arguments.push_back(array);
  }
  for (const Array& array : part.results) {
    results += (results.empty() ? "" : " ") + array.name;
    to->results.push_back(array);
  }
  to->attributes[prefix + "operands"] = operands;
  to->attributes[prefix + "results"] = results;
  for (const auto& [name, value] : part.attributes) to->attributes[prefix + name] = value;
}

Frame WindowFrame() {
  Frame frame = testing::SelectAttentionFrame(false);
  frame.arguments.erase(frame.arguments.begin() + 3);  // topk_indices
  frame.results = {{"window_attention", testing::kF32, {2, 3, 4, 6}}};
  std::get<testing::Scalars>(frame.attributes["problem"])["select_block_size"] = int64_t{0};
  return frame;
}

Frame StepFrame(bool window) {
  Frame frame;
  Add("compressed_", testing::CompressAttentionFrame(false), "", &frame);
  Frame chosen = testing::SelectAttentionFrame(false);
  // Last among operands, as JAX's calls have them, and not so among results.
  std::rotate(chosen.arguments.begin() + 3, chosen.arguments.begin() + 4, chosen.arguments.end());
  Add("chosen_", chosen, "topk_indices", &frame);
  if (window) Add("window_", WindowFrame(), "", &frame);
  return frame;
}

// Puts another name among those that an attribute lists.
void Rename(const std::string& attribute, const std::string& from, const std::string& to,
            Frame* frame) {
  auto& names = std::get<std::string>(frame->attributes[attribute]);
  names.replace(names.find(from), from.size(), to);
}

int failures = 0;

void ExpectTaken(bool window) {
  chosen_blocks = blocks_read = nullptr;
  const std::string message = testing::Call(StepFrame(window)).Run(kStep);
  if (message.empty() && chosen_blocks != nullptr && blocks_read == chosen_blocks &&
      has_window == window) {
    return;
  }
  ++failures;
  std::printf("a legal step is misunderstood: %s\n", message.c_str());
}

void ExpectRefused(const std::function<void(Frame*)>& edit, const std::string& expected) {
  Frame frame = StepFrame(true);
  edit(&frame);
  const std::string message = testing::Call(frame).Run(kStep);
  if (message.find(expected) != std::string::npos) return;
  ++failures;
  std::printf("expected \"%s\", got \"%s\"\n", expected.c_str(), message.c_str());
}

void Test() {
  ExpectTaken(false);
  ExpectTaken(true);
  // The blocks that are read have the shape of those that are chosen.
  ExpectRefused([](Frame* f) { f->results[1].dims = {2, 3, 2, 0}; }, "topk_indices");
  ExpectRefused([](Frame* f) { f->arguments[8].dims = {2, 4, 4, 8}; }, "topk_indices");
  // A call that reads none.
  ExpectRefused(
      [](Frame* f) {
        *f = {};
        Add("compressed_", testing::CompressAttentionFrame(false), "", f);
        Add("chosen_", WindowFrame(), "", f);
      },
      "not those that are chosen");
  ExpectRefused([](Frame* f) { f->arguments.push_back(f->arguments[0]); }, "belong to none");
  ExpectRefused([](Frame* f) { f->results.push_back(f->results[0]); }, "belong to none");
  ExpectRefused([](Frame* f) { f->arguments.pop_back(); }, "operands");
  ExpectRefused([](Frame* f) { f->results.resize(3); }, "results");
  // What else has a name to be handed on by is no operand of the second call, or no result.
  ExpectRefused([](Frame* f) { Rename("compressed_results", "lse", "lengths", f); },
                "does not know \"lengths\"");
  ExpectRefused([](Frame* f) { Rename("chosen_operands", "lengths", "lse", f); },
                "does not know \"lse\"");
  ExpectRefused([](Frame* f) { f->attributes.erase("chosen_operands"); }, "operands");
  ExpectRefused([](Frame* f) { f->attributes.erase("window_problem"); }, "problem");
}

}  // namespace
}  // namespace jax_nsa

int main() {
  jax_nsa::Test();
  return jax_nsa::failures == 0 ? 0 : 1;
}
