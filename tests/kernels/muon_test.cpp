// Muon on the GPU against the CPU's f32.
#include <cmath>

#include "kernels/cuda_backend.h"
#include "kernels/update_family.h"

namespace kiln::test {
namespace {

/// Several of a shape, not next to each other: they are batched.
const std::vector<Shape> kMany{{200, 136}, {136, 328}, {200, 136}, {128, 128}, {136, 328}, {200, 136}};

/// The iteration runs in bf16 as published. It maps small singular values to 0.7 to 1.2 by multiplying them, and with
/// them the roundings of X: on these matrices the same iteration with operands rounded on the host leaves 1 to 3 % of
/// the step. One iteration more or less, or another coefficient, changes the step by more than 30 %.
constexpr double kIterations = 0.05;

OptimizerOptions options_of(StatePrecision states, MuonScale scale) {
  return {.kind = OptimizerKind::muon, .weight_decay = 0.1, .states = states, .muon_scale = scale};
}

TEST_CASE("Muon on the GPU follows the CPU's f32", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8}) {
      const OptimizerOptions o =
          options_of(states, states == StatePrecision::fp32 ? MuonScale::match_rms : MuonScale::spectral);
      Family device(*gpu, o, gradients, kMany), host(cpu_backend(), o, gradients, kMany);
      CHECK(device.executor->packing().groups.size() == 1);  // all in one kernel's launches
      start(device, host);
      // The momentum does not depend on the iteration; in bf16 both draw the same bits. Of int8 a number near the
      // middle between two values may take either.
      const double limit = states == StatePrecision::fp32 ? 1e-6 : states == StatePrecision::bf16 ? 1e-3 : 2e-3;
      run_steps(device, host, 1, 2);
      compare(device, host, fmt::format("first step, states {}", to_string(states)), kIterations, limit);
      run_steps(device, host, 2, 5);
      compare(device, host, fmt::format("four steps, states {}", to_string(states)), kIterations, limit);
      for (std::size_t i = 0; states == StatePrecision::int8 && i < kMany.size(); ++i) {
        const CodeDistance distance = code_distance(device, host, i, 0);
        CHECK(distance.share <= 0.01);
        CHECK(distance.furthest <= 4);
      }
    }
}

TEST_CASE("Muon on the GPU follows the CPU's f32 where batches are full", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const OptimizerOptions o = options_of(StatePrecision::fp32, MuonScale::match_rms);
  // 17 MB of operands a matrix, of which a batch holds three.
  const std::vector<Shape> shapes{{1400, 1600}, {1600, 1400}, {1400, 1600}, {1400, 1600}, {1400, 1600}};
  Family device(*gpu, o, DType::bf16, shapes), host(cpu_backend(), o, DType::bf16, shapes);
  start(device, host);
  run_steps(device, host, 1, 2);
  compare(device, host, "large", kIterations, 1e-6);
}

TEST_CASE("Muon on the GPU repeats bit for bit, and leaves everything where the norm is not finite", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const StatePrecision states = GENERATE(StatePrecision::bf16, StatePrecision::int8);
  const OptimizerOptions o = options_of(states, MuonScale::match_rms);
  std::vector<std::vector<std::vector<float>>> weights, momenta;
  for (int run = 0; run < 2; ++run) {
    Family device(*gpu, o, DType::bf16, kMany);
    weights.emplace_back();
    momenta.emplace_back();
    for (std::size_t i = 0; i < kMany.size(); ++i) device.set_weights(i, normals(kMany[i].numel(), i + 1, 0.02));
    auto step = [&](int number, double norm) {
      for (std::size_t i = 0; i < kMany.size(); ++i) device.set_gradient(i, gradient_of(kMany[i], i, number));
      device.step(number, norm);
    };
    step(1, 1);
    step(2, 1);
    for (std::size_t i = 0; i < kMany.size(); ++i) {
      weights.back().push_back(device.weights(i));
      momenta.back().push_back(values_of(device, i, 0));
    }
    for (const double norm : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      step(3, norm);
      for (std::size_t i = 0; i < kMany.size(); ++i) {
        CHECK(device.weights(i) == weights.back()[i]);
        CHECK(values_of(device, i, 0) == momenta.back()[i]);
      }
    }
  }
  CHECK(weights[0] == weights[1]);
  CHECK(momenta[0] == momenta[1]);
}

TEST_CASE("Muon in bf16 rounds the masters' step stochastically", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const OptimizerOptions o = options_of(StatePrecision::fp32, MuonScale::match_rms);
  Family whole(*gpu, o, DType::f32), rounded(*gpu, o, DType::f32, kShapes, false);
  double sum = 0, squares = 0, count = 0;
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    for (Family* each : {&whole, &rounded}) {
      each->set_weights(i, std::vector<float>(static_cast<std::size_t>(kShapes[i].numel()), 0.0f));
      each->set_gradient(i, gradient_of(kShapes[i], i, 1));
    }
  }
  whole.step(1);
  rounded.step(1);
  for (std::size_t i = 0; i < kShapes.size(); ++i) {
    const std::vector<float> exact = whole.weights(i), found = rounded.weights(i);
    for (std::size_t e = 0; e < exact.size(); ++e) {
      const double x = static_cast<double>(exact[e]), error = static_cast<double>(found[e]) - x;
      REQUIRE(std::abs(error) <= 0x1p-7 * std::abs(x));  // one of the two neighbours
      sum += error;
      squares += error * error;
      count += 1;
    }
  }
  CHECK(squares > 0);
  CHECK(std::abs(sum) <= 5 * std::sqrt(squares));  // no bias
}

}  // namespace
}  // namespace kiln::test
