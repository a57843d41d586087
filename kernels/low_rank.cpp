#include "kernels/low_rank.h"

#include <optional>

#include "kernels/low_rank_exact.h"
#include "kernels/low_rank_group.h"
#include "optim/low_rank_adam.h"

namespace kiln::cuda {
namespace {

constexpr int kPasses = 2, kColdPasses = 4;

LowRankGroup group_of(const Nodes& nodes) {
  LowRankGroup group;
  for (std::size_t i = 0; i < nodes.group.count; ++i) {
    const auto& op = nodes.op<LowRankAdamUpdate>(i);
    group.add(low_rank_geometry(op.parameter(), op.options().rank));
  }
  return group;
}

/// An exact refresh reads the step on the host.
bool refreshes_exactly(const Nodes& nodes) {
  return nodes.op<LowRankAdamUpdate>().options().projector == ProjectorKind::svd;
}

/// Every matrix's own, and one refresh's.
std::size_t workspace(const Nodes& nodes) {
  const LowRankGroup group = group_of(nodes);
  const LowRankGeometry largest = group.largest();
  if (refreshes_exactly(nodes))
    return group.workspace_bytes() +
           ExactRefresh::workspace_bytes(largest, nodes.op<LowRankAdamUpdate>().options().rotate);
  return group.workspace_bytes() + refresh_scratch_bytes(largest.vectors(), largest.side(), largest.rank);
}

LowRankStep step_of(const LowRankAdamUpdate::Options& o) {
  const bool residual = o.residual == Residual::scaled, paper = o.variant == FiraVariant::paper;
  const double k = paper ? 1.0 : o.alpha;
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .back = o.alpha,
          .outside = residual ? (paper ? o.alpha : 1.0) : 0.0,
          .inside = residual ? 1.0 : 0.0,
          .inside_square = 2 * k - k * k,
          .gamma = o.gamma,
          .residual = residual,
          .rotate = o.rotate,
          .rotation_step = kRotationStep,
          .seed = o.seed};
}

/// All neighbouring low-rank updates of a plan, in a handful of launches; new bases of `svd` in some of their own.
class LowRankKernel final : public Kernel {
 public:
  LowRankKernel(const Nodes& nodes, Context& context) : group_(group_of(nodes)) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) ops_.push_back(&nodes.op<LowRankAdamUpdate>(i));
    if (refreshes_exactly(nodes)) exact_.emplace(context);
    group_.prepare(
        nodes, context,
        {LowRankWork::basis, LowRankWork::project, LowRankWork::moments, LowRankWork::direction, LowRankWork::apply},
        ops_.front()->options().states, ops_.front()->options().projector_states);
  }

  void bind(std::span<const KernelArgs> nodes) override {
    auto* memory = static_cast<std::byte*>(nodes.front().workspace.data);
    std::vector<LowRankMatrix> matrices;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      const UpdateArgs a = ops_[i]->arguments(nodes[i]);
      LowRankMatrix t = group_.matrix(i, a, ops_[i]->parameter(), memory);
      std::span<const Tensor> states = a.states;
      t.projector = take_state(states, ops_[i]->parameter(), "projector");
      const bool whole = ops_[i]->options().projector_states == StatePrecision::fp32;
      t.q = whole ? static_cast<float*>(t.projector.data) : t.projected;
      t.moment = take_state(states, ops_[i]->parameter(), "exp_avg");
      t.square = take_state(states, ops_[i]->parameter(), "exp_avg_sq");
      t.limiter = states.empty() ? nullptr : states[0].as<float>();
      t.refresh_offset = static_cast<std::int32_t>(ops_[i]->schedule().offset);
      matrices.push_back(t);
    }
    const LowRankGeometry largest = group_.largest();
    group_.upload(matrices);
    if (exact_)
      exact_->bind(memory, largest, ops_.front()->options().rotate, std::move(matrices));
    else
      scratch_ = cut_refresh_scratch(memory, largest.vectors(), largest.side(), largest.rank);
  }

  void run(std::span<const KernelArgs> nodes) override {
    const LowRankAdamUpdate::Options& o = ops_.front()->options();
    LowRankTable table = group_.table();
    table.scalars = nodes.front().in[2].as<double>();
    table.step = step_of(o);
    if (exact_)
      exact_->run(table, o.refresh);
    else
      low_rank_refresh(table, scratch_,
                       {.passes = kPasses, .cold_passes = kColdPasses, .every = static_cast<int>(o.refresh)});
    low_rank_basis(group_.with(LowRankWork::basis, table));
    low_rank_project(group_.with(LowRankWork::project, table));
    low_rank_moments(group_.with(LowRankWork::moments, table));
    if (table.step.residual) low_rank_limit(table);
    low_rank_direction(group_.with(LowRankWork::direction, table));
    low_rank_apply(group_.with(LowRankWork::apply, table));
  }

 private:
  LowRankGroup group_;
  std::vector<const LowRankAdamUpdate*> ops_;
  RefreshScratch scratch_{};
  std::optional<ExactRefresh> exact_;
};

std::unique_ptr<Kernel> make_low_rank(const Nodes& nodes, Context& context) {
  return std::make_unique<LowRankKernel>(nodes, context);
}

void check_low_rank(const Nodes& nodes) { require_low_rank(nodes, nodes.op<LowRankAdamUpdate>().options().rank); }

OpEntry entry(std::string_view name) {
  return {.name = name,
          .workspace_bytes = workspace,
          .make = make_low_rank,
          .check = check_low_rank,
          .any_count = true,
          .blocks_host = refreshes_exactly};
}

}  // namespace

OpEntry galore_entry() { return entry("galore_update"); }
OpEntry fira_entry() { return entry("fira_update"); }
OpEntry fira_plus_entry() { return entry("fira_plus_update"); }

}  // namespace kiln::cuda
