#include "train/step_bench.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>

#include "base/rng.h"
#include "graph/executor.h"
#include "train/device.h"
#include "train/device_memory.h"

namespace kiln {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Everything a step binds, on synthetic data.
struct Bench {
  Backend& backend;
  BatchShape batch;
  TrainPlan train;
  ModelWeights weights;
  OptimizerStates states;
  DeviceWeights device_weights;
  DeviceStates device_states;
  ModelInputs inputs;
  Executor executor;
  std::unique_ptr<Replay> replay;
  StepScalars scalars{};

  Bench(const StepBenchOptions& o, Backend& device, TrainPlan plan)
      : backend(device),
        batch(o.batch),
        train(std::move(plan)),
        weights(o.model, DType::f32),
        states(weights.table(), *train.optimizer),
        device_weights(weights, train.layout, !train.lows.empty(), backend, 1),
        device_states(train, states, backend),
        inputs(backend, o.model, device_weights.layout(), o.batch.tokens() * o.micro_batches, o.batch.seq_len),
        executor(train.plan, o.micro_batches, backend),
        replay(backend.replay(train.plan)) {
    const Philox random(1, stream_of("bench"));
    const auto count = static_cast<std::uint64_t>(inputs.tokens.view().numel());
    std::vector<std::int32_t> tokens, targets;
    for (std::uint64_t n = 0; n < count; ++n) {
      const auto vocab = static_cast<std::uint64_t>(o.model.vocab);
      tokens.push_back(static_cast<std::int32_t>(random.bits(n) % vocab));
      targets.push_back(static_cast<std::int32_t>(random.bits(n + 1) % vocab));
    }
    backend.upload(inputs.tokens.view(), tokens.data());
    backend.upload(inputs.targets.view(), targets.data());
    scalar(scalars, Scalar::lr) = 1e-3;
    scalar(scalars, Scalar::loss_scale) = 1.0 / static_cast<double>(count);
    bind_training(executor, train, device_weights, device_states);
    inputs.bind(executor, train.values);
  }

  void run_plan(int micro_batches) {
    for (int m = 0; m < micro_batches; ++m) {
      inputs.bind(executor, train.values, m * batch.tokens());
      executor.run(Phase::micro, m > 0);
    }
    executor.run(Phase::update, false);
  }
  void step(int micro_batches, bool replayed) {
    scalar(scalars, Scalar::step) += 1;
    inputs.set_scalars(backend, scalars);
    if (replayed)
      replay->run([&] { run_plan(micro_batches); });
    else
      run_plan(micro_batches);
  }
  /// Mean loss of the last step.
  double loss() {
    StepScalars result{};
    backend.download(result.data(), inputs.scalars.view());
    return scalar(result, Scalar::loss) * scalar(result, Scalar::loss_scale);
  }
};

/// The node's op, with the shapes of its first two inputs where rows are told apart by them.
std::string row_of(const Plan& plan, const Node& node, bool by_shape) {
  std::string name(node.op->name());
  if (!by_shape) return name;
  const std::vector<TensorSpec> in = plan.input_specs(node);
  for (std::size_t i = 0; i < std::min<std::size_t>(2, in.size()); ++i) name += " " + in[i].shape.str();
  return name;
}

/// Nodes that ran in one launch are one row, under the first one's name.
std::vector<OpTime> by_op(Bench& bench, int micro_batches, int steps, bool by_shape) {
  std::map<std::string, OpTime> total;
  const std::vector<Node>& nodes = bench.train.plan.nodes();
  for (const NodeGroup group : bench.executor.packing().groups) {
    const std::string name = row_of(bench.train.plan, nodes[group.first], by_shape);
    const double runs = nodes[group.first].phase == Phase::micro ? micro_batches : 1;
    OpTime& op = total[name];
    op.op = name;
    op.seconds += bench.executor.node_seconds()[group.first] / steps;
    for (std::size_t n = group.first; n < group.first + group.count; ++n) {
      const Cost cost = nodes[n].op->cost(bench.train.plan.input_specs(nodes[n]));
      op.flops += runs * cost.flops;
      op.bytes += runs * cost.bytes;
    }
  }
  std::vector<OpTime> list;
  for (auto& [name, op] : total) list.push_back(std::move(op));
  std::sort(list.begin(), list.end(), [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return list;
}

}  // namespace

GemmRate ceiling_of(Backend& backend) {
  return backend.is_host() ? gemm_ceiling() : GemmRate{"published", published_flops_per_s(backend)};
}

StepBench bench_step(const StepBenchOptions& o) {
  const std::unique_ptr<Backend> backend = open_device(o.device);
  return bench_step(o, *backend);
}

StepBench bench_step(const StepBenchOptions& o, Backend& backend) {
  const auto communicator = make_local_communicator();
  TrainPlan plan = record_train_plan(
      {.model = o.model,
       .optimizer = o.optimizer,
       .micro = o.batch,
       .micro_batches = o.micro_batches,
       .clip_norm = o.clip_norm,
       .layout = layout_for_codes(o.model, o.optimizer, training_layout(backend, o.gradients, o.micro_batches, 1)),
       .recompute = o.recompute,
       .masters = o.masters && !backend.is_host(),
       .update_in_backward = o.update_in_backward},
      *communicator);
  check_kernels(plan.plan, backend);
  Bench bench(o, backend, std::move(plan));
  for (int i = 0; i < 3; ++i) bench.step(o.micro_batches, true);
  backend.synchronize();
  const GemmRate before = ceiling_of(backend);
  std::vector<double> seconds;
  for (int i = 0; i < o.steps; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    bench.step(o.micro_batches, true);
    backend.synchronize();
    seconds.push_back(seconds_since(begin));
  }
  // By op in a second round, since marks between ops would slow the first.
  bench.executor.set_profiling(true);
  const int profiled = o.by_op ? std::min(o.steps, 3) : 0;
  for (int i = 0; i < profiled; ++i) bench.step(o.micro_batches, false);
  const GemmRate after = ceiling_of(backend);
  const GemmRate& ceiling = before.flops_per_s > after.flops_per_s ? before : after;
  std::sort(seconds.begin(), seconds.end());

  StepBench result;
  const auto tokens = static_cast<double>(o.batch.tokens() * o.micro_batches);
  result.device = backend.name();
  result.step_seconds = seconds[seconds.size() / 2];
  result.mean_seconds = std::accumulate(seconds.begin(), seconds.end(), 0.0) / static_cast<double>(seconds.size());
  result.slowest_seconds = seconds.back();
  result.tokens_per_s = tokens / result.step_seconds;
  result.step_flops = tokens * o.model.flops_per_token(o.batch.seq_len);
  result.gemm_flops_per_s = ceiling.flops_per_s;
  result.gemm_library = ceiling.library;
  result.device_bytes = backend.allocated_bytes();
  result.loss = bench.loss();
  if (o.by_op) result.ops = by_op(bench, o.micro_batches, profiled, o.by_shape);
  return result;
}

}  // namespace kiln
