// LoRA and ReLoRA on the GPU against the CPU's f32.
#include <algorithm>
#include <cmath>

#include "kernels/cuda_backend.h"
#include "kernels/update_family.h"

namespace kiln::test {
namespace {

/// States in their order; moments lie further back where they are codes with scales: state_of.
enum : std::size_t { kA, kB };
const std::string kMeanOfA = "lora_a_exp_avg", kSquareOfA = "lora_a_exp_avg_sq", kMeanOfB = "lora_b_exp_avg",
                  kSquareOfB = "lora_b_exp_avg_sq";

/// Products of operands in bf16: 2^-9 of an element, and twice that of a square. An eps of the gradients' size keeps
/// Adam's step smooth around zero, where its sign would be what rounding makes it.
constexpr double kProducts = 1e-2;
/// Numbers that products put apart may take neighbouring codes, a hundredth of a block's largest apart.
constexpr double kCodes = 3e-2;

OptimizerOptions options_of(OptimizerKind kind, std::int64_t rank) {
  return {.kind = kind,
          .eps = 1e-3,
          .weight_decay = 0.1,
          .rank = rank,
          .alpha = static_cast<double>(rank),
          .refresh = 5,
          .stagger = false,
          .rewarm = 10};
}

std::vector<double> doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

/// What W took against B A, which was zero at the start; both of the device, so that a term that the update forgets
/// shows.
void check_merged(const Family& device) {
  for (std::size_t i = 0; i < device.shapes.size(); ++i) {
    const std::vector<float> a = device.states[i][kA].get<float>(), b = device.states[i][kB].get<float>();
    const std::int64_t m = device.shapes[i][0], n = device.shapes[i][1], r = static_cast<std::int64_t>(b.size()) / m;
    const std::vector<float> before = normals(m * n, i + 1, 0.02), after = device.weights(i);
    std::vector<double> change, product;
    for (std::int64_t e = 0; e < m * n; ++e) {
      double sum = 0;
      for (std::int64_t k = 0; k < r; ++k)
        sum += static_cast<double>(b[static_cast<std::size_t>(e / n * r + k)]) *
               static_cast<double>(a[static_cast<std::size_t>(k * n + e % n)]);
      product.push_back(sum);
      change.push_back(static_cast<double>(after[static_cast<std::size_t>(e)]) -
                       static_cast<double>(before[static_cast<std::size_t>(e)]));
    }
    INFO(device.shapes[i].str());
    CHECK(relative_error(change, product) <= 2e-3);
  }
}

TEST_CASE("LoRA on the GPU follows the CPU's f32, and its weights follow B A", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const DType gradients : {DType::f32, DType::bf16})
    for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8})
      for (const std::int64_t rank : {8, 40}) {
        OptimizerOptions o = options_of(OptimizerKind::lora, rank);
        o.states = states;
        Family device(*gpu, o, gradients), host(cpu_backend(), o, gradients);
        start(device, host);
        run_steps(device, host, 1, 9);
        const bool coded = states == StatePrecision::int8;
        compare(device, host, fmt::format("LoRA of rank {}, states {}", rank, to_string(states)),
                coded ? kCodes : kProducts,
                coded                            ? kCodes
                : states == StatePrecision::fp32 ? kProducts
                                                 : 2 * kProducts);
        check_merged(device);
      }
}

TEST_CASE("A on the GPU is drawn as on the CPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const OptimizerKind kind : {OptimizerKind::lora, OptimizerKind::relora}) {
    const OptimizerOptions o = options_of(kind, 24);
    Family device(*gpu, o, DType::f32), host(cpu_backend(), o, DType::f32);
    start(device, host);
    for (std::size_t i = 0; i < kShapes.size(); ++i)
      for (Family* each : {&device, &host})
        each->set_gradient(i, std::vector<float>(static_cast<std::size_t>(kShapes[i].numel()), 0.0f));
    // A gradient of zero moves nothing but by decay: 1, then 6, where ReLoRA draws again.
    for (const int step : {1, 6}) {
      device.step(step);
      host.step(step);
      for (std::size_t i = 0; i < kShapes.size(); ++i) {
        INFO(to_string(kind) << ", step " << step << ", " << kShapes[i].str());
        const std::vector<float> a = device.states[i][kA].get<float>();
        CHECK(a == host.states[i][kA].get<float>());
        CHECK(std::ranges::count(a, 0.0f) < 10);
        CHECK(device.weights(i) == host.weights(i));
      }
    }
  }
}

TEST_CASE("a restart on the GPU keeps the CPU's moments", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const StatePrecision states : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8}) {
    OptimizerOptions o = options_of(OptimizerKind::relora, 24);
    o.states = states;
    Family device(*gpu, o, DType::f32), host(cpu_backend(), o, DType::f32);
    start(device, host);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      for (const std::string& name : {kMeanOfA, kSquareOfA, kMeanOfB, kSquareOfB}) {
        const std::size_t s = state_of(host, name);
        std::vector<float> values = normals(host.states[i][s].view().numel(), 10 * i + s, 1e-3);
        if (name == kSquareOfA || name == kSquareOfB)
          for (float& x : values) x *= x;
        CHECK(set_values(device, i, s, values) == set_values(host, i, s, values));
      }
      for (Family* each : {&device, &host}) {
        std::vector<float> b = normals(host.states[i][kB].view().numel(), i, 1);  // goes
        each->states[i][kB].set(b);
      }
    }
    run_steps(device, host, 6, 7);
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      INFO(kShapes[i].str() << ", states " << to_string(states));
      const std::size_t first = state_of(device, kMeanOfA), second = state_of(device, kSquareOfA);
      const std::vector<float> mean = values_of(device, i, first);
      // B is zero, and so is the gradient of A: its moments are what was kept.
      CHECK(mean == values_of(host, i, first));
      CHECK(values_of(device, i, second) == values_of(host, i, second));
      const auto all = static_cast<std::int64_t>(mean.size()), kept = all - std::ranges::count(mean, 0.0f);
      if (states == StatePrecision::fp32)
        CHECK(kept == all - static_cast<std::int64_t>(0.99 * static_cast<double>(all)));
      else
        CHECK((kept >= all / 200 && kept <= all / 20));  // equal numbers stay together; small ones have the code of 0
      CHECK(relative_error(doubles(device.states[i][kA].get<float>()), doubles(host.states[i][kA].get<float>())) <=
            1e-6);
    }
    const double limit = states == StatePrecision::int8 ? kCodes : kProducts;
    compare(device, host, "restart", limit, limit);
    run_steps(device, host, 7, 9);
    compare(device, host, "after a restart", limit, limit);
  }
}

TEST_CASE("LoRA on the GPU leaves everything where the norm is not finite", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const OptimizerOptions o = options_of(OptimizerKind::relora, 24);
  Family device(*gpu, o, DType::bf16), host(cpu_backend(), o, DType::bf16);
  start(device, host);
  run_steps(device, host, 1, 3);
  for (const int step : {3, 6}) {  // 6 would be a restart
    std::vector<std::vector<float>> before, after;
    auto keep = [&](std::vector<std::vector<float>>& to) {
      for (std::size_t i = 0; i < kShapes.size(); ++i) {
        to.push_back(device.weights(i));
        for (std::size_t s = 0; s < device.states[i].size(); ++s) to.push_back(values_of(device, i, s));
      }
    };
    keep(before);
    device.step(step, NAN);
    keep(after);
    CHECK(before == after);
  }
}

}  // namespace
}  // namespace kiln::test
