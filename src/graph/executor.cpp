#include "graph/executor.h"

#include <chrono>
#include <cstring>

namespace kiln {

Executor::Executor(const Plan& plan, int micro_batches)
    : plan_(plan),
      packing_(pack(plan, micro_batches)),
      arena_(packing_.arena_bytes, "activations, gradients and workspace"),
      tensors_(plan.values().size()),
      bound_(plan.nodes().size()),
      seconds_(plan.nodes().size(), 0.0) {
  for (std::size_t v = 0; v < tensors_.size(); ++v) {
    const Value& value = plan.values()[v];
    tensors_[v] = {value.external ? nullptr : arena_.data() + packing_.value_offset[v], value.spec};
  }
  for (std::size_t n = 0; n < bound_.size(); ++n) {
    const Node& node = plan.nodes()[n];
    Bound& bound = bound_[n];
    bound.in.resize(node.in.size());
    bound.out.resize(node.out.size());
    for (const ValueId id : node.out) bound.accumulates = bound.accumulates || plan.is_parameter_gradient(id);
    const auto bytes = static_cast<std::int64_t>(node.op->workspace_bytes(plan.input_specs(node)));
    bound.workspace = {arena_.data() + packing_.workspace_offset[n], {{bytes}, DType::u8}};
  }
}

void Executor::bind(ValueId id, const Tensor& tensor) {
  const Value& value = plan_.value(id);
  check(value.external, "{}: only external values are bound", value.name);
  check(value.spec == tensor.spec, "{}: bound to {} {}, expected {} {}", value.name, to_string(tensor.dtype()),
        tensor.shape().str(), to_string(value.spec.dtype), value.spec.shape.str());
  tensors_[static_cast<std::size_t>(id.index)] = tensor;
  stale_ = true;
}

void Executor::rebind() {
  for (std::size_t n = 0; n < bound_.size(); ++n) {
    const Node& node = plan_.nodes()[n];
    for (std::size_t i = 0; i < node.in.size(); ++i) {
      bound_[n].in[i] = tensor(node.in[i]);
      check(bound_[n].in[i].data != nullptr, "{}: not bound before the plan runs", plan_.value(node.in[i]).name);
    }
    for (std::size_t i = 0; i < node.out.size(); ++i) bound_[n].out[i] = tensor(node.out[i]);
  }
  stale_ = false;
}

void Executor::run(Phase phase, bool accumulate) {
  if (stale_) rebind();
  for (std::size_t n = 0; n < bound_.size(); ++n) {
    const Node& node = plan_.nodes()[n];
    if (node.phase != phase) continue;
    const Bound& bound = bound_[n];
    const auto begin = profiling_ ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point{};
    node.op->run_cpu({.in = bound.in,
                      .out = bound.out,
                      .workspace = bound.workspace,
                      .accumulate = accumulate && bound.accumulates,
                      .stream = nullptr});
    if (profiling_) seconds_[n] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
}

void Executor::poison() { std::memset(arena_.data(), 0xff, arena_.size()); }

void Executor::set_profiling(bool on) {
  profiling_ = on;
  seconds_.assign(seconds_.size(), 0.0);
}

}  // namespace kiln
