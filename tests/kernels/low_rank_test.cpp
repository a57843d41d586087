// The low-rank members on the GPU against the CPU's f32, and the bases that the GPU finds.
#include <Eigen/Dense>
#include <cmath>
#include <limits>

#include "catch.h"
#include "kernels/cuda_backend.h"
#include "kernels/update_family.h"

namespace kiln::test {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Matrix as_matrix(const std::vector<float>& values, std::int64_t rows, std::int64_t columns) {
  return Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(values.data(), rows,
                                                                                                 columns)
      .cast<double>();
}

/// Orthonormal columns, drawn from a seed.
std::vector<float> random_basis(const Shape& shape, std::uint64_t seed) {
  const Matrix random = as_matrix(normals(shape.numel(), seed, 1), shape[0], shape[1]);
  const Matrix basis =
      Eigen::HouseholderQR<Eigen::MatrixXd>(random).householderQ() * Eigen::MatrixXd::Identity(shape[0], shape[1]);
  std::vector<float> values;
  for (std::int64_t e = 0; e < shape.numel(); ++e) values.push_back(static_cast<float>(basis.data()[e]));
  return values;
}

OptimizerOptions options_of(OptimizerKind kind, std::int64_t rank) {
  return {.kind = kind, .eps = 1e-6, .weight_decay = 0.1, .rank = rank, .refresh = 50};
}

/// Numbers that differ by 2^-9, as products of rounded operands do, may take neighbouring codes, a hundredth of a
/// block's largest apart.
constexpr double kCodes = 3e-2;

/// Change of the weights relative to what the CPU's f32 changes, after `steps` steps from the same states.
void check_steps(Backend& gpu, const OptimizerOptions& options, DType gradients, int steps, double limit,
                 const std::vector<Shape>& shapes = kShapes) {
  Family device(gpu, options, gradients, shapes), host(cpu_backend(), options, gradients, shapes);
  CHECK(device.executor->packing().groups.size() == 1);  // all in one kernel's launches
  const bool random = options.kind == OptimizerKind::apollo || options.kind == OptimizerKind::apollo_mini;
  const std::size_t stored = random ? 0 : state_of(device, "exp_avg");  // tensors that hold a basis
  start(device, host);
  for (std::size_t i = 0; i < shapes.size() && stored > 0; ++i) {
    // A basis that is orthonormal and not the dominant one, the same on both.
    const std::vector<float> basis = random_basis(host.states[i][0].view().shape(), i + 50);
    CHECK(set_values(device, i, 0, basis) == set_values(host, i, 0, basis));
  }
  run_steps(device, host, 2, 2 + steps);
  compare(device, host, fmt::format("{} of rank {}", to_string(options.kind), options.rank), limit, limit, stored);
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

/// Moments in bf16 or int8 against the CPU's: near after steps with products of rounded operands, and the same bits
/// after one of the same numbers.
void check_rounded_moments(Backend& gpu, const OptimizerOptions& options, double limit) {
  check_steps(gpu, options, DType::f32, 5, limit);
  // Of a basis of unit vectors, products and first moments are the same bits on both.
  Family device(gpu, options, DType::bf16), host(cpu_backend(), options, DType::bf16);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    const Shape shape = host.states[i][0].view().shape();
    std::vector<float> basis(static_cast<std::size_t>(shape.numel()));
    for (std::int64_t j = 0; j < shape[1]; ++j) basis[static_cast<std::size_t>(j * shape[1] + j)] = 1;
    for (Family* each : {&device, &host}) {
      each->states[i][0].set(basis);
      each->set_gradient(i, gradient_of(kShapes[i], i, 2));
      each->set_weights(i, normals(kShapes[i].numel(), i + 1, 0.02));
    }
  }
  device.step(2);
  host.step(2);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    INFO(to_string(options.kind) << " of rank " << options.rank << ", " << kShapes[i].str() << ", states "
                                 << to_string(options.states));
    for (const std::string state : {"exp_avg", "exp_avg_sq"}) {
      const std::size_t s = state_of(device, state);
      CHECK(values_of(device, i, s) == values_of(host, i, s));
      if (options.states == StatePrecision::int8) {
        CHECK(device.states[i][s].get<std::uint8_t>() == host.states[i][s].get<std::uint8_t>());
        CHECK(device.states[i][s + 1].get<float>() == host.states[i][s + 1].get<float>());
      }
    }
  }
}

TEST_CASE("moments in bf16 and int8 on the GPU are rounded as on the CPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const OptimizerKind kind : {OptimizerKind::galore, OptimizerKind::fira, OptimizerKind::fira_plus}) {
    OptimizerOptions options = options_of(kind, 40);
    options.states = StatePrecision::bf16;
    check_rounded_moments(*gpu, options, 2e-2);  // numbers that differ by 2^-9 round apart now and then, by 2^-8
    options.states = StatePrecision::int8;
    check_rounded_moments(*gpu, options, kCodes);
    options.rank = 8;
    check_rounded_moments(*gpu, options, kCodes);
    options.rank = 64;
    check_rounded_moments(*gpu, options, kCodes);
  }
}

TEST_CASE("moments of codes on the GPU follow the CPU's where a piece has many blocks", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const std::int64_t rank : {264, 520, 600}) {  // 33, 65 and 75 blocks hold whole vectors
    OptimizerOptions options = options_of(OptimizerKind::fira, rank);
    options.states = StatePrecision::int8;
    check_steps(*gpu, options, DType::bf16, 2, kCodes, kLargeShapes);
  }
}

TEST_CASE("bases in bf16 and int8 on the GPU are read as on the CPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const StatePrecision projector : {StatePrecision::bf16, StatePrecision::int8})
    for (const OptimizerKind kind : {OptimizerKind::galore, OptimizerKind::fira}) {
      OptimizerOptions options = options_of(kind, 40);
      options.projector_states = projector;
      check_steps(*gpu, options, DType::f32, 5, 1e-2);
    }
}

/// Refreshes with the basis as `options` says and in f32, from the same basis: the first is the second, rounded.
void check_stored_bases(Backend& gpu, OptimizerOptions options) {
  options.refresh = 4;
  OptimizerOptions whole = options;
  whole.projector_states = StatePrecision::fp32;
  Family stored(gpu, options, DType::f32), exact(gpu, whole, DType::f32);
  for (int step = 1; step <= 5; ++step) {
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      for (Family* each : {&stored, &exact}) each->set_gradient(i, gradient_of(kShapes[i], i, step));
      if (step > 1) exact.states[i][0].set(values_of(stored, i, 0));
    }
    std::vector<std::vector<float>> before;
    for (std::size_t i = 0; i < kShapes.size(); ++i) before.push_back(values_of(stored, i, 0));
    stored.step(step);
    exact.step(step);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      INFO(to_string(options.kind) << ", basis of " << to_string(options.projector_states) << ", step " << step << ", "
                                   << kShapes[i].str());
      const std::int64_t offset = static_cast<std::int64_t>(i) * 4 / static_cast<std::int64_t>(kShapes.size());
      const bool due = step == 1 || (step - 1) % 4 == offset;
      const std::vector<float> found = values_of(stored, i, 0);
      CHECK((found != before[i]) == due);
      if (!due) continue;
      Family codec(cpu_backend(), options, DType::f32);
      CHECK(found == set_values(codec, i, 0, exact.states[i][0].get<float>()));
    }
  }
}

TEST_CASE("a basis in bf16 or int8 on the GPU is the one in f32, rounded", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const StatePrecision projector : {StatePrecision::bf16, StatePrecision::int8})
    for (const OptimizerKind kind : {OptimizerKind::fira, OptimizerKind::fira_plus}) {
      OptimizerOptions options = options_of(kind, 40);
      options.projector_states = projector;
      check_stored_bases(*gpu, options);
    }
}

Matrix squares(const Matrix& x) { return x.cwiseProduct(x); }
std::vector<double> entries(const Matrix& x) { return {x.data(), x.data() + x.size()}; }

/// One step of Fira+ with a refresh of all matrices: what becomes of moments that held five steps, against
/// optim/low_rank_adam.h in f64 with the bases that the GPU had and found.
void check_rotation(Backend& gpu, StatePrecision states, DType gradients, double limit,
                    StatePrecision basis_states = StatePrecision::fp32,
                    ProjectorKind projector = ProjectorKind::power) {
  OptimizerOptions options = options_of(OptimizerKind::fira_plus, 40);
  options.projector = projector;
  options.states = states;
  options.projector_states = basis_states;
  options.refresh = 5;
  options.stagger = false;
  Family device(gpu, options, gradients);
  const std::size_t first_moment = state_of(device, "exp_avg"), second_moment = state_of(device, "exp_avg_sq");
  std::vector<Matrix> q, m, v, g;
  const double c1 = 1 - std::pow(options.beta1, 5), c2 = 1 - std::pow(options.beta2, 5), clip = 0.7;
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    const std::vector<DeviceArray>& state = device.states[i];
    const Shape basis = state[0].view().shape(), moments = state[first_moment].view().shape();
    q.push_back(as_matrix(set_values(device, i, 0, random_basis(basis, i + 50)), basis[0], basis[1]));
    std::vector<float> mean = normals(moments.numel(), i + 60, 1e-2), square = normals(moments.numel(), i + 70, 1e-2);
    for (std::size_t e = 0; e < mean.size(); ++e)
      square[e] = static_cast<float>(c2) * (square[e] * square[e] + mean[e] * mean[e] / static_cast<float>(c1 * c1));
    m.push_back(as_matrix(set_values(device, i, first_moment, mean), moments[0], moments[1]));
    v.push_back(as_matrix(set_values(device, i, second_moment, square), moments[0], moments[1]));
    g.push_back(as_matrix(gradient_of(kShapes[i], i, 6), kShapes[i][0], kShapes[i][1]));
    device.set_weights(i, normals(kShapes[i].numel(), i + 1, 0.02));
    device.set_gradient(i, gradient_of(kShapes[i], i, 6));
  }
  device.step(6);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    INFO(kShapes[i].str() << ", moments of " << to_string(states) << ", basis of " << to_string(basis_states)
                          << ", gradients of " << to_string(gradients)
                          << (projector == ProjectorKind::svd ? ", svd" : ", power"));
    const Matrix found = as_matrix(values_of(device, i, 0), q[i].rows(), q[i].cols()), turn = q[i].transpose() * found;
    const Matrix r = clip * (kShapes[i][0] >= kShapes[i][1] ? Matrix(g[i] * found) : Matrix(g[i].transpose() * found));
    auto moment = [&](const Matrix& before) { return entries(options.beta1 * before + (1 - options.beta1) * r); };
    auto square = [&](const Matrix& before) {
      return entries(options.beta2 * before + (1 - options.beta2) * squares(r));
    };
    const Matrix mean = m[i] / c1, turned = mean * turn;
    const Matrix variance = (v[i] / c2 - squares(mean)) * squares(turn);
    const Matrix expected = c2 * (variance + squares(turned)).cwiseAbs();
    const std::vector<float> first = values_of(device, i, first_moment), second = values_of(device, i, second_moment);
    const std::vector<double> a(first.begin(), first.end()), b(second.begin(), second.end());
    CHECK(relative_error(a, moment(c1 * turned)) <= limit);
    CHECK(relative_error(b, square(expected)) <= limit);
    CHECK(relative_error(a, moment(m[i])) > 0.1);  // what an old basis would have left is far away
    CHECK(relative_error(b, square(v[i])) > 0.1);
  }
}

TEST_CASE("moments on the GPU follow a new basis", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  // R is the product of rounded operands, a tenth of the mean; bf16 rounds twice.
  check_rotation(*gpu, StatePrecision::fp32, DType::f32, 2e-3);
  check_rotation(*gpu, StatePrecision::fp32, DType::bf16, 2e-3);
  check_rotation(*gpu, StatePrecision::bf16, DType::f32, 8e-3);
  check_rotation(*gpu, StatePrecision::int8, DType::f32, kCodes);
  check_rotation(*gpu, StatePrecision::fp32, DType::f32, 2e-3, StatePrecision::bf16);
  check_rotation(*gpu, StatePrecision::fp32, DType::f32, 2e-3, StatePrecision::int8);
  check_rotation(*gpu, StatePrecision::int8, DType::bf16, kCodes, StatePrecision::int8);
  check_rotation(*gpu, StatePrecision::fp32, DType::bf16, 2e-3, StatePrecision::fp32, ProjectorKind::svd);
  check_rotation(*gpu, StatePrecision::bf16, DType::f32, 8e-3, StatePrecision::fp32, ProjectorKind::svd);
  check_rotation(*gpu, StatePrecision::int8, DType::f32, kCodes, StatePrecision::int8, ProjectorKind::svd);
}

TEST_CASE("APOLLO on the GPU follows the CPU's f32 through new projections", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16}) {
    OptimizerOptions options = options_of(OptimizerKind::apollo, 40);
    options.refresh = 3;
    options.alpha = 1;
    check_steps(*gpu, options, gradients, 6, 1e-2);
    options.stagger = false;
    options.states = StatePrecision::bf16;
    check_steps(*gpu, options, gradients, 5, 2e-2);
    options.states = StatePrecision::int8;
    check_steps(*gpu, options, gradients, 5, kCodes);
    check_steps(*gpu, options_of(OptimizerKind::apollo, 264), gradients, 2, 1e-2, kLargeShapes);
  }
}

TEST_CASE("APOLLO-Mini on the GPU follows the CPU's f32 through new projections", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16}) {
    // Dots are f32 of unrounded operands. P is drawn in f32, whose cosine is exact to 2^-24 of its largest.
    OptimizerOptions options = options_of(OptimizerKind::apollo_mini, 1);
    options.alpha = 128;
    options.refresh = 3;
    check_steps(*gpu, options, gradients, 6, 2e-5);
    options.refresh = 50;
    check_steps(*gpu, options, gradients, 2, 2e-5, kLargeShapes);
    options.stagger = false;
    options.states = StatePrecision::bf16;  // numbers that differ in the last bit round apart now and then, by 2^-8
    check_steps(*gpu, options, gradients, 5, 2e-3);
    options.states = StatePrecision::int8;  // of 128 numbers, one that takes another code is 0.3 % of the norm
    check_steps(*gpu, options, gradients, 5, 1e-2);
  }
}

TEST_CASE("ranks that the GPU has no kernels for are refused", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  auto refused = [&](const OptimizerOptions& o) { CHECK_THROWS_AS(Family(*gpu, o, DType::f32).step(1), Error); };
  refused(options_of(OptimizerKind::lora, 12));
  refused(options_of(OptimizerKind::fira, 12));  // not a multiple of 8
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

/// Furthest from orthonormal columns.
double skewness(const std::vector<float>& basis, const Shape& shape) {
  const Matrix q = as_matrix(basis, shape[0], shape[1]);
  return (q.transpose() * q - Matrix::Identity(q.cols(), q.cols())).cwiseAbs().maxCoeff();
}

/// A refresh by gradients of rank 1 and of nothing, at the first step (cold) or from bases of others (warm): the basis
/// is orthonormal, but for the rounding of what it is stored in, and is that of an f32 basis, rounded.
void check_without_subspace(Backend& gpu, StatePrecision stored, bool warm) {
  OptimizerOptions options = options_of(OptimizerKind::fira, 16);
  options.stagger = false;
  options.refresh = 4;
  Family exact(gpu, options, DType::f32);
  options.projector_states = stored;
  Family device(gpu, options, DType::f32);
  std::vector<std::vector<float>> before(kShapes.size());
  if (warm) {
    for (std::size_t i = 0; i < kShapes.size(); ++i)
      for (Family* each : {&device, &exact}) each->set_gradient(i, gradient_of(kShapes[i], i, 1));
    for (Family* each : {&device, &exact}) each->step(1);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      before[i] = values_of(device, i, 0);
      exact.states[i][0].set(before[i]);
    }
  }
  for (std::size_t i = 0; i < kShapes.size(); ++i)  // rank 1, and nothing
    for (Family* each : {&device, &exact})
      each->set_gradient(i, std::vector<float>(static_cast<std::size_t>(kShapes[i].numel()), i == 0 ? 1.0f : 0.0f));
  for (Family* each : {&device, &exact}) each->step(warm ? 5 : 1);
  // A rounding to bf16 moves each number by up to 2^-8 of it, so products of columns by 2^-7; equal numbers move
  // together.
  const double limit = stored == StatePrecision::fp32 ? 1e-4 : stored == StatePrecision::bf16 ? 8e-3 : 5e-2;
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    INFO("basis of " << to_string(stored) << (warm ? ", warm, " : ", cold, ") << kShapes[i].str());
    const Shape shape = device.states[i][0].view().shape();
    const std::vector<float> found = values_of(device, i, 0), whole = exact.states[i][0].get<float>();
    CHECK(skewness(found, shape) <= limit);
    for (const float x : device.weights(i)) REQUIRE(std::isfinite(x));
    if (warm && whole == before[i]) {  // a basis that cannot be improved stays
      CHECK(found == before[i]);
    } else {
      CHECK(skewness(whole, shape) <= 1e-4);
      Family codec(cpu_backend(), options, DType::f32);
      CHECK(found == set_values(codec, i, 0, whole));
    }
  }
}

TEST_CASE("a gradient without a subspace leaves a basis that is orthonormal", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const StatePrecision stored : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8})
    for (const bool warm : {false, true}) check_without_subspace(*gpu, stored, warm);
}

OptimizerOptions exact_options(OptimizerKind kind, std::int64_t rank) {
  OptimizerOptions options = options_of(kind, rank);
  options.projector = ProjectorKind::svd;
  options.refresh = 4;
  return options;
}
Matrix basis_of(const Family& family, std::size_t i) {
  const Shape shape = family.states[i][0].view().shape();
  return as_matrix(values_of(family.states[i][0]), shape[0], shape[1]);
}

/// Exact refreshes of one run against the CPU's: the same vectors with the same signs, so the same subspace and the
/// energy that the singular values allow. Both are made in f64 and rounded to f32 at the end.
void check_exact_bases(Backend& gpu, const OptimizerOptions& options, DType gradients) {
  Family device(gpu, options, gradients), host(cpu_backend(), options, gradients);
  start(device, host);
  std::vector<Matrix> last(kShapes.size());
  for (int step = 1; step <= 6; ++step) {
    run_steps(device, host, step, step + 1);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      INFO(to_string(options.kind) << " of rank " << options.rank << ", step " << step << ", " << kShapes[i].str()
                                   << ", gradients of " << to_string(gradients));
      const Matrix q = basis_of(device, i), expected = basis_of(host, i);
      const std::int64_t offset =
          options.stagger ? static_cast<std::int64_t>(i) * 4 / static_cast<std::int64_t>(kShapes.size()) : 0;
      const bool due = step == 1 || (step - 1) % 4 == offset;
      CHECK((step == 1 || q != last[i]) == due);
      last[i] = q;
      if (!due) continue;
      const Matrix one = q.transpose() * q - Matrix::Identity(q.cols(), q.cols());
      CHECK(one.cwiseAbs().maxCoeff() <= 1e-6);
      const Matrix difference = q * q.transpose() - expected * expected.transpose();
      CHECK(difference.norm() <= 1e-5 * std::sqrt(static_cast<double>(q.cols())));
      CHECK(relative_error(entries(q), entries(expected)) <= 1e-4);  // neighbours may be as close as that
      const Matrix g = as_matrix(values_of(host.g[i]), kShapes[i][0], kShapes[i][1]);
      const Eigen::VectorXd singular = Eigen::JacobiSVD<Eigen::MatrixXd>(g).singularValues();
      const double best = singular.head(q.cols()).squaredNorm() / singular.squaredNorm();
      CHECK(energy(g, q, kShapes[i][0] >= kShapes[i][1]) >= (1 - 1e-5) * best);
    }
  }
}

TEST_CASE("exact bases on the GPU are the CPU's", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const std::int64_t rank : {8, 72, 128}) {
      OptimizerOptions options = exact_options(OptimizerKind::galore, rank);
      check_exact_bases(*gpu, options, gradients);
      options.kind = OptimizerKind::fira_plus;  // whose new bases come through another place
      options.stagger = false;
      check_exact_bases(*gpu, options, gradients);
    }
}

TEST_CASE("GaLore and Fira of exact bases on the GPU follow the CPU's f32 through refreshes", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const OptimizerKind kind : {OptimizerKind::galore, OptimizerKind::fira})
      for (const bool stagger : {false, true}) {
        OptimizerOptions options = exact_options(kind, 24);
        options.stagger = stagger;
        Family device(*gpu, options, gradients), host(cpu_backend(), options, gradients);
        CHECK(device.executor->packing().groups.size() == 1);
        start(device, host);
        run_steps(device, host, 1, 11);  // the cold start, and refreshes at steps 5 and 9 or around them
        // Operands are rounded to bf16 at each step, and the first steps divide by small averages.
        compare(device, host, fmt::format("{} of svd", to_string(kind)), 2e-2, 2e-2);
      }
}

TEST_CASE("a plan with exact refreshes runs eagerly, and repeats bit for bit", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const OptimizerOptions options = exact_options(OptimizerKind::fira_plus, 24);
  Family replayed(*gpu, options, DType::bf16), eager(*gpu, options, DType::bf16);
  CHECK(gpu->blocks_host(replayed.plan));
  CHECK_FALSE(gpu->blocks_host(Family(*gpu, options_of(OptimizerKind::fira_plus, 24), DType::bf16).plan));
  start(replayed, eager);
  const auto replay = gpu->replay(replayed.plan);
  for (int step = 1; step <= 6; ++step) {
    for (std::size_t i = 0; i < kShapes.size(); ++i)
      for (Family* each : {&replayed, &eager}) each->set_gradient(i, gradient_of(kShapes[i], i, step));
    replay->run([&] { replayed.step(step); });
    eager.step(step);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      INFO("step " << step << ", " << kShapes[i].str());
      CHECK(replayed.weights(i) == eager.weights(i));
      for (std::size_t s = 0; s < eager.states[i].size(); ++s)
        CHECK(values_of(replayed.states[i][s]) == values_of(eager.states[i][s]));
    }
  }
}

TEST_CASE("a gradient that is not finite leaves an exact basis as it was", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Family device(*gpu, exact_options(OptimizerKind::fira, 16), gradients);
      std::vector<std::vector<float>> before;
      for (std::size_t i = 0; i < kShapes.size(); ++i) {
        before.push_back(set_values(device.states[i][0], random_basis(device.states[i][0].view().shape(), i + 50)));
        std::vector<float> g = gradient_of(kShapes[i], i, 1);
        if (i == 1) g[static_cast<std::size_t>(kShapes[i].numel()) - 3] = bad;
        device.set_gradient(i, g);
        device.set_weights(i, normals(kShapes[i].numel(), i + 1, 0.02));
      }
      device.step(1, std::numeric_limits<double>::quiet_NaN());  // a step that is skipped refreshes nothing
      for (std::size_t i = 0; i < kShapes.size(); ++i) CHECK(values_of(device.states[i][0]) == before[i]);
      device.step(1);
      for (std::size_t i = 0; i < kShapes.size(); ++i) {
        INFO(kShapes[i].str() << ", " << bad);
        CHECK((values_of(device.states[i][0]) == before[i]) == (i == 1));
      }
    }
}

TEST_CASE("exact bases of a gradient of lower rank are orthonormal", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  Family device(*gpu, exact_options(OptimizerKind::fira, 16), DType::f32);
  for (std::size_t i = 0; i < kShapes.size(); ++i)  // rank 1, and nothing
    device.g[i].set(std::vector<float>(static_cast<std::size_t>(kShapes[i].numel()), i == 0 ? 1.0f : 0.0f));
  device.step(1);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    const Matrix q = basis_of(device, i);
    CHECK((q.transpose() * q - Matrix::Identity(16, 16)).cwiseAbs().maxCoeff() <= 1e-6);
    for (const float x : device.weights(i)) REQUIRE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace kiln::test
