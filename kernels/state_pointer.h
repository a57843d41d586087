#pragma once
#include <span>
#include <string_view>

#include "kernels/context.h"
#include "optim/state_codec.h"

/// States of an optimizer on the device, in the precisions of optim/state_codec.h.
namespace kiln::cuda {

/// Where one state lies.
struct StatePointer {
  void* data;            // f32, bf16 or codes of 8 bits
  float* scales;         // of each kStateBlock codes; else null
  std::uint64_t stream;  // of stochastic rounding, as StateStore says
};

/// The next state of `parameter` off the front of `states`: one tensor, or codes and scales.
StatePointer take_state(std::span<const Tensor>& states, const Parameter& parameter, std::string_view name);

/// Of three kernels, or whatever else, the one for states of a precision.
template <typename T>
T of_states(StatePrecision precision, T whole, T half, T coded) {
  return precision == StatePrecision::fp32 ? whole : precision == StatePrecision::bf16 ? half : coded;
}

/// Both maps of 8-bit states, each StateMap's values before its thresholds.
struct CodeMaps {
  StateMap any, positive;
};
/// CodeMaps in the device's memory; nothing unless `needed`.
Buffer make_code_maps(const Context& context, bool needed);

}  // namespace kiln::cuda
