#pragma once
#include <memory>
#include <vector>

#include "base/rng.h"
#include "train/device.h"
#include "train/device_memory.h"
#include "train/train_plan.h"

namespace kiln::test {

/// Grouped queries, heads of 32, and sizes that a GPU pads: ffn 200 to 256, 1000 words to 1024.
inline LlamaConfig small_model(bool tied) {
  LlamaConfig config;
  config.vocab = 1000;
  config.hidden = 128;
  config.ffn = 200;
  config.heads = 4;
  config.kv_heads = 2;
  config.layers = 2;
  config.head_dim = 32;
  config.tied = tied;
  config.init_std = 0.08;
  return config;
}

struct ModelRunOptions {
  LlamaConfig model = small_model(false);
  BatchShape batch{3, 80};  // a micro-batch
  int micro_batches = 1;
  bool masters = true;          // on a GPU
  bool half_gradients = false;  // likewise, of the layers' matrices
  std::uint64_t seed = 1;
  bool keep_gradients = false;
};

/// Training steps of a small model on one device, on random tokens that depend on the step alone. Weights start at
/// numbers that bf16 holds, so that every device starts from the same.
struct ModelRun {
  ModelRunOptions options;
  Backend& backend;
  std::unique_ptr<Communicator> communicator = make_local_communicator();
  TrainPlan train;
  ModelWeights weights;
  OptimizerStates states;
  DeviceWeights device_weights;
  DeviceStates device_states;
  ModelInputs inputs;
  Executor executor;
  std::unique_ptr<Replay> replay;
  StepScalars scalars{};

  ModelRun(const ModelRunOptions& o, Backend& device)
      : options(o),
        backend(device),
        train(record(o, device, *communicator)),
        weights(o.model, DType::f32),
        states(weights.table(), *train.optimizer),
        device_weights(weights, storage_layout(device), o.masters && !device.is_host(), device),
        device_states(train, states, device),
        inputs(device, o.model, device_weights.layout(), tokens_per_step(), o.batch.seq_len),
        executor(train.plan, o.micro_batches, device),
        replay(device.replay(train.plan)) {
    initialise(weights, o.seed);
    for (std::size_t s = 0; s < weights.table().storages.size(); ++s)
      for (float& w : weights.storage(s).span<float>()) w = to_float(to_bfloat16(w));
    device_weights.push();
    bind_training(executor, train, device_weights, device_states);
    inputs.bind(executor, train.values);
  }

  std::int64_t tokens_per_step() const { return options.batch.tokens() * options.micro_batches; }

  /// Tokens, targets (some of them ignored) and scalars of a step, from 1 on.
  void load(int step) {
    const Philox random(static_cast<std::uint64_t>(step), stream_of("text"));
    std::vector<std::int32_t> tokens, targets;
    for (std::int64_t i = 0; i < tokens_per_step(); ++i) {
      const double u = random.uniform(static_cast<std::uint64_t>(i)),
                   v = random.uniform((1u << 20) + static_cast<std::uint64_t>(i));
      tokens.push_back(static_cast<std::int32_t>(u * u * static_cast<double>(options.model.vocab)));
      targets.push_back(i % 11 == 4 ? -100
                                    : static_cast<std::int32_t>(v * v * static_cast<double>(options.model.vocab)));
    }
    backend.upload(inputs.tokens.view(), tokens.data());
    backend.upload(inputs.targets.view(), targets.data());
    scalars = {};
    scalar(scalars, Scalar::step) = step;
    scalar(scalars, Scalar::lr) = 3e-3;
    counted = static_cast<double>(std::ranges::count_if(targets, [](std::int32_t t) { return t >= 0; }));
    scalar(scalars, Scalar::loss_scale) = 1 / counted;
    inputs.set_scalars(backend, scalars);
  }
  void run_micro_batches() {
    for (int m = 0; m < options.micro_batches; ++m) {
      inputs.bind(executor, train.values, m * options.batch.tokens());
      executor.run(Phase::micro, m > 0);
    }
  }
  /// A whole step; its mean loss.
  double step(int number, bool replayed) {
    load(number);
    const auto body = [this] {
      run_micro_batches();
      executor.run(Phase::update, false);
    };
    if (replayed)
      replay->run(body);
    else
      body();
    return loss();
  }
  double loss() {
    backend.download(scalars.data(), inputs.scalars.view());
    return scalar(scalars, Scalar::loss) / counted;
  }

  /// Everything that a step changes, byte for byte.
  std::vector<std::byte> bytes() {
    std::vector<std::byte> all;
    auto append = [&](const Tensor& tensor) {
      const std::size_t at = all.size();
      all.resize(at + tensor.bytes());
      backend.download(all.data() + at, tensor);
    };
    for (std::size_t s = 0; s < device_weights.count(); ++s) append(device_weights.storage(s));
    for (std::size_t s = 0; s < train.lows.size(); ++s) append(device_weights.low(s));
    for (std::size_t p = 0; p < train.states.size(); ++p)
      for (std::size_t s = 0; s < train.states[p].size(); ++s) append(device_states.tensor(p, s));
    append(inputs.scalars.view());
    return all;
  }

 private:
  double counted = 1;

  static TrainPlan record(const ModelRunOptions& o, Backend& device, Communicator& communicator) {
    StorageLayout layout = storage_layout(device);
    if (o.half_gradients && !device.is_host()) layout.linear_gradients = DType::bf16;
    TrainPlan plan = record_train_plan({.model = o.model,
                                        .optimizer = {.weight_decay = 0.01, .seed = o.seed},
                                        .micro = o.batch,
                                        .micro_batches = o.micro_batches,
                                        .clip_norm = 1.0,
                                        .layout = layout,
                                        .masters = o.masters && !device.is_host()},
                                       communicator);
    if (o.keep_gradients)
      for (const ValueId storage : plan.values.storages) plan.plan.keep(plan.plan.gradient(storage));
    return plan;
  }
};

}  // namespace kiln::test
