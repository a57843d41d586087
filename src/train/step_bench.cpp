#include "train/step_bench.h"

#include <algorithm>
#include <chrono>
#include <map>

#include "base/rng.h"
#include "graph/executor.h"
#include "ops/rope.h"

namespace kiln {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Everything a step binds, on synthetic data.
struct Bench {
  TrainPlan train;
  ModelWeights weights;
  OptimizerStates states;
  HostTensor tokens, targets, first, rope_table, scalars;
  Executor executor;

  Bench(const StepBenchOptions& o, TrainPlan plan)
      : train(std::move(plan)),
        weights(o.model, DType::f32),
        states(train),
        tokens({{o.batch.tokens()}, DType::i32}),
        targets({{o.batch.tokens()}, DType::i32}),
        first({{1}, DType::i32}),
        rope_table({{o.batch.seq_len, o.model.head_dim}, DType::f32}),
        scalars(scalars_spec()),
        executor(train.plan, 1) {
    initialise(weights, 1);
    fill_rope_table(rope_table.view(), o.model.rope_base);
    const Philox random(1, stream_of("bench"));
    for (std::int64_t i = 0; i < o.batch.tokens(); ++i) {
      const auto n = static_cast<std::uint64_t>(i), vocab = static_cast<std::uint64_t>(o.model.vocab);
      tokens.span<std::int32_t>()[n] = static_cast<std::int32_t>(random.bits(n) % vocab);
      targets.span<std::int32_t>()[n] = static_cast<std::int32_t>(random.bits(n + 1) % vocab);
    }
    scalar(scalars.view(), Scalar::lr) = 1e-3;
    scalar(scalars.view(), Scalar::loss_scale) = 1.0 / static_cast<double>(o.batch.tokens());
    for (std::size_t s = 0; s < train.values.storages.size(); ++s)
      executor.bind(train.values.storages[s], weights.storage(s));
    for (std::size_t p = 0; p < train.states.size(); ++p)
      for (std::size_t s = 0; s < train.states[p].size(); ++s) executor.bind(train.states[p][s], states.tensor(p, s));
    executor.bind(train.values.tokens, tokens.view());
    executor.bind(train.values.targets, targets.view());
    executor.bind(train.values.first, first.view());
    executor.bind(train.values.rope_table, rope_table.view());
    executor.bind(train.values.scalars, scalars.view());
  }

  void step() {
    scalar(scalars.view(), Scalar::step) += 1;
    executor.run(Phase::micro, false);
    executor.run(Phase::update, false);
  }
};

std::vector<OpTime> by_op(const Bench& bench, int steps) {
  std::map<std::string, OpTime> total;
  const std::vector<Node>& nodes = bench.train.plan.nodes();
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const std::string name(nodes[n].op->name());
    const Cost cost = nodes[n].op->cost(bench.train.plan.input_specs(nodes[n]));
    OpTime& op = total[name];
    op.op = name;
    op.seconds += bench.executor.node_seconds()[n] / steps;
    op.flops += cost.flops;
    op.bytes += cost.bytes;
  }
  std::vector<OpTime> list;
  for (auto& [name, op] : total) list.push_back(std::move(op));
  std::sort(list.begin(), list.end(), [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return list;
}

}  // namespace

StepBench bench_step(const StepBenchOptions& o) {
  const auto communicator = make_local_communicator();
  Bench bench(o, record_train_plan({.model = o.model, .optimizer = o.optimizer, .micro = o.batch}, *communicator));
  for (int i = 0; i < 2; ++i) bench.step();
  const GemmRate before = gemm_ceiling();
  bench.executor.set_profiling(true);
  std::vector<double> seconds;
  for (int i = 0; i < o.steps; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    bench.step();
    seconds.push_back(seconds_since(begin));
  }
  const GemmRate after = gemm_ceiling();
  const GemmRate& ceiling = before.flops_per_s > after.flops_per_s ? before : after;
  std::sort(seconds.begin(), seconds.end());

  StepBench result;
  const auto tokens = static_cast<double>(o.batch.tokens());
  result.step_seconds = seconds[seconds.size() / 2];
  result.tokens_per_s = tokens / result.step_seconds;
  result.step_flops = tokens * o.model.flops_per_token(o.batch.seq_len);
  result.gemm_flops_per_s = ceiling.flops_per_s;
  result.gemm_library = ceiling.library;
  for (const float loss : bench.executor.tensor(bench.train.values.losses).span<float>())
    result.loss += static_cast<double>(loss) / tokens;
  result.ops = by_op(bench, o.steps);
  return result;
}

}  // namespace kiln
