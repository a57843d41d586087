#include "optim/apollo.h"

#include <cmath>

#include "base/rng.h"
#include "core/parallel.h"

namespace kiln {
namespace {

Moments moments_of(const Parameter& parameter, const ApolloUpdate::Options& o) {
  return Moments(parameter, LowRankShape(parameter.shape, o.rank).moment_shape(),
                 {.beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .precision = o.states, .seed = o.seed});
}

}  // namespace

/// Cut from the node's workspace.
template <typename T>
struct ApolloUpdate::Scratch {
  double *r2, *n2, *g2;      // squared norms of the vectors
  T *projected, *direction;  // R, then N [vectors, r]
  T *projection, *phi;       // P [short, r]; [vectors]

  Scratch(void* workspace, const LowRankShape& at) {
    r2 = static_cast<double*>(workspace);
    n2 = r2 + at.vectors();
    g2 = n2 + at.vectors();
    projected = reinterpret_cast<T*>(g2 + at.vectors());
    direction = projected + at.vectors() * at.rank;
    projection = direction + at.vectors() * at.rank;
    phi = projection + at.short_side() * at.rank;
  }
  static std::size_t bytes(const LowRankShape& at) {
    const std::int64_t elements = (2 * at.vectors() + at.short_side()) * at.rank + at.vectors();
    return 3 * sizeof(double) * static_cast<std::size_t>(at.vectors()) + sizeof(T) * static_cast<std::size_t>(elements);
  }
};

ApolloUpdate::ApolloUpdate(Parameter parameter, const Options& options)
    : UpdateOp(std::move(parameter)),
      options_(options),
      at_(this->parameter().shape, options.rank),
      moments_(moments_of(this->parameter(), options)) {
  check_matrix(this->parameter());
}

std::vector<StateSpec> ApolloUpdate::states(const Parameter& parameter, const Options& options) {
  std::vector<StateSpec> list;
  moments_of(parameter, options).append_specs(list);
  list.push_back({"limiter_norm", {{1}, DType::f32}});
  return list;
}

std::size_t ApolloUpdate::workspace_bytes(std::span<const TensorSpec> in) const {
  return in[0].dtype == DType::f64 ? Scratch<double>::bytes(at_) : Scratch<float>::bytes(at_);
}

Cost ApolloUpdate::cost(std::span<const TensorSpec>) const {
  const double elements = static_cast<double>(at_.m * at_.n);
  return {(2.0 * static_cast<double>(at_.rank) + 4.0) * elements, 20.0 * elements};
}

std::uint64_t ApolloUpdate::projection_stream(std::int64_t step) const {
  return stream_of(parameter().name.c_str()) + static_cast<std::uint64_t>(refresh_epoch(schedule(), step));
}

void ApolloUpdate::update(const UpdateArgs& args) const {
  visit_real(args.w.dtype(), [&]<typename T>() { update_as<T>(args); });
}

template <typename T>
void ApolloUpdate::make_phi(const UpdateArgs& args, const Scratch<T>& scratch, double clip, T& previous) const {
  const std::int64_t vectors = at_.vectors();
  squared_norms_of_rows(vectors, at_.rank, scratch.projected, scratch.r2);
  squared_norms_of_rows(vectors, at_.rank, scratch.direction, scratch.n2);
  squared_norms_of_matrix(at_, args.g.as<T>(), scratch.g2);
  if (options_.factor == ApolloFactor::tensor) {
    double r2 = 0, n2 = 0;
    for (std::int64_t i = 0; i < vectors; ++i) r2 += scratch.r2[i];
    for (std::int64_t i = 0; i < vectors; ++i) n2 += scratch.n2[i];
    std::fill_n(scratch.r2, vectors, r2);
    std::fill_n(scratch.n2, vectors, n2);
  }
  double s2 = 0;
  for (std::int64_t i = 0; i < vectors; ++i) {
    const double factor = step_factor(scratch.n2[i], scratch.r2[i]);
    s2 += factor * factor * clip * clip * scratch.g2[i];
    scratch.n2[i] = factor;
  }
  const double limit = limit_growth(std::sqrt(s2), options_.gamma, previous);
  for (std::int64_t i = 0; i < vectors; ++i) scratch.phi[i] = static_cast<T>(scratch.n2[i] / limit);
}

template <typename T>
void ApolloUpdate::update_as(const UpdateArgs& args) const {
  const double step = scalar(args.scalars, Scalar::step), lr = scalar(args.scalars, Scalar::lr);
  const double clip = scalar(args.scalars, Scalar::clip_scale);
  const double decay = parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0;
  const Scratch<T> scratch(args.workspace.data, at_);
  std::span<const Tensor> states = args.states;
  const MomentViews<T> moments = moments_.views<T>(states, static_cast<std::int64_t>(step));
  const T* g = args.g.as<T>();

  const Philox random(options_.seed, projection_stream(static_cast<std::int64_t>(step)));
  const double deviation = 1.0 / std::sqrt(static_cast<double>(at_.rank));
  parallel_for(at_.short_side() * at_.rank, 256, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e)
      scratch.projection[e] = static_cast<T>(random.normal(static_cast<std::uint64_t>(e)) * deviation);
  });
  project(at_, g, scratch.projection, static_cast<T>(clip), scratch.projected);
  moments_.advance(moments, scratch.projected, scratch.direction);
  make_phi(args, scratch, clip, *states[0].as<T>());
  const double scale = moments_.rate(lr, step) * std::sqrt(options_.alpha) * clip;
  subtract_scaled(at_, g, scratch.phi, static_cast<T>(scale), static_cast<T>(decay), args.w.as<T>());
}

std::unique_ptr<Optimizer> make_apollo(const OptimizerOptions& o) {
  const bool mini = o.kind == OptimizerKind::apollo_mini;
  return std::make_unique<SplitOptimizer<ApolloUpdate>>(
      o.kind,
      ApolloUpdate::Options{.beta1 = o.beta1,
                            .beta2 = o.beta2,
                            .eps = o.eps,
                            .weight_decay = o.weight_decay,
                            .rank = mini ? 1 : o.rank,
                            .alpha = o.alpha,
                            .refresh = o.refresh,
                            .stagger = o.stagger,
                            .factor = mini ? ApolloFactor::tensor : ApolloFactor::vector,
                            .gamma = o.gamma,
                            .seed = o.seed,
                            .states = o.states},
      adam_options(o, AdamForm::galore, o.states));
}

}  // namespace kiln
