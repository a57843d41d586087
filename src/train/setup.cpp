#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "train/trainer.h"

namespace kiln {

LlamaConfig model_config(const Config& config) {
  const Config::Model& m = config.model;
  LlamaConfig model;
  if (!m.preset.empty()) {
    model = llama_preset(m.preset);
  } else {
    check(m.hidden && m.ffn && m.heads && m.layers,
          "model: without a preset, hidden, ffn, heads and layers must all be set");
    model.kv_heads = *m.heads;
  }
  model.hidden = m.hidden.value_or(model.hidden);
  model.ffn = m.ffn.value_or(model.ffn);
  if (m.heads) model.heads = model.kv_heads = *m.heads;
  model.kv_heads = m.kv_heads.value_or(model.kv_heads);
  model.layers = m.layers.value_or(model.layers);
  model.vocab = m.vocab.value_or(model.vocab);
  model.tied = m.tied.value_or(model.tied);
  model.rope_base = m.rope_base.value_or(model.rope_base);
  model.rms_eps = m.rms_eps.value_or(model.rms_eps);
  model.init_std = m.init_std.value_or(model.init_std);
  model.max_positions = m.max_positions.value_or(std::max(model.max_positions, config.data.seq_len));
  check(model.heads >= 1 && model.hidden % model.heads == 0, "model.hidden: {}, expected a multiple of model.heads {}",
        model.hidden, model.heads);
  model.head_dim = model.hidden / model.heads;
  return model;
}

OptimizerOptions optimizer_options(const Config& config) {
  const Config::Optimizer& o = config.optimizer;
  const OptimizerDefaults defaults = optimizer_defaults(o.kind);
  return {.kind = o.kind,
          .beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps.value_or(defaults.eps),
          .weight_decay = o.weight_decay,
          .rank = o.rank,
          .alpha = o.alpha.value_or(defaults.alpha),
          .refresh = o.refresh,
          .projector = o.projector,
          .variant = o.variant,
          .gamma = o.gamma,
          .states = o.states.value_or(defaults.states),
          .projector_states = o.projector_states,
          .stagger = o.stagger.value_or(o.projector == ProjectorKind::power),
          .momentum = o.momentum,
          .muon_scale = o.muon_scale,
          .rewarm = o.rewarm,
          .seed = config.run.seed};
}

Config with_optimizer(Config config, OptimizerKind kind) {
  if (kind == config.optimizer.kind) return config;
  if (optimizer_defaults(kind).alpha != optimizer_defaults(config.optimizer.kind).alpha) config.optimizer.alpha.reset();
  if (kind == OptimizerKind::adam8bit || config.optimizer.kind == OptimizerKind::adam8bit)
    config.optimizer.states.reset();
  config.optimizer.kind = kind;
  return config;
}

BatchShape micro_batch(const Config& config, int ranks, const Backend& backend) {
  // The CPU's keeps a layer's activations near the caches. A GPU's amortises what is done once a micro-batch: reading
  // the weights and adding to their gradients. Measured on an H100 at T 256: 60M (C 512) is fastest at 131,072 tokens,
  // 350M (1024) does not gain above 32,768, nor 1B (2048) above 16,384.
  const std::int64_t most = backend.is_host() ? 2048 : (std::int64_t{1} << 26) / model_config(config).hidden;
  const std::int64_t sequences = config.batch.sequences;
  check(sequences % ranks == 0, "batch.sequences: {} do not divide over {} ranks; make it a multiple of {}", sequences,
        ranks, ranks);
  const std::int64_t share = sequences / ranks;
  std::int64_t micro = 1;
  if (config.batch.micro) {
    micro = *config.batch.micro;
    check(share % micro == 0, "batch.micro: {} does not divide the {} sequences of a rank", micro, share);
  } else if (needs_one_micro_batch(config)) {
    micro = share;
  } else {
    for (std::int64_t m = 1; m <= share; ++m)
      if (share % m == 0 && (m == 1 || m * config.data.seq_len <= most)) micro = m;
  }
  return {.sequences = micro, .seq_len = config.data.seq_len};
}

int rank_threads(const Config& config) {
  if (config.run.threads) return static_cast<int>(*config.run.threads);
  if (const char* text = std::getenv("OMP_NUM_THREADS"); text != nullptr && std::atoi(text) > 0) return std::atoi(text);
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  const int machine = static_cast<int>(std::thread::hardware_concurrency());
  const int mine = ::sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : machine;
  // A launcher that binds ranks has already shared the processors out.
  return mine < machine ? mine : std::max(1, mine / launch_info().local_size);
}

}  // namespace kiln
