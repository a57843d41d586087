#include "graph/plan.h"

#include <algorithm>

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

ValueId Op::recompute(GradientContext&, int) const { return {}; }

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
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    for (const ValueId out : nodes_[i].out) writers_[out].push_back(i);
    for (const int input : nodes_[i].op->mutates())
      writers_[nodes_[i].in[static_cast<std::size_t>(input)]].push_back(i);
  }
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

void Plan::recompute(ValueId value) {
  check(!this->value(value).external, "{}: bound by the caller, so there is nothing to compute again",
        this->value(value).name);
  check(gradients_.empty(), "{}: recomputation is asked for before backward()", this->value(value).name);
  values_[static_cast<std::size_t>(value.index)].recomputed = true;
}

/// What gradient nodes read in place of a value: itself, or the copy, recorded at the first call.
ValueId Plan::for_gradient(ValueId value) {
  if (!this->value(value).recomputed) return value;
  if (const auto found = copies_.find(value); found != copies_.end()) return found->second;
  const std::vector<std::size_t>& writers = writers_.at(value);
  const std::size_t producer = writers.front();
  if (writers.size() == 1) {
    const std::vector<ValueId>& out = nodes_[producer].out;
    const auto output = static_cast<int>(std::find(out.begin(), out.end(), value) - out.begin());
    GradientContext context(*this, producer);
    const OpPtr op = nodes_[producer].op;  // recompute() appends to nodes_
    if (const ValueId copy = op->recompute(context, output); copy.valid()) return copies_[value] = copy;
  }
  run_again(producer);
  return copies_.at(value);
}

/// Records a node once more, on copies of what it reads; then the nodes that changed its outputs in place, so that a
/// copy ends as its value did. Inputs come first, so copies stand in the order of their nodes and neighbours stay
/// neighbours.
void Plan::run_again(std::size_t index) {
  const Node node = nodes_[index];  // a copy: nodes_ grows
  std::vector<ValueId> in;
  for (const ValueId id : node.in) {
    const auto found = writers_.find(id);
    const bool newest = found == writers_.end() || found->second.back() <= index ||
                        std::ranges::find(found->second, index) != found->second.end();
    check(newest, "{}: changed in place after {} read it, which can not run again", value(id).name, node.op->name());
    in.push_back(for_gradient(id));
  }
  const std::string name = node.out.empty() ? "again" : value(node.out.front()).name + ".again";
  const std::vector<ValueId> out = add(node.op, std::move(in), name);
  for (std::size_t i = 0; i < out.size(); ++i) {
    values_[static_cast<std::size_t>(out[i].index)].needs_gradient = false;
    if (!value(node.out[i]).recomputed) continue;
    copies_[node.out[i]] = out[i];
    const std::vector<std::size_t>& writers = writers_.at(node.out[i]);
    for (std::size_t w = 1; w < writers.size(); ++w) run_again(writers[w]);
  }
}

void Plan::move_up() {
  const Node node = nodes_.back();
  auto changes = [](const Node& n, ValueId id) {
    if (std::ranges::find(n.out, id) != n.out.end()) return true;
    return std::ranges::any_of(n.op->mutates(), [&](int i) { return n.in[static_cast<std::size_t>(i)] == id; });
  };
  auto depends = [&](const Node& other) {
    const auto conflicts = [&](ValueId id) {
      const bool shared =
          std::ranges::find(other.in, id) != other.in.end() || std::ranges::find(other.out, id) != other.out.end();
      return shared && (changes(node, id) || changes(other, id));
    };
    return other.phase != node.phase || std::ranges::any_of(node.in, conflicts);
  };
  auto begins_gradient = [&](const Node& other) {
    return std::ranges::any_of(other.out, [&](ValueId id) { return is_parameter_gradient(id); });
  };
  std::size_t at = nodes_.size() - 1;
  while (at > 0 && !depends(nodes_[at - 1])) --at;
  while (at < nodes_.size() - 1 && !begins_gradient(nodes_[at])) ++at;
  nodes_.pop_back();
  nodes_.insert(nodes_.begin() + static_cast<std::ptrdiff_t>(at), node);
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
  for (ValueId& id : inputs) id = plan_.for_gradient(id);
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
