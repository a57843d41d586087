#pragma once
#include "graph/plan.h"

namespace kiln {

/// Scalar::loss = sum of the losses of a step's micro-batches, in f64 and token order.
///
/// in     losses [N] f32|f64    scalars (graph/parameter.h), of which loss is written (first micro-batch) or added to
/// out    none; not differentiable
class LossSum final : public Op {
 public:
  std::string_view name() const override { return "loss_sum"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  std::vector<int> mutates() const override { return {1}; }
  bool accumulates() const override { return true; }
  void run_cpu(const KernelArgs& args) const override;
};

}  // namespace kiln
