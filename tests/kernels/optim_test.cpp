// Norm and AdamW on the GPU: masters against the CPU's f32, stochastic rounding by its mean.
#include <cmath>

#include "catch.h"
#include "graph/parameter.h"
#include "kernels/cuda_backend.h"
#include "kernels/device_array.h"
#include "kernels/device_case.h"
#include "kernels/update_family.h"
#include "optim/adam.h"
#include "optim/gradient_norm.h"

namespace kiln::test {
namespace {

std::vector<double> doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }
std::vector<double> as_vector(const StepScalars& scalars) { return {scalars.begin(), scalars.end()}; }

constexpr std::int64_t kRows = 160, kColumns = 136, kFirst = 64;  // two parameters in one storage

/// Two parameters of one storage, one of them decayed, and the nodes that update them.
struct Updates {
  Backend& backend;
  Plan plan;
  DeviceArray w, low, g, scalars;
  std::vector<DeviceArray> states;
  std::unique_ptr<Executor> executor;

  Updates(Backend& device, const AdamUpdate::Options& options, bool masters, bool half_gradient = false)
      : backend(device),
        w(device, {{kRows, kColumns}, device.is_host() ? DType::f32 : DType::bf16}),
        low(device, {{kRows, kColumns}, DType::u16}),
        g(device, {{kRows, kColumns}, half_gradient && !device.is_host() ? DType::bf16 : DType::f32}),
        scalars(device, scalars_spec()) {
    const ValueId weights = plan.external("w", w.view().spec, Role::parameter);
    const ValueId gradient = plan.external("g", g.view().spec, Role::gradient);
    const ValueId step = plan.external("scalars", scalars_spec(), Role::input);
    const ValueId rest = masters ? plan.external("low", low.view().spec, Role::parameter) : ValueId{};
    std::vector<ValueId> state_ids;
    for (const bool second : {false, true}) {
      const Parameter parameter{.name = second ? "second" : "first",
                                .shape = {second ? kRows - kFirst : kFirst, kColumns},
                                .row_begin = second ? kFirst : 0,
                                .decay = second};
      std::vector<ValueId> inputs{weights, gradient, step};
      for (const StateSpec& state : AdamUpdate::states(parameter, options)) {
        states.emplace_back(device, state.spec);
        state_ids.push_back(plan.external(parameter.name + state.name, state.spec, Role::state));
        inputs.push_back(state_ids.back());
      }
      if (masters) inputs.push_back(rest);
      plan.add(std::make_shared<AdamUpdate>(parameter, options), inputs, "update");
    }
    executor = std::make_unique<Executor>(plan, 1, device);
    executor->bind(weights, w.view());
    executor->bind(gradient, g.view());
    executor->bind(step, scalars.view());
    if (masters) executor->bind(rest, low.view());
    for (std::size_t s = 0; s < states.size(); ++s) executor->bind(state_ids[s], states[s].view());
  }

  void step(int number, const std::vector<float>& gradient, double norm) {
    StepScalars values{};
    scalar(values, Scalar::step) = number;
    scalar(values, Scalar::lr) = 0.01;
    scalar(values, Scalar::clip_scale) = 0.7;
    scalar(values, Scalar::grad_norm) = norm;
    if (g.view().dtype() == DType::bf16)
      g.set(split(gradient).high);
    else
      g.set(gradient);
    backend.upload(scalars.view(), values.data());
    executor->run(Phase::micro, false);
  }
};

/// The same weights for both, masters on the device.
std::vector<float> start_weights(Updates& device, Updates& host) {
  const std::vector<float> start = normals(kRows * kColumns, 1, 0.02);
  const Halves halves = split(start);
  device.w.set(halves.high);
  device.low.set(halves.low);
  host.w.set(start);
  return start;
}

/// To bf16.
std::vector<float> rounded(std::vector<float> values) {
  for (float& x : values) x = to_float(to_bfloat16(x));
  return values;
}

AdamUpdate::Options options(AdamForm form) {
  return {.beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.1, .form = form, .seed = 3};
}

TEST_CASE("AdamW with masters on the GPU follows the CPU's f32 over 20 steps", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const AdamForm form : {AdamForm::pytorch, AdamForm::galore}) {
    const bool half = form == AdamForm::pytorch;  // gradients in bf16
    Updates device(*gpu, options(form), true, half), host(cpu_backend(), options(form), false);
    CHECK(device.executor->packing().groups.size() == 1);  // both in one launch
    const std::vector<float> start = start_weights(device, host);
    for (int step = 1; step <= 20; ++step) {
      std::vector<float> gradient = normals(kRows * kColumns, static_cast<std::uint64_t>(10 + step), 1e-3);
      if (half) gradient = rounded(gradient);
      device.step(step, gradient, 1);
      host.step(step, gradient, 1);
    }
    const std::vector<bfloat16> high = device.w.get<bfloat16>();
    const std::vector<float> masters = joined(high, device.low.get<std::uint16_t>()), expected = host.w.get<float>();
    CHECK(relative_error(doubles(masters), doubles(expected)) <= 2e-6);
    CHECK(relative_error(doubles(start), doubles(expected)) > 0.1);
    for (std::size_t s = 0; s < device.states.size(); ++s)
      CHECK(relative_error(doubles(device.states[s].get<float>()), doubles(host.states[s].get<float>())) <= 1e-6);
    // What the GEMMs read is the master rounded to the nearest bf16.
    std::size_t far = 0;
    for (std::size_t i = 0; i < high.size(); ++i)
      far += std::abs(to_float(high[i]) - masters[i]) > 0x1.01p-8f * std::abs(masters[i]) ? 1 : 0;
    CHECK(far == 0);

    // A step whose norm is not finite changes nothing.
    const std::vector<std::uint16_t> low = device.low.get<std::uint16_t>();
    const std::vector<float> moment = device.states[0].get<float>();
    device.step(21, normals(kRows * kColumns, 99, 1e-3), NAN);
    CHECK(joined(device.w.get<bfloat16>(), device.low.get<std::uint16_t>()) == masters);
    CHECK(device.low.get<std::uint16_t>() == low);
    CHECK(device.states[0].get<float>() == moment);
  }
}

TEST_CASE("AdamW with 8-bit states on the GPU follows the CPU's", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  AdamUpdate::Options o = options(AdamForm::pytorch);
  o.states = StatePrecision::int8;
  Updates device(*gpu, o, true), host(cpu_backend(), o, false);
  start_weights(device, host);
  for (int step = 1; step <= 5; ++step) {
    std::vector<float> gradient = normals(kRows * kColumns, static_cast<std::uint64_t>(10 + step), 1e-3);
    std::fill(gradient.begin() + 512, gradient.begin() + 1024, 0.0f);  // blocks of zeros
    device.step(step, gradient, 1);
    host.step(step, gradient, 1);
    // Sums differ in the last bit, so that a number between two values may take either of them.
    for (std::size_t s = 0; s < device.states.size(); ++s) {
      if (device.states[s].view().dtype() != DType::u8) {
        CHECK(relative_error(doubles(device.states[s].get<float>()), doubles(host.states[s].get<float>())) <= 1e-2);
        continue;
      }
      const std::vector<std::uint8_t> a = device.states[s].get<std::uint8_t>(), b = host.states[s].get<std::uint8_t>();
      std::size_t others = 0;
      int furthest = 0;
      for (std::size_t i = 0; i < a.size(); ++i) {
        others += a[i] != b[i] ? 1 : 0;
        furthest = std::max(furthest, std::abs(a[i] - b[i]));
      }
      CHECK(others <= a.size() / 100);
      CHECK(furthest <= (step == 1 ? 1 : 4));
    }
  }
  const std::vector<float> masters = joined(device.w.get<bfloat16>(), device.low.get<std::uint16_t>());
  CHECK(relative_error(doubles(masters), doubles(host.w.get<float>())) <= 1e-3);
}

TEST_CASE("AdamW's 8-bit states on the GPU may end within a block", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const OptimizerOptions o{.kind = OptimizerKind::adam8bit, .weight_decay = 0.1, .states = StatePrecision::int8};
  const std::vector<Shape> shapes{{200, 136}, {8, 24}, {40, 56}};
  Family device(*gpu, o, DType::f32, shapes), host(cpu_backend(), o, DType::f32, shapes);
  start(device, host);
  run_steps(device, host, 1, 5);
  compare(device, host, "AdamW, states int8", 1e-2, 1e-2);
}

TEST_CASE("AdamW's states in bf16 on the GPU are rounded by the CPU's draws", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  AdamUpdate::Options o = options(AdamForm::pytorch);
  o.states = StatePrecision::bf16;
  Updates device(*gpu, o, true), host(cpu_backend(), o, false);
  start_weights(device, host);
  const std::vector<float> gradient = normals(kRows * kColumns, 11, 1e-3);
  device.step(1, gradient, 1);
  host.step(1, gradient, 1);
  for (std::size_t s = 0; s < device.states.size(); ++s) {
    const std::vector<bfloat16> a = device.states[s].get<bfloat16>(), b = host.states[s].get<bfloat16>();
    std::size_t others = 0;  // f32 sums differ in the last bit, which 16 random bits rarely carry over
    for (std::size_t i = 0; i < a.size(); ++i) others += a[i].bits != b[i].bits ? 1 : 0;
    CHECK(others <= a.size() / 1000);
  }
}

/// Weights of 1 after one step that takes 0.01 from each.
std::vector<float> rounded_step(Backend& gpu, std::uint64_t seed, int step) {
  AdamUpdate::Options o = options(AdamForm::pytorch);
  o.weight_decay = 0;
  o.beta1 = o.beta2 = 0;  // the step is lr g / |g|
  o.seed = seed;
  Updates updates(gpu, o, false);
  updates.w.set(std::vector<std::uint16_t>(kRows * kColumns, 0x3f80));
  updates.step(step, std::vector<float>(kRows * kColumns, 0.5f), 1);
  std::vector<float> values;
  for (const bfloat16 w : updates.w.get<bfloat16>()) values.push_back(to_float(w));
  return values;
}

TEST_CASE("AdamW in bf16 rounds stochastically, without bias, and by the seed", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const std::vector<float> w = rounded_step(*gpu, 7, 1);
  // 0.99 lies between the bf16 numbers 0.98828125 and 0.9921875.
  double mean = 0;
  for (const float x : w) {
    mean += static_cast<double>(x) / static_cast<double>(w.size());
    REQUIRE((x == 0.98828125f || x == 0.9921875f));
  }
  const double spacing = 0.00390625, chance = (0.99 - 0.98828125) / spacing;
  const double deviation = spacing * std::sqrt(chance * (1 - chance) / static_cast<double>(w.size()));
  CHECK(std::abs(mean - 0.99) <= 5 * deviation);
  CHECK(rounded_step(*gpu, 7, 1) == w);
  CHECK(rounded_step(*gpu, 8, 1) != w);
  CHECK(rounded_step(*gpu, 7, 2) != w);
  // The two parameters draw from streams of their own.
  const auto row = [&](std::int64_t r) {
    return std::vector<float>(w.begin() + r * kColumns, w.begin() + (r + 1) * kColumns);
  };
  CHECK(row(0) != row(kFirst));
}

/// Every second gradient is bf16 on the GPU.
StepScalars norm_of(Backend& backend, const std::vector<std::vector<float>>& gradients, double clip, double loss) {
  Plan plan;
  std::vector<ValueId> ids;
  std::vector<DeviceArray> memory;
  for (const std::vector<float>& gradient : gradients) {
    const bool half = ids.size() % 2 == 1 && !backend.is_host();
    memory.emplace_back(backend,
                        TensorSpec{{static_cast<std::int64_t>(gradient.size())}, half ? DType::bf16 : DType::f32});
    if (half)
      memory.back().set(split(gradient).high);
    else
      memory.back().set(gradient);
    ids.push_back(plan.external("g", memory.back().view().spec, Role::gradient));
  }
  memory.emplace_back(backend, scalars_spec());
  ids.push_back(plan.external("scalars", scalars_spec(), Role::input));
  StepScalars values{};
  scalar(values, Scalar::loss) = loss;
  backend.upload(memory.back().view(), values.data());
  plan.add(std::make_shared<GradientNorm>(GradientNorm::Options{.clip_norm = clip}), ids, "norm");
  Executor executor(plan, 1, backend);
  for (std::size_t i = 0; i < ids.size(); ++i) executor.bind(ids[i], memory[i].view());
  executor.poison();
  executor.run(Phase::micro, false);
  backend.download(values.data(), memory.back().view());
  return values;
}

TEST_CASE("the gradient norm on the GPU, and what stops an update", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  std::vector<std::vector<float>> gradients;
  std::uint64_t seed = 20;
  for (const std::int64_t n : {1, 3, 1024, 16384, 16385, 100001}) gradients.push_back(rounded(normals(n, seed++, 0.1)));
  for (const double clip : {0.0, 1.0, 1000.0}) {
    const StepScalars found = norm_of(*gpu, gradients, clip, 2.5),
                      expected = norm_of(cpu_backend(), gradients, clip, 2.5);
    CHECK(relative_error(as_vector(found), as_vector(expected)) <= 1e-6);
    CHECK(found[static_cast<std::size_t>(Scalar::clip_scale)] ==
          Approx(expected[static_cast<std::size_t>(Scalar::clip_scale)]).epsilon(1e-6));
  }
  StepScalars stopped = norm_of(*gpu, gradients, 1.0, NAN);
  CHECK_FALSE(std::isfinite(scalar(stopped, Scalar::grad_norm)));
  gradients[4].back() = INFINITY;
  stopped = norm_of(*gpu, gradients, 1.0, 2.5);
  CHECK_FALSE(std::isfinite(scalar(stopped, Scalar::grad_norm)));
}

}  // namespace
}  // namespace kiln::test
