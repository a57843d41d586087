#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "graph/parameter.h"
#include "optim/optimizer.h"

namespace kiln::test {

/// Drives the update op of one parameter in f32 or f64, as an executor would: poisoned workspace, states from zero.
template <typename T>
class Driver {
 public:
  Driver(const OptimizerOptions& options, const Parameter& parameter)
      : Driver(options, parameter, {parameter.shape, dtype_of<T>()}) {}
  /// `storage` may hold more rows than the parameter.
  Driver(const OptimizerOptions& options, const Parameter& parameter, TensorSpec storage) {
    const auto optimizer = make_optimizer(options);
    op_ = optimizer->update_op(parameter);
    specs_ = {storage, storage, scalars_spec()};
    names_ = {"w", "g", "scalars"};
    for (const StateSpec& state : optimizer->states(parameter)) {
      specs_.push_back({state.spec.shape, state.spec.dtype == DType::f32 ? dtype_of<T>() : state.spec.dtype});
      names_.push_back(state.name);
    }
    op_->infer(specs_);
    for (const TensorSpec& spec : specs_) memory_.emplace_back(spec);
    for (const HostTensor& tensor : memory_) views_.push_back(tensor.view());
    const auto bytes = static_cast<std::int64_t>(op_->workspace_bytes(specs_));
    workspace_ = HostTensor({{bytes}, DType::u8});
  }

  void step(std::int64_t t, double lr, double clip_scale = 1.0) {
    const Tensor scalars = views_[2];
    scalar(scalars, Scalar::step) = static_cast<double>(t);
    scalar(scalars, Scalar::lr) = lr;
    scalar(scalars, Scalar::clip_scale) = clip_scale;
    std::fill_n(static_cast<unsigned char*>(workspace_.view().data), workspace_.view().bytes(), 0xff);  // may be empty
    op_->run_cpu({.in = views_, .out = {}, .workspace = workspace_.view()});
  }

  const Op& op() const { return *op_; }
  const std::vector<TensorSpec>& specs() const { return specs_; }
  std::span<T> w() { return memory_[0].span<T>(); }
  std::span<T> g() { return memory_[1].span<T>(); }
  Tensor state(const std::string& name) const {
    const auto found = std::find(names_.begin(), names_.end(), name);
    check(found != names_.end(), "no state {}", name);
    return views_[static_cast<std::size_t>(found - names_.begin())];
  }

 private:
  OpPtr op_;
  std::vector<TensorSpec> specs_;
  std::vector<std::string> names_;
  std::vector<HostTensor> memory_;
  std::vector<Tensor> views_;
  HostTensor workspace_;
};

inline Parameter matrix(std::int64_t rows, std::int64_t columns) {
  return {.name = "layer.weight", .shape = {rows, columns}, .decay = true, .low_rank = true};
}

/// The gradient of scripts/golden/optimizer_traces.py: six decaying rank-1 terms that turn slowly, noise, and a norm
/// that swings so that the limiter works; rounded to f32.
template <typename T>
void fill_gradient(std::span<T> g, std::int64_t rows, std::int64_t columns, std::int64_t step) {
  const double t = static_cast<double>(step);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t column = 0; column < columns; ++column) {
      const double i = static_cast<double>(row), j = static_cast<double>(column);
      double x = 0, size = 1;
      for (int term = 1; term <= 6; ++term) {
        const double k = term;
        size *= 0.5;
        x += size * std::sin(1.3 * k * i + 0.11 * k * t + k) * std::cos(0.9 * k * j + 0.07 * k * t);
      }
      x *= 1 + 0.03 * (i + j);
      x += 0.01 * std::sin(12.9898 * i + 78.233 * j + 37.719 * t);
      x *= 1 + 0.5 * std::sin(0.7 * t);
      g[static_cast<std::size_t>(row * columns + column)] = static_cast<T>(static_cast<float>(x));
    }
}

template <typename T>
void fill_weights(std::span<T> w, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j)
      w[static_cast<std::size_t>(i * columns + j)] = static_cast<T>(
          static_cast<float>(0.1 * std::sin(1.7 * static_cast<double>(i) + 2.9 * static_cast<double>(j) + 0.3)));
}

inline double learning_rate(std::int64_t step) {
  const double t = static_cast<double>(step);
  return 0.02 * std::min(1.0, t / 5) * (0.55 + 0.45 * std::cos(std::acos(-1.0) * t / 30));
}

/// ||a - b|| / ||b||
template <typename A, typename B>
double relative_error(std::span<A> a, std::span<B> b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    difference += (x - y) * (x - y);
    size += y * y;
  }
  return std::sqrt(difference / size);
}

}  // namespace kiln::test
