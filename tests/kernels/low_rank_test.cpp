// The low-rank members on the GPU against the CPU's f32, and the bases that the GPU finds.
#include <Eigen/Dense>
#include <cmath>

#include "catch.h"
#include "graph/parameter.h"
#include "kernels/cuda_backend.h"
#include "kernels/device_array.h"
#include "kernels/device_case.h"
#include "optim/optimizer.h"

namespace kiln::test {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The matrices of a group: tall, wide and square, none a multiple of the kernels' tiles.
const std::vector<Shape> kShapes{{200, 136}, {136, 328}, {128, 128}};
/// More tiles than any GPU has multiprocessors: blocks walk along them, from panel to panel and matrix to matrix.
const std::vector<Shape> kLargeShapes{{3000, 1400}, {1000, 936}, {1400, 3000}};

/// One node for each matrix, each with a storage of its own.
struct Family {
  Backend& backend;
  std::vector<Shape> shapes;
  DType gradients;
  Plan plan;
  std::vector<DeviceArray> w, low, g;
  DeviceArray scalars;
  std::vector<std::vector<DeviceArray>> states;
  std::unique_ptr<Executor> executor;

  Family(Backend& device, const OptimizerOptions& options, DType gradient, std::vector<Shape> of = kShapes)
      : backend(device), shapes(std::move(of)), gradients(gradient), scalars(device, scalars_spec()) {
    const auto optimizer = make_optimizer(options);
    const ValueId step = plan.external("scalars", scalars_spec(), Role::input);
    std::vector<std::pair<ValueId, Tensor>> bound{{step, scalars.view()}};
    auto external = [&](const std::string& name, const DeviceArray& memory, Role role) {
      bound.emplace_back(plan.external(name, memory.view().spec, role), memory.view());
      return bound.back().first;
    };
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const Parameter parameter{.name = fmt::format("layer.{}.weight", i),
                                .shape = shapes[i],
                                .decay = true,
                                .low_rank = true,
                                .low_rank_index = static_cast<std::int64_t>(i),
                                .low_rank_count = static_cast<std::int64_t>(shapes.size())};
      w.emplace_back(device, TensorSpec{shapes[i], device.is_host() ? DType::f32 : DType::bf16});
      g.emplace_back(device, TensorSpec{shapes[i], device.is_host() ? DType::f32 : gradient});
      low.emplace_back(device, TensorSpec{shapes[i], DType::u16});
      std::vector<ValueId> inputs{external("w", w[i], Role::parameter), external("g", g[i], Role::gradient), step};
      states.emplace_back();
      for (const StateSpec& state : optimizer->states(parameter)) {
        states[i].emplace_back(device, state.spec);
        inputs.push_back(external(state.name, states[i].back(), Role::state));
      }
      if (!device.is_host()) inputs.push_back(external("low", low[i], Role::parameter));
      plan.add(optimizer->update_op(parameter), inputs, "update");
    }
    executor = std::make_unique<Executor>(plan, 1, device);
    executor->poison();
    for (const auto& [id, tensor] : bound) executor->bind(id, tensor);
  }

  void set_weights(std::size_t i, const std::vector<float>& values) {
    if (backend.is_host()) return w[i].set(values);
    const Halves halves = split(values);
    w[i].set(halves.high);
    low[i].set(halves.low);
  }
  /// Of bf16 the host reads the same rounded numbers as f32.
  void set_gradient(std::size_t i, std::vector<float> values) {
    if (gradients == DType::f32) return g[i].set(values);
    std::vector<bfloat16> halves;
    for (float& x : values) {
      halves.push_back(to_bfloat16(x));
      x = to_float(halves.back());
    }
    backend.is_host() ? g[i].set(values) : g[i].set(halves);
  }
  std::vector<float> weights(std::size_t i) const {
    return backend.is_host() ? w[i].get<float>() : joined(w[i].get<bfloat16>(), low[i].get<std::uint16_t>());
  }
  void step(int number) {
    StepScalars values{};
    scalar(values, Scalar::step) = number;
    scalar(values, Scalar::lr) = 0.01;
    scalar(values, Scalar::clip_scale) = 0.7;
    scalar(values, Scalar::grad_norm) = 1;
    backend.upload(scalars.view(), values.data());
    executor->run(Phase::micro, false);
  }
};

/// A decaying spectrum with noise, so that there is a subspace to find and a residual.
std::vector<float> gradient_of(const Shape& shape, std::size_t matrix, int step) {
  const std::uint64_t seed = 100 * matrix + 7;
  std::vector<float> g = normals(shape.numel(), seed + static_cast<std::uint64_t>(step), 2e-4);
  for (std::uint64_t term = 0; term < 40; ++term) {
    const std::vector<float> u = normals(shape[0], seed + 1000 + term, 1), v = normals(shape[1], seed + 2000 + term, 1);
    const float size = 1e-3f * std::pow(0.85f, static_cast<float>(term)) *
                       (1 + 0.1f * std::sin(static_cast<float>(step) + static_cast<float>(term)));
    for (std::int64_t i = 0; i < shape[0]; ++i)
      for (std::int64_t j = 0; j < shape[1]; ++j)
        g[static_cast<std::size_t>(i * shape[1] + j)] +=
            size * u[static_cast<std::size_t>(i)] * v[static_cast<std::size_t>(j)];
  }
  return g;
}

Matrix as_matrix(const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
  return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(values.data(), rows,
                                                                                                 columns)
      .cast<double>();
}

OptimizerOptions options_of(OptimizerKind kind, std::int64_t rank) {
  return {.kind = kind, .eps = 1e-6, .weight_decay = 0.1, .rank = rank, .refresh = 50};
}

/// Change of the weights relative to what the CPU's f32 changes, after `steps` steps from the same states.
void check_steps(Backend& gpu, const OptimizerOptions& options, DType gradients, int steps, double limit,
                 const std::vector<Shape>& shapes = kShapes) {
  Family device(gpu, options, gradients, shapes), host(cpu_backend(), options, gradients, shapes);
  CHECK(device.executor->packing().groups.size() == 1);  // all in one kernel's launches
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<float> start = normals(shapes[i].numel(), i + 1, 0.02);
    device.set_weights(i, start);
    host.set_weights(i, start);
    // A basis that is orthonormal and not the dominant one, the same on both.
    const Shape q = host.states[i][0].view().shape();
    const Matrix random = as_matrix(normals(q.numel(), i + 50, 1), q[0], q[1]);
    const Matrix basis =
        Eigen::HouseholderQR<Eigen::MatrixXd>(random).householderQ() * Eigen::MatrixXd::Identity(q[0], q[1]);
    std::vector<float> values;
    for (std::int64_t e = 0; e < q.numel(); ++e) values.push_back(static_cast<float>(basis.data()[e]));
    device.states[i][0].set(values);
    host.states[i][0].set(values);
  }
  for (int step = 2; step < 2 + steps; ++step) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      const std::vector<float> g = gradient_of(shapes[i], i, step);
      device.set_gradient(i, g);
      host.set_gradient(i, g);
    }
    device.step(step);
    host.step(step);
  }
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<float> start = normals(shapes[i].numel(), i + 1, 0.02);
    std::vector<float> found = device.weights(i), expected = host.weights(i);
    for (std::size_t e = 0; e < start.size(); ++e) {
      found[e] -= start[e];
      expected[e] -= start[e];
    }
    INFO(to_string(options.kind) << " of rank " << options.rank << ", " << shapes[i].str() << ", gradients of "
                                 << to_string(gradients));
    CHECK(relative_error({found.begin(), found.end()}, {expected.begin(), expected.end()}) <= limit);
    for (std::size_t s = 1; s < device.states[i].size(); ++s) {
      const std::vector<float> a = device.states[i][s].get<float>(), b = host.states[i][s].get<float>();
      CHECK(relative_error({a.begin(), a.end()}, {b.begin(), b.end()}) <= limit);
    }
  }
}

TEST_CASE("GaLore and Fira on the GPU follow the CPU's f32", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16}) {
    // Operands are rounded to bf16: R, N and Q once each.
    check_steps(*gpu, options_of(OptimizerKind::galore, 24), gradients, 5, 1e-2);
    for (const FiraVariant variant : {FiraVariant::paper, FiraVariant::reference}) {
      OptimizerOptions options = options_of(OptimizerKind::fira, 40);
      options.variant = variant;
      check_steps(*gpu, options, gradients, 5, 1e-2);
    }
  }
}

TEST_CASE("blocks of the GPU follow the CPU's f32 along many tiles", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const std::int64_t rank : {40, 264, 520})  // small panels, large ones, and those that do not fit
      check_steps(*gpu, options_of(OptimizerKind::fira, rank), gradients, 2, 1e-2, kLargeShapes);
}

/// Share of the gradient's square inside the subspace.
double energy(const Matrix& g, const Matrix& q, bool right) {
  return (right ? Matrix(g * q) : Matrix(g.transpose() * q)).squaredNorm() / g.squaredNorm();
}

/// Refreshes of one run. The gradients of bf16 differ from those of f32 by 2^-9 of each element, which the energies
/// do not show.
void check_bases(Backend& gpu, std::int64_t rank, DType gradients) {
  OptimizerOptions options = options_of(OptimizerKind::fira, rank);
  options.refresh = 4;
  Family device(gpu, options, gradients);
  std::vector<std::vector<float>> last(kShapes.size());
  for (int step = 1; step <= 9; ++step) {
    std::vector<std::vector<float>> g;
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      g.push_back(gradient_of(kShapes[i], i, step));
      device.set_gradient(i, g.back());
    }
    device.step(step);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      INFO("rank " << rank << ", step " << step << ", " << kShapes[i].str() << ", gradients of "
                   << to_string(gradients));
      const bool right = kShapes[i][0] >= kShapes[i][1];
      const std::vector<float> values = device.states[i][0].get<float>();
      const std::int64_t offset = static_cast<std::int64_t>(i) * 4 / static_cast<std::int64_t>(kShapes.size());
      const bool due = step == 1 || (step - 1) % 4 == offset;
      CHECK((values != last[i]) == due);
      last[i] = values;
      if (!due) continue;
      const Matrix q = as_matrix(values, std::min(kShapes[i][0], kShapes[i][1]), rank);
      const Matrix one = q.transpose() * q - Matrix::Identity(rank, rank);
      CHECK(one.cwiseAbs().maxCoeff() <= 1e-5);
      const Matrix matrix = as_matrix(g[i], kShapes[i][0], kShapes[i][1]);
      const Eigen::VectorXd singular = Eigen::JacobiSVD<Eigen::MatrixXd>(matrix).singularValues();
      const double best = singular.head(rank).squaredNorm() / singular.squaredNorm();
      CHECK(energy(matrix, q, right) >= 0.99 * best);
    }
  }
}

TEST_CASE("the bases that the GPU finds are orthonormal and hold the dominant subspace", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const std::int64_t rank : {8, 72, 128}) check_bases(*gpu, rank, gradients);
}

TEST_CASE("a gradient without a subspace leaves a basis that is orthonormal", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  Family device(*gpu, options_of(OptimizerKind::fira, 16), DType::f32);
  for (std::size_t i = 0; i < kShapes.size(); ++i)  // rank 1, and nothing
    device.g[i].set(std::vector<float>(static_cast<std::size_t>(kShapes[i].numel()), i == 0 ? 1.0f : 0.0f));
  device.step(1);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    const Matrix q = as_matrix(device.states[i][0].get<float>(), std::min(kShapes[i][0], kShapes[i][1]), 16);
    CHECK((q.transpose() * q - Matrix::Identity(16, 16)).cwiseAbs().maxCoeff() <= 1e-4);
    for (const float x : device.weights(i)) REQUIRE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace kiln::test
