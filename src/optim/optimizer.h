#pragma once
#include <memory>
#include <string>
#include <vector>

#include "graph/op.h"
#include "graph/parameter.h"

namespace kiln {

enum class OptimizerKind { adamw, adam8bit, galore, fira, fira_plus, apollo, apollo_mini, muon, lora, relora };
enum class FiraVariant { paper, reference };
enum class ProjectorKind { power, svd };
/// How a state is stored; what a step computes from it is f32.
enum class StatePrecision { fp32, bf16, int8 };
/// What an orthogonalised step is multiplied by (optim/muon.h).
enum class MuonScale { match_rms, spectral };

struct OptimizerOptions {
  OptimizerKind kind = OptimizerKind::adamw;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0;
  std::int64_t rank = 128;     // low-rank members
  double alpha = 0.25;         // scale of the low-rank update; each member's header says how it enters
  std::int64_t refresh = 200;  // steps between two projector refreshes
  ProjectorKind projector = ProjectorKind::power;
  FiraVariant variant = FiraVariant::paper;
  double gamma = 1.01;                                     // norm-growth limiter
  StatePrecision states = StatePrecision::fp32;            // moments
  StatePrecision projector_states = StatePrecision::fp32;  // the basis of the subspace
  bool stagger = true;     // refreshes of the matrices spread over the interval (optim/projector.h)
  double momentum = 0.95;  // Muon
  MuonScale muon_scale = MuonScale::match_rms;
  std::int64_t rewarm = 50;  // ReLoRA: steps of the warm-up after a restart
  std::uint64_t seed = 1;    // cold start of the projector, stochastic rounding
};

/// One state tensor of one parameter: allocated, counted, saved, loaded and broadcast by the same list.
struct StateSpec {
  std::string name;  // "exp_avg", "exp_avg_sq", "projector", "limiter_norm"
  TensorSpec spec;
};

/// What an update kernel sees of one parameter. All tensors are mutable; `w`, `g` and states are the parameter's own
/// (already cut out of a fused storage). Scalars: step (from 1), lr, clip_scale (the factor on g).
struct UpdateArgs {
  Tensor w, g;
  Tensor low;  // with bf16 weights split from f32 masters, the low halves (ops of a device); else empty
  std::span<const Tensor> states;  // in the order of Optimizer::states
  Tensor scalars;
  Tensor workspace;
};

/// The node that updates one parameter in place. Inputs of the op: storage of w, storage of g (f32 or bf16 for bf16
/// weights), scalars, states..., and with bf16 weights the storage of the masters' low halves [as w] u16 when masters
/// are kept. A step whose gradient norm or loss is not finite changes nothing.
class UpdateOp : public Op {
 public:
  explicit UpdateOp(Parameter parameter) : parameter_(std::move(parameter)) {}
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const final;
  std::vector<int> mutates() const final;
  void run_cpu(const KernelArgs& args) const final;
  const Parameter& parameter() const { return parameter_; }
  /// The node's tensors, cut out of their storages.
  UpdateArgs arguments(const KernelArgs& args) const;

 protected:
  /// W and its states after one step; the gradient may be used as scratch.
  virtual void update(const UpdateArgs& args) const = 0;
  /// The states it is given, in order; with f64 weights, those of f32 are f64.
  virtual std::vector<StateSpec> state_specs() const = 0;

 private:
  Parameter parameter_;
};

/// A member of the family: which states a parameter has, and the op that updates it.
class Optimizer {
 public:
  virtual ~Optimizer() = default;
  virtual std::string_view name() const = 0;
  virtual std::vector<StateSpec> states(const Parameter& parameter) const = 0;
  virtual OpPtr update_op(const Parameter& parameter) const = 0;

  /// Bytes of all states of one parameter.
  std::size_t state_bytes(const Parameter& parameter) const;
};

/// The factory: one line a member. A usage Error for options out of range.
std::unique_ptr<Optimizer> make_optimizer(const OptimizerOptions& options);

/// What a member takes where a configuration says nothing: the published settings.
struct OptimizerDefaults {
  double eps = 1e-8, alpha = 0.25;
  StatePrecision states = StatePrecision::fp32;
};
OptimizerDefaults optimizer_defaults(OptimizerKind kind);
/// Whether `rank` is a choice of the member.
bool has_rank(OptimizerKind kind);

/// Every member of the family.
std::vector<OptimizerKind> optimizer_kinds();
OptimizerKind parse_optimizer_kind(std::string_view name);
std::string_view to_string(OptimizerKind kind);
std::string_view to_string(StatePrecision precision);

}  // namespace kiln
