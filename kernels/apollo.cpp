#include "optim/apollo.h"

#include <cmath>

#include "kernels/low_rank_group.h"
#include "kernels/low_rank_one.h"

namespace kiln::cuda {
namespace {

LowRankGroup group_of(const Nodes& nodes) {
  LowRankGroup group;
  for (std::size_t i = 0; i < nodes.group.count; ++i) {
    const auto& op = nodes.op<ApolloUpdate>(i);
    group.add(low_rank_geometry(op.parameter(), op.options().rank));
  }
  return group;
}

std::size_t workspace(const Nodes& nodes) { return group_of(nodes).workspace_bytes(); }

/// The residual is the gradient itself, and nothing comes back from the subspace.
LowRankStep step_of(const ApolloUpdate::Options& o) {
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .back = 0,
          .outside = std::sqrt(o.alpha),
          .inside = 0,
          .inside_square = 0,
          .gamma = o.gamma,
          .residual = true,
          .rotate = false,
          .rotation_step = 0,
          .seed = o.seed};
}

/// All neighbouring APOLLO or APOLLO-Mini updates of a plan, in five launches.
class ApolloKernel final : public Kernel {
 public:
  ApolloKernel(const Nodes& nodes, Context& context) : group_(group_of(nodes)) {
    for (std::size_t i = 0; i < nodes.group.count; ++i) ops_.push_back(&nodes.op<ApolloUpdate>(i));
    group_.prepare(nodes, context, {LowRankWork::basis, LowRankWork::project, LowRankWork::moments, LowRankWork::scale},
                   ops_.front()->options().states);
  }

  void bind(std::span<const KernelArgs> nodes) override {
    auto* memory = static_cast<std::byte*>(nodes.front().workspace.data);
    std::vector<LowRankMatrix> matrices;
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      const UpdateArgs a = ops_[i]->arguments(nodes[i]);
      LowRankMatrix t = group_.matrix(i, a, ops_[i]->parameter(), memory);
      std::span<const Tensor> states = a.states;
      t.moment = take_state(states, ops_[i]->parameter(), "exp_avg");
      t.square = take_state(states, ops_[i]->parameter(), "exp_avg_sq");
      t.limiter = states[0].as<float>();
      t.refresh_offset = static_cast<std::int32_t>(ops_[i]->schedule().offset);
      matrices.push_back(t);
    }
    group_.upload(matrices);
  }

  void run(std::span<const KernelArgs> nodes) override {
    const ApolloUpdate::Options& o = ops_.front()->options();
    LowRankTable table = group_.table();
    table.scalars = nodes.front().in[2].as<double>();
    table.step = step_of(o);
    const LowRankTable basis = group_.with(LowRankWork::basis, table),
                       project = group_.with(LowRankWork::project, table);
    if (o.factor == ApolloFactor::tensor) {
      low_rank_one_basis(basis, static_cast<int>(o.refresh));
      low_rank_one_project(project);
      low_rank_one_moments(table);
    } else {
      low_rank_random_basis(basis, static_cast<int>(o.refresh));
      low_rank_project(project);
      low_rank_moments(group_.with(LowRankWork::moments, table));
    }
    low_rank_limit(table);
    low_rank_scale(group_.with(LowRankWork::scale, table));
  }

 private:
  LowRankGroup group_;
  std::vector<const ApolloUpdate*> ops_;
};

std::unique_ptr<Kernel> make_apollo(const Nodes& nodes, Context& context) {
  return std::make_unique<ApolloKernel>(nodes, context);
}

void check_apollo(const Nodes& nodes) {
  const ApolloUpdate::Options& o = nodes.op<ApolloUpdate>().options();
  if (o.factor == ApolloFactor::vector) return require_low_rank(nodes, o.rank);
  require(o.rank == 1, "apollo_mini: rank {}, expected 1", o.rank);
  require_matrices(nodes);
}

}  // namespace

OpEntry apollo_entry() {
  return {.name = "apollo_update",
          .workspace_bytes = workspace,
          .make = make_apollo,
          .check = check_apollo,
          .any_count = true};
}

}  // namespace kiln::cuda
