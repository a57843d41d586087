#include "kernels/state_pointer.h"

#include "base/rng.h"

namespace kiln::cuda {

StatePointer take_state(std::span<const Tensor>& states, const Parameter& parameter, std::string_view name) {
  const bool coded = states[0].dtype() == DType::u8;
  const StatePointer state{.data = states[0].data,
                           .scales = coded ? states[1].as<float>() : nullptr,
                           .stream = stream_of(fmt::format("{}.{}", parameter.name, name).c_str())};
  states = states.subspan(coded ? 2 : 1);
  return state;
}

Buffer make_code_maps(const Context& context, bool needed) {
  if (!needed) return {};
  const CodeMaps maps{state_map(StateValues::any), state_map(StateValues::positive)};
  Buffer memory = context.allocate(sizeof(CodeMaps), "maps of 8-bit states");
  copy_to_device(memory, &maps, context.stream);
  return memory;
}

}  // namespace kiln::cuda
