#include "optim/low_rank_adam.h"

#include <algorithm>
#include <cmath>

#include "base/rng.h"
#include "core/parallel.h"
#include "ops/gemm.h"
#include "optim/adam.h"
#include "optim/squared_sum.h"

namespace kiln {
namespace {

constexpr double kNormEps = 1e-8;

/// Sizes of one matrix: vectors lie along the long side, one factor phi each.
struct Geometry {
  std::int64_t m, n, rank;
  ProjectionSide side;

  Geometry(const Shape& shape, std::int64_t wanted_rank)
      : m(shape[0]), n(shape[1]), rank(std::min({wanted_rank, m, n})), side(projection_side(shape)) {}
  bool right() const { return side == ProjectionSide::right; }
  std::int64_t vectors() const { return right() ? m : n; }
  std::int64_t short_side() const { return right() ? n : m; }
  Shape moment_shape() const { return {vectors(), rank}; }
};

/// sum[v] = squared norm of vector v of a matrix whose vectors are rows or columns, in f64 and a fixed order.
template <typename T>
void squared_norms(const T* x, std::int64_t rows, std::int64_t columns, bool vectors_are_rows, double* sum) {
  if (vectors_are_rows) {
    parallel_for(rows, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) sum[i] = squared_sum(x + i * columns, columns);
    });
    return;
  }
  parallel_for(columns, 64, [&](std::int64_t begin, std::int64_t end) {
    std::fill(sum + begin, sum + end, 0.0);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = begin; j < end; ++j) {
        const double value = static_cast<double>(x[i * columns + j]);
        sum[j] += value * value;
      }
  });
}

/// Scratch of one update, cut from the node's workspace.
template <typename T>
struct Scratch {
  T *projected, *direction, *phi;  // R, then N; [vectors * rank]; phi [vectors]
  double *r2, *n2, *g2;            // squared norms of the vectors

  Scratch(void* workspace, const Geometry& at) {
    auto* doubles = static_cast<double*>(workspace);
    r2 = doubles;
    n2 = r2 + at.vectors();
    g2 = n2 + at.vectors();
    projected = reinterpret_cast<T*>(g2 + at.vectors());
    direction = projected + at.vectors() * at.rank;
    phi = direction + at.vectors() * at.rank;
  }
  static std::size_t bytes(const Geometry& at) {
    const auto vectors = static_cast<std::size_t>(at.vectors());
    return vectors * 3 * sizeof(double) + vectors * (2 * static_cast<std::size_t>(at.rank) + 1) * sizeof(T);
  }
};

/// R [vectors,r] = clip * G Q or clip * G' Q.
template <typename T>
void project(const Geometry& at, const T* g, const T* q, T clip, T* r) {
  if (at.right())
    gemm<T>({.m = at.m,
             .n = at.rank,
             .k = at.n,
             .a = g,
             .lda = at.n,
             .b = q,
             .ldb = at.rank,
             .c = r,
             .ldc = at.rank,
             .alpha = clip});
  else
    gemm<T>({.trans_a = Trans::yes,
             .m = at.n,
             .n = at.rank,
             .k = at.m,
             .a = g,
             .lda = at.n,
             .b = q,
             .ldb = at.rank,
             .c = r,
             .ldc = at.rank,
             .alpha = clip});
}

/// W += scale * A Q' or scale * Q A'.
template <typename T>
void add_projected_back(const Geometry& at, const T* a, const T* q, T scale, T* w) {
  if (at.right())
    gemm<T>({.trans_b = Trans::yes,
             .m = at.m,
             .n = at.n,
             .k = at.rank,
             .a = a,
             .lda = at.rank,
             .b = q,
             .ldb = at.rank,
             .c = w,
             .ldc = at.n,
             .alpha = scale,
             .beta = 1});
  else
    gemm<T>({.trans_b = Trans::yes,
             .m = at.m,
             .n = at.n,
             .k = at.rank,
             .a = q,
             .lda = at.rank,
             .b = a,
             .ldb = at.rank,
             .c = w,
             .ldc = at.n,
             .alpha = scale,
             .beta = 1});
}

class LowRankAdam final : public Optimizer {
 public:
  explicit LowRankAdam(const OptimizerOptions& o)
      : name_(to_string(o.kind)),
        adam_{.beta1 = o.beta1,
              .beta2 = o.beta2,
              .eps = o.eps,
              .weight_decay = o.weight_decay,
              .form = AdamForm::galore,
              .seed = o.seed},
        low_rank_{.beta1 = o.beta1,
                  .beta2 = o.beta2,
                  .eps = o.eps,
                  .weight_decay = o.weight_decay,
                  .rank = o.rank,
                  .alpha = o.alpha,
                  .refresh = o.refresh,
                  .stagger = o.stagger,
                  .projector = o.projector,
                  .residual = o.kind == OptimizerKind::fira ? Residual::scaled : Residual::none,
                  .variant = o.variant,
                  .gamma = o.gamma,
                  .seed = o.seed} {}
  std::string_view name() const override { return name_; }
  std::vector<StateSpec> states(const Parameter& parameter) const override {
    return parameter.low_rank ? LowRankAdamUpdate::states(parameter, low_rank_) : AdamUpdate::states(parameter);
  }
  OpPtr update_op(const Parameter& parameter) const override {
    if (parameter.low_rank) return std::make_shared<LowRankAdamUpdate>(parameter, low_rank_);
    return std::make_shared<AdamUpdate>(parameter, adam_);
  }

 private:
  std::string_view name_;
  AdamUpdate::Options adam_;
  LowRankAdamUpdate::Options low_rank_;
};

}  // namespace

LowRankAdamUpdate::LowRankAdamUpdate(Parameter parameter, Options options)
    : UpdateOp(std::move(parameter)), options_(options) {
  check(this->parameter().shape.rank() == 2, "{}: shape {}, a low-rank update needs a matrix", this->parameter().name,
        this->parameter().shape.str());
}

std::string_view LowRankAdamUpdate::name() const {
  return options_.residual == Residual::scaled ? "fira_update" : "galore_update";
}

std::vector<StateSpec> LowRankAdamUpdate::states(const Parameter& parameter, const Options& options) {
  const Geometry at(parameter.shape, options.rank);
  std::vector<StateSpec> list{{"projector", {{at.short_side(), at.rank}, DType::f32}},
                              {"exp_avg", {at.moment_shape(), DType::f32}},
                              {"exp_avg_sq", {at.moment_shape(), DType::f32}}};
  if (options.residual == Residual::scaled) list.push_back({"limiter_norm", {{1}, DType::f32}});
  return list;
}

std::size_t LowRankAdamUpdate::workspace_bytes(std::span<const TensorSpec> in) const {
  const Geometry at(parameter().shape, options_.rank);
  return in[0].dtype == DType::f64 ? Scratch<double>::bytes(at) : Scratch<float>::bytes(at);
}

Cost LowRankAdamUpdate::cost(std::span<const TensorSpec>) const {
  const Geometry at(parameter().shape, options_.rank);
  const double elements = static_cast<double>(at.m * at.n), rank = static_cast<double>(at.rank);
  return {4.0 * elements * rank, (options_.residual == Residual::scaled ? 24.0 : 12.0) * elements};
}

void LowRankAdamUpdate::update(const UpdateArgs& args) const {
  visit_real(args.w.dtype(), [&]<typename T>() { update_as<T>(args); });
}

template <typename T>
void LowRankAdamUpdate::update_as(const UpdateArgs& args) const {
  const Geometry at(parameter().shape, options_.rank);
  const double step = scalar(args.scalars, Scalar::step), lr = scalar(args.scalars, Scalar::lr);
  const double clip = scalar(args.scalars, Scalar::clip_scale);
  const double rate = lr * std::sqrt(1.0 - std::pow(options_.beta2, step)) / (1.0 - std::pow(options_.beta1, step));
  const double decay = parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0;
  const auto step_number = static_cast<std::int64_t>(step);
  if (refresh_due(schedule(), step_number))
    refresh_projector(args.g, args.states[0],
                      {.kind = options_.projector,
                       .seed = options_.seed,
                       .stream = stream_of(parameter().name.c_str()),
                       .cold = step_number == 1});

  const Scratch<T> scratch(args.workspace.data, at);
  T* w = args.w.as<T>();
  const T* g = args.g.as<T>();
  const T* q = args.states[0].as<T>();
  T *m = args.states[1].as<T>(), *v = args.states[2].as<T>();
  T *r = scratch.projected, *a = scratch.direction, *phi = scratch.phi;

  // R, its moments, and N
  project(at, g, q, static_cast<T>(clip), r);
  const T b1 = static_cast<T>(options_.beta1), b2 = static_cast<T>(options_.beta2), eps = static_cast<T>(options_.eps);
  const T c1 = static_cast<T>(1.0 - options_.beta1), c2 = static_cast<T>(1.0 - options_.beta2);
  parallel_for(at.vectors() * at.rank, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      m[i] = b1 * m[i] + c1 * r[i];
      v[i] = b2 * v[i] + c2 * r[i] * r[i];
      a[i] = m[i] / (std::sqrt(v[i]) + eps);
    }
  });
  if (options_.residual == Residual::none) {
    add_projected_back(at, a, q, static_cast<T>(-rate * options_.alpha), w);
    if (decay == 1.0) return;
    parallel_for(at.m * at.n, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) w[i] *= static_cast<T>(decay);
    });
    return;
  }

  // phi, ||S|| and the limiter
  squared_norms(r, at.vectors(), at.rank, true, scratch.r2);
  squared_norms(a, at.vectors(), at.rank, true, scratch.n2);
  squared_norms(g, at.m, at.n, at.right(), scratch.g2);
  const double k = options_.variant == FiraVariant::paper ? 1.0 : options_.alpha;
  double s2 = 0;
  for (std::int64_t i = 0; i < at.vectors(); ++i) {
    const double factor = std::sqrt(scratch.n2[i]) / (std::sqrt(scratch.r2[i]) + kNormEps);
    const double rest = clip * clip * scratch.g2[i] - (2 * k - k * k) * scratch.r2[i];
    s2 += factor * factor * std::max(0.0, rest);
    phi[i] = static_cast<T>(factor);
  }
  T& previous = *args.states[3].as<T>();
  const double norm = std::sqrt(s2), prev = static_cast<double>(previous);
  const double limit = prev > 0 ? std::max(norm / (prev + kNormEps), options_.gamma) / options_.gamma : 1.0;
  previous = static_cast<T>(norm / limit);

  // A = N - c phi R onto W through Q, and c phi G in one pass. In both variants A is scaled by alpha.
  for (std::int64_t i = 0; i < at.vectors(); ++i) phi[i] = static_cast<T>(static_cast<double>(phi[i]) / limit);
  parallel_for(at.vectors(), 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t e = i * at.rank; e < (i + 1) * at.rank; ++e) a[e] -= phi[i] * r[e];
  });
  add_projected_back(at, a, q, static_cast<T>(-rate * options_.alpha), w);
  const double scale = options_.variant == FiraVariant::paper ? rate * options_.alpha : rate;
  const T outside = static_cast<T>(scale * clip), keep = static_cast<T>(decay);
  parallel_for(at.m, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      T* row = w + i * at.n;
      const T* grad = g + i * at.n;
      if (at.right()) {
        const T factor = outside * phi[i];
        for (std::int64_t j = 0; j < at.n; ++j) row[j] = keep * (row[j] - factor * grad[j]);
      } else {
        for (std::int64_t j = 0; j < at.n; ++j) row[j] = keep * (row[j] - outside * phi[j] * grad[j]);
      }
    }
  });
}

std::unique_ptr<Optimizer> make_low_rank_adam(const OptimizerOptions& options) {
  return std::make_unique<LowRankAdam>(options);
}

}  // namespace kiln
