#include "graph/plan.h"

namespace kiln {

std::string_view to_string(Role role) {
  switch (role) {
    case Role::parameter:
      return "parameters";
    case Role::gradient:
      return "gradients";
    case Role::state:
      return "states";
    case Role::activation:
      return "activations";
    case Role::workspace:
      return "workspace";
    case Role::input:
      return "inputs";
  }
  return "unknown";
}

void Op::gradient(GradientContext&) const { fail(ExitCode::usage, "{}: this op has no gradient rule", name()); }

ValueId Plan::new_value(Value value) {
  values_.push_back(std::move(value));
  return {static_cast<int>(values_.size()) - 1};
}

ValueId Plan::external(std::string name, TensorSpec spec, Role role) {
  return new_value({.name = std::move(name),
                    .spec = spec,
                    .role = role,
                    .external = true,
                    .needs_gradient = role == Role::parameter});
}

std::vector<ValueId> Plan::add(OpPtr op, std::vector<ValueId> in, const std::string& name) {
  Node node{.op = std::move(op), .in = std::move(in), .out = {}, .phase = phase_};
  bool needs_gradient = false;
  for (const ValueId id : node.in) {
    check(id.valid() && id.index < static_cast<int>(values_.size()), "{} ({}): input is not a value of this plan",
          node.op->name(), name);
    needs_gradient = needs_gradient || value(id).needs_gradient;
  }
  const std::vector<TensorSpec> specs = node.op->infer(input_specs(node));
  for (std::size_t i = 0; i < specs.size(); ++i) {
    node.out.push_back(new_value(
        {.name = i == 0 ? name : fmt::format("{}.{}", name, i), .spec = specs[i], .needs_gradient = needs_gradient}));
  }
  nodes_.push_back(node);
  return node.out;
}

ValueId Plan::add1(OpPtr op, std::vector<ValueId> in, const std::string& name) {
  const std::vector<ValueId> out = add(std::move(op), std::move(in), name);
  check(out.size() == 1, "{}: expected one output, the op has {}", name, out.size());
  return out.front();
}

void Plan::backward(ValueId loss) {
  check(phase_ == Phase::micro, "backward() belongs to the micro phase");
  check(value(loss).needs_gradient, "{}: no parameter leads to it", value(loss).name);
  std::vector<bool> reached(values_.size(), false);  // a gradient arrives at this value
  reached[static_cast<std::size_t>(loss.index)] = true;
  for (std::size_t i = nodes_.size(); i-- > 0;) {
    bool wanted = false;
    for (const ValueId out : nodes_[i].out) wanted = wanted || reached[static_cast<std::size_t>(out.index)];
    for (const int input : nodes_[i].op->mutates())
      wanted = wanted || reached[static_cast<std::size_t>(nodes_[i].in[static_cast<std::size_t>(input)].index)];
    if (!wanted) continue;
    GradientContext context(*this, i);
    const OpPtr op = nodes_[i].op;  // the rule appends to nodes_
    op->gradient(context);
    for (const ValueId in : nodes_[i].in)
      if (gradients_.contains(in)) reached[static_cast<std::size_t>(in.index)] = true;
  }
}

ValueId Plan::gradient(ValueId value) const {
  const auto found = gradients_.find(value);
  return found == gradients_.end() ? ValueId{} : found->second;
}

void Plan::keep(ValueId value) { values_[static_cast<std::size_t>(value.index)].kept = true; }

void Plan::set_phase(Phase phase) {
  check(phase == Phase::update || phase_ == Phase::micro, "a plan cannot return from the update to the micro phase");
  phase_ = phase;
}

std::vector<TensorSpec> Plan::input_specs(const Node& node) const {
  std::vector<TensorSpec> specs;
  for (const ValueId id : node.in) specs.push_back(value(id).spec);
  return specs;
}

Cost Plan::cost(Phase phase) const {
  Cost total;
  for (const Node& node : nodes_) {
    if (node.phase != phase) continue;
    const Cost cost = node.op->cost(input_specs(node));
    total.flops += cost.flops;
    total.bytes += cost.bytes;
  }
  return total;
}

bool Plan::is_parameter_gradient(ValueId id) const { return parameter_gradients_.contains(id); }

ValueId GradientContext::in(int i) const { return plan_.nodes_[node_].in[static_cast<std::size_t>(i)]; }
ValueId GradientContext::out(int i) const { return plan_.nodes_[node_].out[static_cast<std::size_t>(i)]; }

std::vector<ValueId> GradientContext::add(OpPtr op, std::vector<ValueId> inputs, const std::string& name) {
  std::vector<ValueId> out = plan_.add(std::move(op), std::move(inputs), name);
  for (const ValueId id : out) plan_.values_[static_cast<std::size_t>(id.index)].needs_gradient = false;
  return out;
}

void GradientContext::set_grad_in(int i, ValueId gradient) {
  const Value& target = plan_.value(in(i));
  Value& value = plan_.values_[static_cast<std::size_t>(gradient.index)];
  check(!plan_.gradient(in(i)).valid(), "{}: a second gradient arrived; the op must add to the first", target.name);
  check(value.spec.shape == target.spec.shape, "gradient {} of {} has shape {}, expected {}", value.name, target.name,
        value.spec.shape.str(), target.spec.shape.str());
  plan_.gradients_[in(i)] = gradient;
  if (target.role == Role::parameter) {
    value.role = Role::gradient;
    plan_.parameter_gradients_[gradient] = in(i);
  }
}

void GradientContext::replace_grad_in(int i, ValueId gradient) {
  check(plan_.value(in(i)).role != Role::parameter, "{}: a parameter's gradient is added to, not replaced",
        plan_.value(in(i)).name);
  plan_.gradients_.erase(in(i));
  set_grad_in(i, gradient);
}

}  // namespace kiln
