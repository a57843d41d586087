#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "optim/adam.h"
#include "optim/projector.h"

namespace kiln {

/// Sizes of one matrix G [m,n] that is seen in a subspace of its shorter side. Its *vectors* are the rows on the right
/// side and the columns on the left; R [vectors, rank] holds each one's numbers together.
struct LowRankShape {
  std::int64_t m, n, rank;
  ProjectionSide side;

  LowRankShape(const Shape& shape, std::int64_t wanted_rank)
      : m(shape[0]), n(shape[1]), rank(std::min({wanted_rank, m, n})), side(projection_side(shape)) {}
  bool right() const { return side == ProjectionSide::right; }
  std::int64_t vectors() const { return right() ? m : n; }
  std::int64_t short_side() const { return right() ? n : m; }
  Shape basis_shape() const { return {short_side(), rank}; }
  Shape moment_shape() const { return {vectors(), rank}; }
};
/// A usage Error when the parameter is not a matrix.
void check_matrix(const Parameter& parameter);

/// R = scale * G Q on the right side, scale * G' Q on the left.
template <typename T>
void project(const LowRankShape& at, const T* g, const T* q, T scale, T* r);
/// W += scale * A Q' or scale * Q A'.
template <typename T>
void add_projected_back(const LowRankShape& at, const T* a, const T* q, T scale, T* w);
/// sum[v] = squared norm of vector v of G, or of R; in f64 and an order that the sizes decide.
template <typename T>
void squared_norms_of_matrix(const LowRankShape& at, const T* g, double* sum);
template <typename T>
void squared_norms_of_rows(std::int64_t rows, std::int64_t columns, const T* x, double* sum);
/// W = keep * (W - scale * factor[v] * G), one factor a vector.
template <typename T>
void subtract_scaled(const LowRankShape& at, const T* g, const T* factor, T scale, T keep, T* w);
/// w *= keep
template <typename T>
void scale_weights(std::int64_t count, T keep, T* w);

/// phi of a vector from the squared norms of its Adam direction and of its projected gradient: the step that Adam takes
/// per unit of gradient.
inline double step_factor(double direction2, double projected2) {
  return std::sqrt(direction2) / (std::sqrt(projected2) + 1e-8);
}

/// Fira's norm-growth limiter: what a residual of this norm is divided by, max(norm/(previous+1e-8), gamma)/gamma;
/// keeps the norm after the division in `previous`, where 0 says that there was none yet.
template <typename T>
double limit_growth(double norm, double gamma, T& previous);

/// A member that updates the layers' linear weights by `Update` and the rest by Adam.
template <typename Update>
class SplitOptimizer final : public Optimizer {
 public:
  SplitOptimizer(OptimizerKind kind, const typename Update::Options& linear, const AdamUpdate::Options& rest)
      : name_(to_string(kind)), linear_(linear), rest_(rest) {}
  std::string_view name() const override { return name_; }
  std::vector<StateSpec> states(const Parameter& parameter) const override {
    return parameter.low_rank ? Update::states(parameter, linear_) : AdamUpdate::states(parameter, rest_);
  }
  OpPtr update_op(const Parameter& parameter) const override {
    if (parameter.low_rank) return std::make_shared<Update>(parameter, linear_);
    return std::make_shared<AdamUpdate>(parameter, rest_);
  }

 private:
  std::string_view name_;
  typename Update::Options linear_;
  AdamUpdate::Options rest_;
};

}  // namespace kiln
