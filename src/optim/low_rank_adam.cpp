#include "optim/low_rank_adam.h"

#include <cmath>

#include "base/rng.h"
#include "core/parallel.h"
#include "ops/gemm.h"

namespace kiln {
namespace {

StateStore projector_store(const Parameter& parameter, const LowRankAdamUpdate::Options& o) {
  return StateStore(parameter, {.name = "projector",
                                .shape = LowRankShape(parameter.shape, o.rank).basis_shape(),
                                .precision = o.projector_states,
                                .rounding = StateRounding::nearest,
                                .seed = o.seed});
}
Moments moments_of(const Parameter& parameter, const LowRankAdamUpdate::Options& o) {
  return Moments(parameter, LowRankShape(parameter.shape, o.rank).moment_shape(),
                 {.beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .precision = o.states, .seed = o.seed});
}

}  // namespace

/// Cut from the node's workspace. A refresh is done before R is made, so its scratch lies over R and N.
template <typename T>
struct LowRankAdamUpdate::Scratch {
  double *r2, *n2, *g2;      // squared norms of the vectors
  T* phi;                    // [vectors]
  T* basis;                  // [short, r], where the stored one is not T
  T *old, *turn, *turn2;     // rotation: the old basis [short, r], C and C*C [r, r]
  T *projected, *direction;  // R, then N [vectors, r]
  T *first, *second;         // rotation: the moments [vectors, r]
  void* refresh;

  Scratch(void* workspace, const LowRankShape& at, const Options& o, std::size_t* bytes = nullptr) {
    const std::int64_t vectors = at.vectors(), moments = vectors * at.rank, basis_size = at.short_side() * at.rank;
    std::size_t used = 0;
    auto take = [&]<typename U>(U*& pointer, std::int64_t count) {
      pointer = reinterpret_cast<U*>(static_cast<std::byte*>(workspace) + used);
      used += (static_cast<std::size_t>(count) * sizeof(U) + 7) / 8 * 8;
    };
    take(r2, vectors);
    take(n2, vectors);
    take(g2, vectors);
    take(phi, vectors);
    take(basis, o.projector_states == StatePrecision::fp32 ? 0 : basis_size);
    take(old, o.rotate ? basis_size : 0);
    take(turn, o.rotate ? at.rank * at.rank : 0);
    take(turn2, o.rotate ? at.rank * at.rank : 0);
    const std::size_t shared = used;
    take(projected, moments);
    take(direction, moments);
    take(first, o.rotate ? moments : 0);
    take(second, o.rotate ? moments : 0);
    refresh = static_cast<std::byte*>(workspace) + shared;
    if (bytes != nullptr)
      *bytes = std::max(used, shared + refresh_workspace_bytes({at.m, at.n}, at.rank, dtype_of<T>()));
  }
  static std::size_t bytes(const LowRankShape& at, const Options& o) {
    std::size_t total = 0;
    Scratch(nullptr, at, o, &total);
    return total;
  }
};

LowRankAdamUpdate::LowRankAdamUpdate(Parameter parameter, const Options& options)
    : UpdateOp(std::move(parameter)),
      options_(options),
      at_(this->parameter().shape, options.rank),
      projector_(projector_store(this->parameter(), options)),
      moments_(moments_of(this->parameter(), options)) {
  check_matrix(this->parameter());
}

std::string_view LowRankAdamUpdate::name() const {
  if (options_.residual == Residual::none) return "galore_update";
  return options_.rotate ? "fira_plus_update" : "fira_update";
}

std::vector<StateSpec> LowRankAdamUpdate::states(const Parameter& parameter, const Options& options) {
  std::vector<StateSpec> list;
  projector_store(parameter, options).append_specs(list);
  moments_of(parameter, options).append_specs(list);
  if (options.residual == Residual::scaled) list.push_back({"limiter_norm", {{1}, DType::f32}});
  return list;
}

std::size_t LowRankAdamUpdate::workspace_bytes(std::span<const TensorSpec> in) const {
  return in[0].dtype == DType::f64 ? Scratch<double>::bytes(at_, options_) : Scratch<float>::bytes(at_, options_);
}

Cost LowRankAdamUpdate::cost(std::span<const TensorSpec>) const {
  const double elements = static_cast<double>(at_.m * at_.n), rank = static_cast<double>(at_.rank);
  return {4.0 * elements * rank, (options_.residual == Residual::scaled ? 24.0 : 12.0) * elements};
}

void LowRankAdamUpdate::update(const UpdateArgs& args) const {
  visit_real(args.w.dtype(), [&]<typename T>() { update_as<T>(args); });
}

template <typename T>
const T* LowRankAdamUpdate::basis(const UpdateArgs& args, const StateView<T>& stored, const MomentViews<T>& moments,
                                  const Scratch<T>& scratch) const {
  T* q = stored.load_all(scratch.basis);
  const auto step = static_cast<std::int64_t>(scalar(args.scalars, Scalar::step));
  if (!refresh_due(schedule(), step)) return q;
  const bool warm = step > 1;
  if (options_.rotate && warm) std::copy(q, q + stored.numel(), scratch.old);
  if (!refresh_projector(args.g, {q, {at_.basis_shape(), dtype_of<T>()}},
                         {.kind = options_.projector,
                          .seed = options_.seed,
                          .stream = stream_of(parameter().name.c_str()),
                          .cold = !warm},
                         scratch.refresh))
    return q;
  stored.store_all(q);
  stored.load_all(q);  // as later steps will see it
  if (options_.rotate && warm) rotate(scratch.old, q, static_cast<double>(step - 1), moments, scratch);
  return q;
}

template <typename T>
void LowRankAdamUpdate::rotate(const T* from, const T* to, double steps_done, const MomentViews<T>& moments,
                               const Scratch<T>& scratch) const {
  const std::int64_t r = at_.rank;
  const T c1 = static_cast<T>(1.0 - std::pow(options_.beta1, steps_done));
  const T c2 = static_cast<T>(1.0 - std::pow(options_.beta2, steps_done));
  gemm<T>({.trans_a = Trans::yes,
           .m = r,
           .n = r,
           .k = at_.short_side(),
           .a = from,
           .lda = r,
           .b = to,
           .ldb = r,
           .c = scratch.turn,
           .ldc = r});
  for (std::int64_t i = 0; i < r * r; ++i) scratch.turn2[i] = scratch.turn[i] * scratch.turn[i];
  auto turned = [&](const T* x, const T* by, T* to_rows) {
    gemm<T>({.m = at_.vectors(), .n = r, .k = r, .a = x, .lda = r, .b = by, .ldb = r, .c = to_rows, .ldc = r});
  };
  T *mean = scratch.first, *variance = scratch.second;
  const T *m = moments.first.load_all(mean), *v = moments.second.load_all(variance);
  parallel_for(at_.vectors() * r, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      mean[i] = m[i] / c1;
      variance[i] = v[i] / c2 - mean[i] * mean[i];
    }
  });
  turned(mean, scratch.turn, scratch.projected);
  turned(variance, scratch.turn2, scratch.direction);
  moments.for_blocks([&](std::int64_t first, std::int64_t n, T* new_m, T* new_v) {
    for (std::int64_t i = 0; i < n; ++i) {
      const T average = scratch.projected[first + i];
      new_m[i] = c1 * average;
      new_v[i] = c2 * std::abs(scratch.direction[first + i] + average * average);
    }
  });
}

template <typename T>
void LowRankAdamUpdate::make_phi(const UpdateArgs& args, const Scratch<T>& scratch, double clip, T& previous) const {
  squared_norms_of_rows(at_.vectors(), at_.rank, scratch.projected, scratch.r2);
  squared_norms_of_rows(at_.vectors(), at_.rank, scratch.direction, scratch.n2);
  squared_norms_of_matrix(at_, args.g.as<T>(), scratch.g2);
  const double k = options_.variant == FiraVariant::paper ? 1.0 : options_.alpha;
  double s2 = 0;
  for (std::int64_t i = 0; i < at_.vectors(); ++i) {
    const double factor = step_factor(scratch.n2[i], scratch.r2[i]);
    const double rest = clip * clip * scratch.g2[i] - (2 * k - k * k) * scratch.r2[i];
    s2 += factor * factor * std::max(0.0, rest);
    scratch.phi[i] = static_cast<T>(factor);
  }
  const double limit = limit_growth(std::sqrt(s2), options_.gamma, previous);
  for (std::int64_t i = 0; i < at_.vectors(); ++i)
    scratch.phi[i] = static_cast<T>(static_cast<double>(scratch.phi[i]) / limit);
}

template <typename T>
void LowRankAdamUpdate::update_as(const UpdateArgs& args) const {
  const double step = scalar(args.scalars, Scalar::step), lr = scalar(args.scalars, Scalar::lr);
  const double clip = scalar(args.scalars, Scalar::clip_scale), rate = moments_.rate(lr, step);
  const T keep = static_cast<T>(parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0);
  const Scratch<T> scratch(args.workspace.data, at_, options_);
  std::span<const Tensor> states = args.states;
  const StateView<T> stored = projector_.view<T>(states, static_cast<std::int64_t>(step));
  std::span<const Tensor> same = states;
  const MomentViews<T> turning = moments_.views<T>(same, static_cast<std::int64_t>(step) + kRotationStep);
  const MomentViews<T> moments = moments_.views<T>(states, static_cast<std::int64_t>(step));
  T* w = args.w.as<T>();
  const T* g = args.g.as<T>();
  const T* q = basis(args, stored, turning, scratch);
  T *r = scratch.projected, *a = scratch.direction;

  project(at_, g, q, static_cast<T>(clip), r);
  moments_.advance(moments, r, a);
  const T inside = static_cast<T>(-rate * options_.alpha);
  if (options_.residual == Residual::none) {
    add_projected_back(at_, a, q, inside, w);
    scale_weights(at_.m * at_.n, keep, w);
    return;
  }
  make_phi(args, scratch, clip, *states[0].as<T>());
  // A = N - c phi R onto W through Q, and c phi G in one pass. In both variants A is scaled by alpha.
  const T* phi = scratch.phi;
  parallel_for(at_.vectors(), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t e = i * at_.rank; e < (i + 1) * at_.rank; ++e) a[e] -= phi[i] * r[e];
  });
  add_projected_back(at_, a, q, inside, w);
  const double scale = options_.variant == FiraVariant::paper ? rate * options_.alpha : rate;
  subtract_scaled(at_, g, phi, static_cast<T>(scale * clip), keep, w);
}

std::unique_ptr<Optimizer> make_low_rank_adam(const OptimizerOptions& o) {
  const bool plus = o.kind == OptimizerKind::fira_plus;
  return std::make_unique<SplitOptimizer<LowRankAdamUpdate>>(
      o.kind,
      LowRankAdamUpdate::Options{.beta1 = o.beta1,
                                 .beta2 = o.beta2,
                                 .eps = o.eps,
                                 .weight_decay = o.weight_decay,
                                 .rank = o.rank,
                                 .alpha = o.alpha,
                                 .refresh = o.refresh,
                                 .stagger = o.stagger,
                                 .projector = o.projector,
                                 .residual = o.kind == OptimizerKind::galore ? Residual::none : Residual::scaled,
                                 .variant = o.variant,
                                 .gamma = o.gamma,
                                 .seed = o.seed,
                                 .states = o.states,
                                 .projector_states = o.projector_states,
                                 .rotate = plus},
      adam_options(o, AdamForm::galore, plus ? StatePrecision::int8 : o.states));
}

}  // namespace kiln
