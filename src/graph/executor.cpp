#include "graph/executor.h"

namespace kiln {

void check_kernels(const Plan& plan, const Backend& backend) {
  for (std::size_t n = 0; n < plan.nodes().size();) {
    const NodeGroup group = backend.group(plan, n);
    backend.check_kernel(plan, group);
    n += group.count;
  }
}

Executor::Executor(const Plan& plan, int micro_batches, Backend& backend)
    : plan_(plan),
      backend_(backend),
      packing_(pack(plan, micro_batches, backend)),
      arena_(backend.allocate(packing_.arena_bytes, "activations, gradients and workspace")),
      tensors_(plan.values().size()),
      users_(plan.values().size()),
      seconds_(plan.nodes().size(), 0.0) {
  for (std::size_t v = 0; v < tensors_.size(); ++v) {
    const Value& value = plan.values()[v];
    tensors_[v] = {value.external ? nullptr : arena_.data() + packing_.value_offset[v], value.spec};
  }
  for (const NodeGroup group : packing_.groups) {
    Step step{.group = group,
              .phase = plan.nodes()[group.first].phase,
              .kernel = backend.kernel(plan, group),
              .in = std::vector<std::vector<Tensor>>(group.count),
              .out = std::vector<std::vector<Tensor>>(group.count),
              .args = std::vector<KernelArgs>(group.count),
              .accumulates = std::vector<bool>(group.count)};
    const auto bytes = static_cast<std::int64_t>(packing_.workspace_bytes[group.first]);
    for (std::size_t i = 0; i < group.count; ++i) {
      const Node& node = plan.nodes()[group.first + i];
      step.in[i].resize(node.in.size());
      step.out[i].resize(node.out.size());
      step.accumulates[i] = node.op->accumulates();
      for (const ValueId id : node.out) step.accumulates[i] = step.accumulates[i] || plan.is_parameter_gradient(id);
      step.args[i].workspace = {arena_.data() + packing_.workspace_offset[group.first], {{bytes}, DType::u8}};
      for (const ValueId id : node.in) users_[static_cast<std::size_t>(id.index)].push_back(steps_.size());
    }
    steps_.push_back(std::move(step));
  }
}

void Executor::bind(ValueId id, const Tensor& tensor) {
  const Value& value = plan_.value(id);
  check(value.external, "{}: only external values are bound", value.name);
  check(value.spec == tensor.spec, "{}: bound to {} {}, expected {} {}", value.name, to_string(tensor.dtype()),
        tensor.shape().str(), to_string(value.spec.dtype), value.spec.shape.str());
  const auto index = static_cast<std::size_t>(id.index);
  if (tensors_[index].data == tensor.data) return;  // a kernel's tables are not made anew for nothing
  tensors_[index] = tensor;
  for (const std::size_t user : users_[index]) steps_[user].stale = true;
}

void Executor::rebind(Step& step) {
  for (std::size_t i = 0; i < step.group.count; ++i) {
    const Node& node = plan_.nodes()[step.group.first + i];
    for (std::size_t k = 0; k < node.in.size(); ++k) {
      step.in[i][k] = tensor(node.in[k]);
      check(step.in[i][k].data != nullptr, "{}: not bound before the plan runs", plan_.value(node.in[k]).name);
    }
    for (std::size_t k = 0; k < node.out.size(); ++k) step.out[i][k] = tensor(node.out[k]);
    step.args[i].in = step.in[i];
    step.args[i].out = step.out[i];
  }
  step.kernel->bind(step.args);
  step.stale = false;
}

void Executor::run(Phase phase, bool accumulate) {
  for (Step& step : steps_) {
    if (step.phase != phase) continue;
    if (step.stale) rebind(step);
    for (std::size_t i = 0; i < step.group.count; ++i) step.args[i].accumulate = accumulate && step.accumulates[i];
    const std::size_t begin = profiling_ ? backend_.mark() : 0;
    step.kernel->run(step.args);
    if (profiling_) marks_.push_back({step.group.first, begin, backend_.mark()});
  }
}

void Executor::poison() {
  const auto bytes = static_cast<std::int64_t>(packing_.arena_bytes);
  if (bytes > 0) backend_.fill_bytes({arena_.data(), {{bytes}, DType::u8}}, 0xff);
}

void Executor::set_profiling(bool on) {
  profiling_ = on;
  seconds_.assign(seconds_.size(), 0.0);
  marks_.clear();
  backend_.forget_marks();
}

const std::vector<double>& Executor::node_seconds() {
  backend_.synchronize();
  for (const Mark& mark : marks_) seconds_[mark.node] += backend_.seconds_between(mark.begin, mark.end);
  marks_.clear();
  backend_.forget_marks();
  return seconds_;
}

}  // namespace kiln
