#pragma once
#include <array>
#include <string>
#include <vector>

#include "graph/plan.h"

namespace kiln {

/// One weight as optimizers and checkpoints see it: rows [row_begin, row_begin + shape[0]) of a storage value, so that
/// q, k and v are three parameters in one fused [3C, C] storage, each still contiguous.
struct Parameter {
  std::string name;            // Hugging Face name: "model.layers.0.self_attn.q_proj.weight"
  Shape shape;                 // [out, in] or [C]
  std::size_t storage = 0;     // index into the model's list of storages
  std::int64_t row_begin = 0;  // first row of this parameter in its storage
  bool decay = false;          // decoupled weight decay applies
  bool low_rank = false;       // a linear weight of a layer: low-rank optimizers project its gradient
  /// Its number among the low-rank ones in table order, and how many there are: staggers their refreshes.
  std::int64_t low_rank_index = 0, low_rank_count = 1;
  Shape own{};  // less the zeros that a device pads it with; empty: `shape`
  const Shape& own_shape() const { return own.rank() == 0 ? shape : own; }
};

/// Step scalars, one f64 tensor [kScalarCount] read and written by nodes, so that a captured step needs no host value.
enum class Scalar : std::size_t { step, lr, loss_scale, clip_scale, grad_norm, loss };
inline constexpr std::int64_t kScalarCount = 6;
/// Their values on the host.
using StepScalars = std::array<double, kScalarCount>;
inline TensorSpec scalars_spec() { return {{kScalarCount}, DType::f64}; }
inline double& scalar(const Tensor& scalars, Scalar which) {
  return scalars.as<double>()[static_cast<std::size_t>(which)];
}
inline double& scalar(StepScalars& scalars, Scalar which) { return scalars[static_cast<std::size_t>(which)]; }

}  // namespace kiln
