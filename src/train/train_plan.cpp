#include "train/train_plan.h"

#include "dist/all_reduce.h"
#include "ops/loss_sum.h"
#include "optim/gradient_norm.h"

namespace kiln {

std::size_t TrainPlan::parameter_bytes() const {
  std::size_t total = 0;
  for (const Storage& storage : table.storages)
    total += storage.spec.bytes() +
             (lows.empty() ? 0 : sizeof(std::uint16_t) * static_cast<std::size_t>(storage.spec.shape.numel()));
  return total;
}

std::size_t TrainPlan::state_bytes() const {
  std::size_t total = 0;
  for (const Parameter& parameter : table.parameters) total += optimizer->state_bytes(parameter);
  return total;
}

TrainPlan record_train_plan(const TrainPlanOptions& options, Communicator& communicator) {
  options.model.validate();
  TrainPlan train{.plan = {},
                  .table = llama_parameters(options.model, options.layout),
                  .optimizer = make_optimizer(options.optimizer),
                  .values = {},
                  .lows = {},
                  .state_specs = {},
                  .states = {}};
  Plan& plan = train.plan;
  train.values = record_llama(plan, options.model, options.layout, options.micro, LlamaOutput::losses_and_gradients,
                              options.micro.seq_len, options.recompute);
  plan.add(std::make_shared<LossSum>(), {train.values.losses, train.values.scalars}, "loss");
  plan.backward(train.values.losses);
  if (options.masters)
    for (const Storage& storage : train.table.storages)
      train.lows.push_back(plan.external(storage.name + ".low", {storage.spec.shape, DType::u16}, Role::parameter));

  plan.set_phase(Phase::update);
  std::vector<ValueId> gradients;
  for (const ValueId storage : train.values.storages) gradients.push_back(plan.gradient(storage));
  if (communicator.size() > 1) {
    const auto all_reduce = std::make_shared<AllReduce>(communicator);
    for (const ValueId gradient : gradients) plan.add(all_reduce, {gradient}, "all_reduce");
  }
  std::vector<ValueId> norm_inputs = gradients;
  norm_inputs.push_back(train.values.scalars);
  plan.add(std::make_shared<GradientNorm>(GradientNorm::Options{.clip_norm = options.clip_norm}), norm_inputs, "norm");

  for (const Parameter& parameter : train.table.parameters) {
    train.state_specs.push_back(train.optimizer->states(parameter));
    std::vector<ValueId> inputs{train.values.storages[parameter.storage], gradients[parameter.storage],
                                train.values.scalars};
    std::vector<ValueId> states;
    for (const StateSpec& state : train.state_specs.back())
      states.push_back(plan.external(parameter.name + "." + state.name, state.spec, Role::state));
    inputs.insert(inputs.end(), states.begin(), states.end());
    if (options.masters) inputs.push_back(train.lows[parameter.storage]);
    plan.add(train.optimizer->update_op(parameter), inputs, parameter.name + ".update");
    train.states.push_back(std::move(states));
  }
  return train;
}

OptimizerStates::OptimizerStates(const ParameterTable& table, const Optimizer& optimizer) {
  for (const Parameter& parameter : table.parameters) {
    first_.push_back(states_.size());
    for (const StateSpec& state : optimizer.states(parameter)) {
      const std::string name = parameter.name + "." + state.name;
      states_.push_back({name, HostTensor(state.spec, name)});
    }
  }
}

std::size_t OptimizerStates::bytes() const {
  std::size_t total = 0;
  visit([&](const std::string&, const Tensor& tensor) { total += tensor.bytes(); });
  return total;
}

}  // namespace kiln
