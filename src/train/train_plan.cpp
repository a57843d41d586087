#include "train/train_plan.h"

#include "dist/all_reduce.h"
#include "optim/gradient_norm.h"

namespace kiln {

std::size_t TrainPlan::parameter_bytes() const {
  std::size_t total = 0;
  for (const Storage& storage : table.storages) total += storage.spec.bytes();
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
                  .table = llama_parameters(options.model, DType::f32),
                  .optimizer = make_optimizer(options.optimizer),
                  .values = {},
                  .state_specs = {},
                  .states = {}};
  Plan& plan = train.plan;
  train.values = record_llama(plan, options.model, DType::f32, options.micro, LlamaOutput::losses_and_gradients,
                              options.micro.seq_len);
  plan.backward(train.values.losses);

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
    plan.add(train.optimizer->update_op(parameter), inputs, parameter.name + ".update");
    train.states.push_back(std::move(states));
  }
  return train;
}

OptimizerStates::OptimizerStates(const TrainPlan& plan) {
  for (std::size_t p = 0; p < plan.table.parameters.size(); ++p) {
    first_.push_back(states_.size());
    for (const StateSpec& state : plan.state_specs[p]) {
      const std::string name = plan.table.parameters[p].name + "." + state.name;
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
