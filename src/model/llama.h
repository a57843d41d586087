#pragma once
#include <limits>
#include <string>
#include <vector>

#include "graph/parameter.h"
#include "model/llama_config.h"

namespace kiln {

/// One tensor of weights as the kernels read it; it may hold several parameters, row block after row block.
struct Storage {
  std::string name;
  TensorSpec spec;
};

/// Every weight of a model: storages as kernels read them, parameters as optimizers and checkpoints see them.
/// Parameters are listed in the order of the layers, embedding first; a tied head does not appear.
struct ParameterTable {
  std::vector<Storage> storages;
  std::vector<Parameter> parameters;

  /// The part of its storage that a parameter is.
  Tensor view(const Parameter& parameter, const Tensor& storage) const;
};

/// How a device stores weights: their dtype, and the multiple that ffn and vocabulary are padded to with zeros where
/// odd sizes would slow its GEMMs. Padding stays zero through training and never reaches a checkpoint.
struct StorageLayout {
  StorageLayout(DType type) : StorageLayout(type, 1) {}  // unpadded; implicit, since a dtype says all there is
  StorageLayout(DType type, std::int64_t padding) : dtype(type), multiple(padding) {}
  DType dtype;
  std::int64_t multiple;
  DType linear_gradients = DType::f32;  // of the layers' bf16 matrices: f32 or bf16
};
/// The sizes that a layout stores.
LlamaConfig padded(const LlamaConfig& config, const StorageLayout& layout);
/// Storages and parameters with the padded sizes; the list is the same for every layout.
ParameterTable llama_parameters(const LlamaConfig& config, const StorageLayout& layout);

/// Memory of all storages.
class ModelWeights {
 public:
  /// Zeroed.
  ModelWeights(const LlamaConfig& config, DType dtype);
  const LlamaConfig& config() const { return config_; }
  const ParameterTable& table() const { return table_; }
  Tensor storage(std::size_t index) const { return storages_[index].view(); }
  Tensor view(const Parameter& parameter) const { return table_.view(parameter, storage(parameter.storage)); }
  std::size_t bytes() const;
  /// Gives the memory of a storage back until it is written again (Buffer::zero).
  void zero(std::size_t storage) const { storages_[storage].zero(); }

 private:
  LlamaConfig config_;
  ParameterTable table_;
  std::vector<HostTensor> storages_;
};

/// Linear weights and embedding ~ N(0, init_std), norms 1. Each draw is a function of (seed, name, index), so it does
/// not depend on the order of creation, the number of threads or the layout of storages.
void initialise(const ModelWeights& weights, std::uint64_t seed);
void initialise(const ModelWeights& weights, std::size_t storage, std::uint64_t seed);

/// The shape at which a plan is recorded.
struct BatchShape {
  std::int64_t sequences = 1, seq_len = 1;
  std::int64_t tokens() const { return sequences * seq_len; }
};

/// What of a layer the forward pass does not keep and the backward pass computes again, bit for bit; each includes the
/// one before. Ordered by cost.
enum class Recompute {
  none,
  norms,  // what the norms and SwiGLU put out: elementwise work, 2C + F of a token's activations
  block,  // all but the layer's residual input and its 1/rms: most of another forward pass
};
inline constexpr Recompute kRecomputes[] = {Recompute::none, Recompute::norms, Recompute::block};
std::string_view to_string(Recompute recompute);

/// How the layers of a model recompute: the first `layers` so, the others by the policy before it. The first, since
/// what is computed again for them takes the place of what later layers kept, whose gradients are done by then.
struct Recomputation {
  static constexpr std::int64_t kAll = std::numeric_limits<std::int64_t>::max();
  Recompute policy = Recompute::none;
  std::int64_t layers = kAll;

  Recomputation() = default;
  Recomputation(Recompute like, std::int64_t first = kAll) : policy(like), layers(first) {}
  Recompute of(std::int64_t layer) const;
  bool operator==(const Recomputation&) const = default;
};
/// "none", "norms", "block", or "block of 7 layers".
std::string to_string(const Recomputation& recomputation);

enum class LlamaOutput {
  losses,                // per token, forward only
  losses_and_gradients,  // call plan.backward(losses) next
  logits,                // [N,V]
  last_logits,           // [1,V] of the last row, with a KV cache: generation
};

/// Values of a recorded model that the caller binds or reads.
struct LlamaValues {
  std::vector<ValueId> storages;  // as in the parameter table
  ValueId tokens, targets;        // [N] i32; targets only for losses
  ValueId first;                  // [1] i32: position of the first row
  ValueId rope_table;             // [P,D]
  ValueId scalars;
  ValueId losses, logits;
  std::vector<ValueId> keys, values;  // per layer [P,Hkv D], with LlamaOutput::last_logits
};

/// Records one forward pass into `plan`: embedding; per layer norm, fused QKV, RoPE, attention, output projection,
/// residual + norm, fused gate/up, SwiGLU, down projection; final norm and head.
/// `positions` is the length of the RoPE table and of the KV cache. Logits have the padded width. `recompute` says what
/// plan.backward() will compute again of each layer.
LlamaValues record_llama(Plan& plan, const LlamaConfig& config, const StorageLayout& layout, BatchShape batch,
                         LlamaOutput output, std::int64_t positions, Recomputation recompute = {});

}  // namespace kiln
