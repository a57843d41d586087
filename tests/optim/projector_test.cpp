#include "optim/projector.h"

#include <cmath>
#include <vector>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"
#include "optim/support.h"

using namespace kiln;

namespace {

/// G = sum_k decay^k u_k v_k' with orthonormal u, v, made by Gram-Schmidt on random vectors that drift with `time`.
class Spectrum {
 public:
  Spectrum(std::int64_t rows, std::int64_t columns, double decay)
      : rows_(rows), columns_(columns), decay_(decay), count_(std::min(rows, columns)) {}

  HostTensor gradient(double time) const {
    HostTensor g({{rows_, columns_}, DType::f32});
    const auto u = basis(rows_, 1, time), v = basis(columns_, 2, time);
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < columns_; ++j) {
        double sum = 0, size = 1;
        for (std::size_t k = 0; k < u.size(); ++k, size *= decay_)
          sum += size * u[k][static_cast<std::size_t>(i)] * v[k][static_cast<std::size_t>(j)];
        g.span<float>()[static_cast<std::size_t>(i * columns_ + j)] = static_cast<float>(sum);
      }
    return g;
  }
  /// The energy in the top r singular values.
  double top_energy(std::int64_t rank) const {
    double sum = 0;
    for (std::int64_t k = 0; k < rank; ++k) sum += std::pow(decay_, 2 * static_cast<double>(k));
    return sum;
  }

 private:
  std::vector<std::vector<double>> basis(std::int64_t size, std::uint64_t stream, double time) const {
    const Philox from(1, stream), to(2, stream);
    std::vector<std::vector<double>> list;
    std::uint64_t draw = 0;
    for (std::int64_t k = 0; k < count_; ++k) {
      std::vector<double> x(static_cast<std::size_t>(size));
      for (double& value : x) {
        value = std::cos(time) * from.normal(draw) + std::sin(time) * to.normal(draw);
        ++draw;
      }
      for (int pass = 0; pass < 2; ++pass)
        for (const auto& other : list) {
          double along = 0;
          for (std::size_t i = 0; i < x.size(); ++i) along += x[i] * other[i];
          for (std::size_t i = 0; i < x.size(); ++i) x[i] -= along * other[i];
        }
      double norm = 0;
      for (const double value : x) norm += value * value;
      for (double& value : x) value /= std::sqrt(norm);
      list.push_back(std::move(x));
    }
    return list;
  }

  std::int64_t rows_, columns_;
  double decay_;
  std::int64_t count_;
};

/// ||G Q||^2, or ||Q' G||^2 on the left side.
double captured(const HostTensor& g, const HostTensor& q) {
  const Shape shape = g.view().shape();
  const bool right = projection_side(shape) == ProjectionSide::right;
  const std::int64_t side = q.view().shape()[0], rank = q.view().shape()[1];
  double energy = 0;
  for (std::int64_t i = 0; i < std::max(shape[0], shape[1]); ++i)
    for (std::int64_t c = 0; c < rank; ++c) {
      double sum = 0;
      for (std::int64_t s = 0; s < side; ++s)
        sum += static_cast<double>(
                   g.span<float>()[static_cast<std::size_t>(right ? i * shape[1] + s : s * shape[1] + i)]) *
               static_cast<double>(q.span<float>()[static_cast<std::size_t>(s * rank + c)]);
      energy += sum * sum;
    }
  return energy;
}

/// Largest entry of |Q'Q - I|.
double orthogonality_error(const HostTensor& q) {
  const std::int64_t side = q.view().shape()[0], rank = q.view().shape()[1];
  double worst = 0;
  for (std::int64_t a = 0; a < rank; ++a)
    for (std::int64_t b = 0; b < rank; ++b) {
      double sum = a == b ? -1 : 0;
      for (std::int64_t s = 0; s < side; ++s)
        sum += static_cast<double>(q.span<float>()[static_cast<std::size_t>(s * rank + a)]) *
               static_cast<double>(q.span<float>()[static_cast<std::size_t>(s * rank + b)]);
      worst = std::max(worst, std::abs(sum));
    }
  return worst;
}

HostTensor empty_basis(const HostTensor& g, std::int64_t rank) {
  const Shape shape = g.view().shape();
  return HostTensor({{std::min(shape[0], shape[1]), rank}, DType::f32});
}

/// As an op would: with a workspace of the size that it asks for, poisoned.
void refresh(const Tensor& g, const Tensor& q, const RefreshOptions& options) {
  const auto bytes = static_cast<std::int64_t>(refresh_workspace_bytes(g.shape(), q.shape()[1], g.dtype()));
  const HostTensor workspace({{bytes}, DType::u8});
  std::fill_n(workspace.span<std::uint8_t>().data(), bytes, std::uint8_t{0xff});
  CHECK(refresh_projector(g, q, options, workspace.view().data));
}

RefreshOptions options_of(ProjectorKind kind, bool cold, std::uint64_t stream = 3) {
  return {.kind = kind, .seed = 1, .stream = stream, .cold = cold};
}

}  // namespace

TEST_CASE("both projectors are orthonormal and hold the dominant subspace") {
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{90, 60}, {60, 90}, {64, 64}}));
  const Spectrum spectrum(rows, columns, 0.9);
  const std::int64_t rank = 16;
  INFO(rows << " x " << columns);

  const HostTensor g = spectrum.gradient(0.0);
  const HostTensor exact = empty_basis(g, rank), power = empty_basis(g, rank);
  refresh(g.view(), exact.view(), options_of(ProjectorKind::svd, true));
  CHECK(captured(g, exact) == Approx(spectrum.top_energy(rank)).epsilon(1e-5));
  CHECK(orthogonality_error(exact) < 1e-6);

  refresh(g.view(), power.view(), options_of(ProjectorKind::power, true));
  CHECK(captured(g, power) > 0.99 * spectrum.top_energy(rank));
  CHECK(orthogonality_error(power) < 1e-5);

  // Warm: the gradient has turned since the last refresh.
  const HostTensor turned = spectrum.gradient(0.4);
  REQUIRE(captured(turned, power) < 0.95 * spectrum.top_energy(rank));
  refresh(turned.view(), power.view(), options_of(ProjectorKind::power, false));
  CHECK(captured(turned, power) > 0.99 * spectrum.top_energy(rank));
  CHECK(orthogonality_error(power) < 1e-5);
}

TEST_CASE("the largest component of every exact singular vector is positive") {
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{40, 25}, {25, 40}}));
  const HostTensor g = Spectrum(rows, columns, 0.8).gradient(0.0), q = empty_basis(g, 8);
  refresh(g.view(), q.view(), options_of(ProjectorKind::svd, true));
  for (std::size_t c = 0; c < 8; ++c) {
    float largest = 0;
    for (std::size_t i = 0; i < 25; ++i)
      if (const float x = q.span<float>()[i * 8 + c]; std::abs(x) > std::abs(largest)) largest = x;
    CHECK(largest > 0);
  }
}

TEST_CASE("a warm power refresh stays aligned with the old basis") {
  const Spectrum spectrum(60, 40, 0.8);
  const std::int64_t rank = 6;
  const HostTensor g = spectrum.gradient(0.0), turned = spectrum.gradient(0.1), q = empty_basis(g, rank);
  refresh(g.view(), q.view(), options_of(ProjectorKind::power, true));
  const std::vector<float> old(q.span<float>().begin(), q.span<float>().end());
  refresh(turned.view(), q.view(), options_of(ProjectorKind::power, false));
  for (std::size_t c = 0; c < 6; ++c) {
    double along = 0;
    for (std::size_t i = 0; i < 40; ++i)
      along += static_cast<double>(old[i * 6 + c]) * static_cast<double>(q.span<float>()[i * 6 + c]);
    CHECK(along > 0.7);
  }
}

TEST_CASE("the cold start is drawn from the seed and the stream alone") {
  const HostTensor g = Spectrum(48, 48, 0.99).gradient(0.0);
  auto start = [&](std::uint64_t stream) {
    const HostTensor q = empty_basis(g, 8);
    refresh(g.view(), q.view(), options_of(ProjectorKind::power, true, stream));
    return std::vector<float>(q.span<float>().begin(), q.span<float>().end());
  };
  CHECK(start(3) == start(3));
  CHECK(start(3) != start(4));
}

TEST_CASE("ranks at and near the whole side, and gradients of low rank") {
  const ProjectorKind kind = GENERATE(ProjectorKind::power, ProjectorKind::svd);
  const std::int64_t rank = GENERATE(1, 11, 12);
  const double decay = GENERATE(0.0, 0.7);  // 0: a gradient of rank one
  const HostTensor g = Spectrum(20, 12, decay).gradient(0.0), q = empty_basis(g, rank);
  refresh(g.view(), q.view(), options_of(kind, true));
  CHECK(orthogonality_error(q) < 1e-5);
  CHECK(captured(g, q) > 0.99 * Spectrum(20, 12, decay).top_energy(rank));
  refresh(g.view(), q.view(), options_of(kind, false));
  CHECK(orthogonality_error(q) < 1e-5);
}
