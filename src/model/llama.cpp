#include "model/llama.h"

#include "base/rng.h"
#include "core/parallel.h"
#include "ops/attention.h"
#include "ops/classifier.h"
#include "ops/embedding.h"
#include "ops/last_row.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace kiln {
namespace {

AttentionShape attention_shape(const LlamaConfig& c, std::int64_t seq_len) {
  return {.heads = c.heads, .kv_heads = c.kv_heads, .head_dim = c.head_dim, .seq_len = seq_len};
}

/// Storages in the order in which record_llama binds them.
class TableBuilder {
 public:
  TableBuilder(ParameterTable& table, DType dtype) : table_(table), dtype_(dtype) {}

  struct Part {
    std::string name;
    std::int64_t rows;
  };
  /// A storage of [sum of rows, columns]; `low_rank` weights are the layers' linear ones.
  void matrix(const std::string& name, std::vector<Part> parts, std::int64_t columns, bool low_rank) {
    std::int64_t rows = 0;
    for (const Part& part : parts) {
      table_.parameters.push_back({.name = part.name,
                                   .shape = {part.rows, columns},
                                   .storage = table_.storages.size(),
                                   .row_begin = rows,
                                   .decay = true,
                                   .low_rank = low_rank});
      rows += part.rows;
    }
    table_.storages.push_back({name, {{rows, columns}, dtype_}});
  }
  void vector(const std::string& name, std::int64_t size) {
    table_.parameters.push_back({.name = name, .shape = {size}, .storage = table_.storages.size()});
    table_.storages.push_back({name, {{size}, dtype_}});
  }

 private:
  ParameterTable& table_;
  DType dtype_;
};

}  // namespace

Tensor ParameterTable::view(const Parameter& parameter, const Tensor& storage) const {
  return storage.rows(parameter.row_begin, parameter.shape[0]);
}

LlamaConfig padded(const LlamaConfig& config, const StorageLayout& layout) {
  LlamaConfig result = config;
  for (std::int64_t* size : {&result.ffn, &result.vocab})
    *size = (*size + layout.multiple - 1) / layout.multiple * layout.multiple;
  return result;
}

ParameterTable llama_parameters(const LlamaConfig& config, const StorageLayout& layout) {
  const LlamaConfig c = padded(config, layout);
  ParameterTable table;
  TableBuilder build(table, layout.dtype);
  const std::int64_t q_rows = c.heads * c.head_dim, kv_rows = c.kv_heads * c.head_dim;
  build.matrix("embedding", {{"model.embed_tokens.weight", c.vocab}}, c.hidden, false);
  for (std::int64_t l = 0; l < c.layers; ++l) {
    const std::string layer = fmt::format("model.layers.{}.", l), attention = layer + "self_attn.";
    build.vector(layer + "input_layernorm.weight", c.hidden);
    build.matrix(layer + "qkv",
                 {{attention + "q_proj.weight", q_rows},
                  {attention + "k_proj.weight", kv_rows},
                  {attention + "v_proj.weight", kv_rows}},
                 c.hidden, true);
    build.matrix(layer + "o", {{attention + "o_proj.weight", c.hidden}}, q_rows, true);
    build.vector(layer + "post_attention_layernorm.weight", c.hidden);
    build.matrix(layer + "gate_up", {{layer + "mlp.gate_proj.weight", c.ffn}, {layer + "mlp.up_proj.weight", c.ffn}},
                 c.hidden, true);
    build.matrix(layer + "down", {{layer + "mlp.down_proj.weight", c.hidden}}, c.ffn, true);
  }
  build.vector("model.norm.weight", c.hidden);
  if (!c.tied) build.matrix("head", {{"lm_head.weight", c.vocab}}, c.hidden, false);
  std::int64_t low_rank = 0;
  for (Parameter& parameter : table.parameters)
    if (parameter.low_rank) parameter.low_rank_index = low_rank++;
  for (Parameter& parameter : table.parameters)
    if (parameter.low_rank) parameter.low_rank_count = low_rank;
  if (layout.multiple > 1) {
    const ParameterTable own = llama_parameters(config, layout.dtype);
    for (std::size_t p = 0; p < own.parameters.size(); ++p) table.parameters[p].own = own.parameters[p].shape;
  }
  return table;
}

ModelWeights::ModelWeights(const LlamaConfig& config, DType dtype)
    : config_(config), table_(llama_parameters(config, dtype)) {
  config.validate();
  for (const Storage& storage : table_.storages) storages_.emplace_back(storage.spec, storage.name);
}

std::size_t ModelWeights::bytes() const {
  std::size_t total = 0;
  for (const Storage& storage : table_.storages) total += storage.spec.bytes();
  return total;
}

void initialise(const ModelWeights& weights, std::uint64_t seed) {
  for (std::size_t s = 0; s < weights.table().storages.size(); ++s) initialise(weights, s, seed);
}

void initialise(const ModelWeights& weights, std::size_t storage, std::uint64_t seed) {
  for (const Parameter& parameter : weights.table().parameters) {
    if (parameter.storage != storage) continue;
    const Tensor tensor = weights.view(parameter);
    const Philox random(seed, stream_of(parameter.name.c_str()));
    const double std = weights.config().init_std;
    const bool norm = parameter.shape.rank() == 1;
    visit_real(tensor.dtype(), [&]<typename T>() {
      T* out = tensor.as<T>();
      parallel_for(tensor.numel(), 4096, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
          out[i] = norm ? T(1) : static_cast<T>(std * random.normal(static_cast<std::uint64_t>(i)));
      });
    });
  }
}

std::string_view to_string(Recompute recompute) {
  switch (recompute) {
    case Recompute::none:
      return "none";
    case Recompute::norms:
      return "norms";
    case Recompute::block:
      return "block";
  }
  return "unknown";
}

Recompute Recomputation::of(std::int64_t layer) const {
  if (layer < layers || policy == Recompute::none) return policy;
  return policy == Recompute::block ? Recompute::norms : Recompute::none;
}

std::string to_string(const Recomputation& r) {
  if (r.layers == Recomputation::kAll) return std::string(to_string(r.policy));
  return fmt::format("{} of {} layers", to_string(r.policy), r.layers);
}

LlamaValues record_llama(Plan& plan, const LlamaConfig& c, const StorageLayout& layout, BatchShape batch,
                         LlamaOutput output, std::int64_t positions, Recomputation recompute) {
  const bool generating = output == LlamaOutput::last_logits;
  check(!generating || batch.sequences == 1, "generation records one sequence, found {}", batch.sequences);
  check(batch.seq_len <= positions, "sequence length {} exceeds the {} positions recorded", batch.seq_len, positions);
  LlamaValues v;
  for (const Storage& storage : llama_parameters(c, layout).storages)
    v.storages.push_back(plan.external(storage.name, storage.spec, Role::parameter));
  v.tokens = plan.external("tokens", {{batch.tokens()}, DType::i32}, Role::input);
  v.first = plan.external("first", {{1}, DType::i32}, Role::input);
  v.rope_table = plan.external("rope_table", {{positions, c.head_dim}, accumulator_of(layout.dtype)}, Role::input);

  const AttentionShape shape = attention_shape(c, batch.seq_len);
  const auto linear = std::make_shared<Linear>(layout.linear_gradients);
  const auto norm = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = c.rms_eps, .residual = false});
  const auto add_norm = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = c.rms_eps, .residual = true});
  const auto rope = std::make_shared<Rope>(shape, Rope::Direction::forward);

  std::size_t next = 0;
  auto weight = [&] { return v.storages[next++]; };
  ValueId residual = plan.add1(std::make_shared<Embedding>(), {v.tokens, weight()}, "embedding");
  ValueId delta;  // the last block's output, not yet added to the residual stream
  auto normalise = [&](const std::string& name) {
    const ValueId w = weight();
    if (!delta.valid()) return plan.add(norm, {residual, w}, name);
    const std::vector<ValueId> out = plan.add(add_norm, {residual, w, delta}, name);
    residual = out[2];
    return out;
  };
  for (std::int64_t l = 0; l < c.layers; ++l) {
    auto recomputed_from = [&, policy = recompute.of(l)](Recompute least, std::span<const ValueId> values) {
      if (policy < least) return;
      for (const ValueId value : values) plan.recompute(value);
    };
    const std::string at = fmt::format("layer{}.", l);
    const ValueId x = normalise(at + "norm1")[0];
    const ValueId qkv = plan.add1(linear, {x, weight()}, at + "qkv");
    plan.add(rope, {qkv, v.rope_table, v.first}, at + "rope");
    std::vector<ValueId> attended;
    if (generating) {
      const TensorSpec cache{{positions, c.kv_heads * c.head_dim}, layout.dtype};
      v.keys.push_back(plan.external(at + "keys", cache, Role::state));
      v.values.push_back(plan.external(at + "values", cache, Role::state));
      attended = plan.add(std::make_shared<CachedAttention>(shape), {qkv, v.keys.back(), v.values.back(), v.first},
                          at + "attention");
    } else {
      attended = plan.add(std::make_shared<Attention>(shape), {qkv}, at + "attention");
    }
    const ValueId projected = delta = plan.add1(linear, {attended[0], weight()}, at + "o");
    const std::vector<ValueId> y = normalise(at + "norm2");
    const ValueId gate_up = plan.add1(linear, {y[0], weight()}, at + "gate_up");
    const ValueId activated = plan.add1(std::make_shared<SwiGlu>(), {gate_up}, at + "swiglu");
    recomputed_from(Recompute::norms, {{x, y[0], activated}});
    recomputed_from(Recompute::block, {{qkv, projected, gate_up}});
    recomputed_from(Recompute::block, attended);
    recomputed_from(Recompute::block, std::span(y).subspan(1));
    delta = plan.add1(linear, {activated, weight()}, at + "down");
  }
  ValueId x = normalise("norm")[0];
  const ValueId head = c.tied ? v.storages.front() : weight();
  if (output == LlamaOutput::logits || generating) {
    if (generating) x = plan.add1(std::make_shared<LastRow>(), {x}, "last_row");
    v.logits = plan.add1(linear, {x, head}, "logits");
    plan.keep(v.logits);
    return v;
  }
  v.targets = plan.external("targets", {{batch.tokens()}, DType::i32}, Role::input);
  v.scalars = plan.external("scalars", scalars_spec(), Role::input);
  const bool gradient = output == LlamaOutput::losses_and_gradients;
  const bool pads = padded(c, layout).vocab != c.vocab;
  v.losses = plan.add(
      std::make_shared<Classifier>(Classifier::Options{.gradient = gradient, .valid_vocab = pads ? c.vocab : 0}),
      {x, head, v.targets, v.scalars}, "losses")[0];
  plan.keep(v.losses);
  return v;
}

}  // namespace kiln
