#include "train/train_plan.h"

#include <algorithm>

#include "dist/all_reduce.h"
#include "ops/loss_sum.h"
#include "optim/gradient_norm.h"
#include "optim/projector.h"

namespace kiln {
namespace {

void check_in_backward(const TrainPlanOptions& options) {
  check(
      options.micro_batches == 1,
      "memory.update: in_backward with {} micro-batches, whose gradients must add up before an update; set batch.micro "
      "to a rank's whole share, or memory.update: after_backward",
      options.micro_batches);
  check(
      options.clip_norm == 0,
      "memory.update: in_backward with optimizer.clip_norm {}, which needs the norm of all gradients before the first "
      "update; set optimizer.clip_norm: 0, or memory.update: after_backward",
      options.clip_norm);
}

/// States in files are those of the unpadded matrix: padding must not turn its side, change its rank or move the blocks
/// that share a scale.
void check_padding(const TrainPlanOptions& options, const Optimizer& optimizer, const ParameterTable& padded) {
  if (options.layout.multiple == 1) return;
  const std::string coded = padded_codes(options.model, optimizer, options.layout);
  check(coded.empty(),
        "{}: stored with sizes that are multiples of {} on this device, where its 8-bit states would have other "
        "blocks; use such sizes, optimizer.states and optimizer.projector_states of fp32 or bf16, or train on the CPU",
        coded, options.layout.multiple);
  const ParameterTable table = llama_parameters(options.model, DType::f32);
  for (std::size_t p = 0; p < table.parameters.size(); ++p) {
    const Shape &mine = table.parameters[p].shape, &stored = padded.parameters[p].shape;
    if (mine == stored) continue;
    const bool mini = options.optimizer.kind == OptimizerKind::apollo_mini;
    if (!table.parameters[p].low_rank || !(mini || has_rank(options.optimizer.kind))) continue;
    const std::int64_t wanted = mini ? 1 : options.optimizer.rank;
    const auto rank = [&](const Shape& shape) { return std::min({wanted, shape[0], shape[1]}); };
    check(projection_side(mine) == projection_side(stored) && rank(mine) == rank(stored),
          "{}: {} is stored as {} on this device, whose subspace is another one; use a model.ffn that is a multiple of "
          "{}, "
          "or train on the CPU",
          table.parameters[p].name, mine.str(), stored.str(), options.layout.multiple);
  }
}

/// The storages in the order in which backward is done with them.
std::vector<std::size_t> order_of_completion(const TrainPlan& train) {
  const std::vector<ValueId>& storages = train.values.storages;
  std::vector<std::size_t> last(storages.size()), order(storages.size());
  for (std::size_t s = 0; s < storages.size(); ++s) {
    order[s] = s;
    for (std::size_t n = 0; n < train.plan.nodes().size(); ++n) {
      const Node& node = train.plan.nodes()[n];
      const ValueId gradient = train.plan.gradient(storages[s]);
      for (const ValueId id : {storages[s], gradient})
        if (std::ranges::find(node.in, id) != node.in.end() || std::ranges::find(node.out, id) != node.out.end())
          last[s] = n;
    }
  }
  std::ranges::stable_sort(order, [&](std::size_t a, std::size_t b) { return last[a] < last[b]; });
  return order;
}

/// Records what turns gradients into new weights.
class UpdateRecorder {
 public:
  UpdateRecorder(TrainPlan& train, const TrainPlanOptions& options, Communicator& communicator)
      : train_(train), plan_(train.plan), options_(options), communicator_(communicator) {
    for (const ValueId storage : train.values.storages) gradients_.push_back(plan_.gradient(storage));
  }

  void after_backward() {
    plan_.set_phase(Phase::update);
    for (const ValueId gradient : gradients_) all_reduce(gradient);
    std::vector<ValueId> inputs = gradients_;
    inputs.push_back(train_.values.scalars);
    plan_.add(std::make_shared<GradientNorm>(GradientNorm::Options{.clip_norm = options_.clip_norm}), inputs, "norm");
    // Updates of one kind are neighbours, so that a device takes them in one launch.
    for (const bool low_rank : {true, false})
      for (std::size_t p = 0; p < train_.table.parameters.size(); ++p)
        if (train_.table.parameters[p].low_rank == low_rank) update(p);
  }

  void in_backward() {
    const auto norm = std::make_shared<GradientNorm>(GradientNorm::Options{.clip_norm = 0, .running = true});
    for (const std::size_t storage : order_of_completion(train_)) {
      if (all_reduce(gradients_[storage])) plan_.move_up();
      plan_.add(norm, {gradients_[storage], train_.values.scalars}, "norm");
      plan_.move_up();
      for (std::size_t p = 0; p < train_.table.parameters.size(); ++p) {
        if (train_.table.parameters[p].storage != storage) continue;
        update(p);
        plan_.move_up();
      }
    }
  }

 private:
  bool all_reduce(ValueId gradient) {
    if (communicator_.size() == 1) return false;
    plan_.add(std::make_shared<AllReduce>(communicator_), {gradient}, "all_reduce");
    return true;
  }
  void update(std::size_t p) {
    const Parameter& parameter = train_.table.parameters[p];
    std::vector<ValueId> inputs{train_.values.storages[parameter.storage], gradients_[parameter.storage],
                                train_.values.scalars};
    inputs.insert(inputs.end(), train_.states[p].begin(), train_.states[p].end());
    if (options_.masters) inputs.push_back(train_.lows[parameter.storage]);
    plan_.add(train_.optimizer->update_op(parameter), inputs, parameter.name + ".update");
  }

  TrainPlan& train_;
  Plan& plan_;
  const TrainPlanOptions& options_;
  Communicator& communicator_;
  std::vector<ValueId> gradients_;  // by storage
};

}  // namespace

std::string padded_codes(const LlamaConfig& model, const Optimizer& optimizer, const StorageLayout& layout) {
  const ParameterTable own = llama_parameters(model, DType::f32), stored = llama_parameters(model, layout);
  for (std::size_t p = 0; p < own.parameters.size(); ++p) {
    if (own.parameters[p].shape == stored.parameters[p].shape) continue;
    const std::vector<StateSpec> of_own = optimizer.states(own.parameters[p]),
                                 of_stored = optimizer.states(stored.parameters[p]);
    for (std::size_t s = 0; s < of_own.size(); ++s)
      if (of_own[s].spec.dtype == DType::u8 && of_own[s].spec.shape != of_stored[s].spec.shape)
        return own.parameters[p].name;
  }
  return "";
}

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
  if (options.update_in_backward) check_in_backward(options);
  check(options.layout.linear_gradients == DType::f32 || options.micro_batches == 1,
        "precision.gradients: bf16 with {} micro-batches, whose gradients add up in f32; leave batch.micro out, or set "
        "auto or fp32",
        options.micro_batches);
  TrainPlan train{.plan = {},
                  .layout = options.layout,
                  .table = llama_parameters(options.model, options.layout),
                  .optimizer = make_optimizer(options.optimizer),
                  .values = {},
                  .lows = {},
                  .state_specs = {},
                  .states = {}};
  check_padding(options, *train.optimizer, train.table);
  Plan& plan = train.plan;
  train.values = record_llama(plan, options.model, options.layout, options.micro, LlamaOutput::losses_and_gradients,
                              options.micro.seq_len, options.recompute);
  plan.add(std::make_shared<LossSum>(), {train.values.losses, train.values.scalars}, "loss");
  plan.backward(train.values.losses);
  if (options.masters)
    for (const Storage& storage : train.table.storages)
      train.lows.push_back(plan.external(storage.name + ".low", {storage.spec.shape, DType::u16}, Role::parameter));

  for (const Parameter& parameter : train.table.parameters) {
    train.state_specs.push_back(train.optimizer->states(parameter));
    train.states.emplace_back();
    for (const StateSpec& state : train.state_specs.back())
      train.states.back().push_back(plan.external(parameter.name + "." + state.name, state.spec, Role::state));
  }
  UpdateRecorder recorder(train, options, communicator);
  if (options.update_in_backward)
    recorder.in_backward();
  else
    recorder.after_backward();
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
