#pragma once
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "graph/parameter.h"
#include "kernels/device_array.h"
#include "kernels/device_case.h"
#include "optim/state_codec.h"

/// Updates of several matrices by one member, on a GPU and on the CPU.
namespace kiln::test {

/// The matrices of a group: tall, wide and square, none a multiple of the kernels' tiles.
inline const std::vector<Shape> kShapes{{200, 136}, {136, 328}, {128, 128}};
/// More tiles than any GPU has multiprocessors: blocks walk along them, from panel to panel and matrix to matrix.
inline const std::vector<Shape> kLargeShapes{{3000, 1400}, {1000, 936}, {1400, 3000}};

/// One node for each matrix, each with a storage of its own.
struct Family {
  Backend& backend;
  std::vector<Shape> shapes;
  DType gradients;
  bool masters;  // on a device: f32, split; else bf16 rounded stochastically
  Plan plan;
  std::vector<DeviceArray> w, low, g;
  DeviceArray scalars;
  std::vector<std::vector<DeviceArray>> states;
  std::vector<StateSpec> state_specs;  // of each matrix, but for their shapes
  std::unique_ptr<Executor> executor;

  Family(Backend& device, const OptimizerOptions& options, DType gradient, std::vector<Shape> of = kShapes,
         bool split = true, const std::vector<Shape>& own = {})
      : backend(device),
        shapes(std::move(of)),
        gradients(gradient),
        masters(split && !device.is_host()),
        scalars(device, scalars_spec()) {
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
                                .low_rank_count = static_cast<std::int64_t>(shapes.size()),
                                .own = own.empty() ? Shape() : own[i]};
      w.emplace_back(device, TensorSpec{shapes[i], device.is_host() ? DType::f32 : DType::bf16});
      g.emplace_back(device, TensorSpec{shapes[i], device.is_host() ? DType::f32 : gradient});
      low.emplace_back(device, TensorSpec{shapes[i], DType::u16});
      std::vector<ValueId> inputs{external("w", w[i], Role::parameter), external("g", g[i], Role::gradient), step};
      states.emplace_back();
      state_specs = optimizer->states(parameter);
      for (const StateSpec& state : state_specs) {
        states[i].emplace_back(device, state.spec);
        inputs.push_back(external(state.name, states[i].back(), Role::state));
      }
      if (masters) inputs.push_back(external("low", low[i], Role::parameter));
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
    if (backend.is_host()) return w[i].get<float>();
    return joined(w[i].get<bfloat16>(), masters ? low[i].get<std::uint16_t>() : no_rest(i));
  }
  std::vector<std::uint16_t> no_rest(std::size_t i) const {
    return std::vector<std::uint16_t>(static_cast<std::size_t>(shapes[i].numel()), 0);
  }
  void step(int number, double norm = 1) {
    StepScalars values{};
    scalar(values, Scalar::step) = number;
    scalar(values, Scalar::lr) = 0.01;
    scalar(values, Scalar::clip_scale) = 0.7;
    scalar(values, Scalar::grad_norm) = norm;
    backend.upload(scalars.view(), values.data());
    executor->run(Phase::micro, false);
  }
};

/// The state of that name; of codes, their scales follow.
inline std::size_t state_of(const Family& family, const std::string& name) {
  for (std::size_t s = 0; s < family.state_specs.size(); ++s)
    if (family.state_specs[s].name == name) return s;
  throw Error(ExitCode::usage, "no state " + name);
}
/// The map of a state's codes.
inline const StateMap& map_of(const Family& family, std::size_t s) {
  return state_map(family.state_specs[s].name.ends_with("exp_avg_sq") ? StateValues::positive : StateValues::any);
}

/// The values of a state of f32 or bf16.
inline std::vector<float> values_of(const DeviceArray& state) {
  if (state.view().dtype() == DType::f32) return state.get<float>();
  std::vector<float> values;
  for (const bfloat16 x : state.get<bfloat16>()) values.push_back(to_float(x));
  return values;
}

/// Sets a state, rounded to what it holds; returns that.
inline std::vector<float> set_values(const DeviceArray& state, const std::vector<float>& values) {
  if (state.view().dtype() == DType::f32) {
    state.set(values);
  } else {
    std::vector<bfloat16> halves;
    for (const float x : values) halves.push_back(to_bfloat16(x));
    state.set(halves);
  }
  return values_of(state);
}

/// The values of state `s` of matrix `i`, in any precision.
inline std::vector<float> values_of(const Family& family, std::size_t i, std::size_t s) {
  const DeviceArray& state = family.states[i][s];
  if (state.view().dtype() != DType::u8) return values_of(state);
  const std::vector<std::uint8_t> codes = state.get<std::uint8_t>();
  const std::vector<float> scales = family.states[i][s + 1].get<float>();
  std::vector<float> values;
  for (std::size_t e = 0; e < codes.size(); ++e)
    values.push_back(map_of(family, s).values[codes[e]] * scales[e / static_cast<std::size_t>(kStateBlock)]);
  return values;
}
/// Sets it, rounded to what it holds; returns that.
inline std::vector<float> set_values(const Family& family, std::size_t i, std::size_t s,
                                     const std::vector<float>& values) {
  const DeviceArray& state = family.states[i][s];
  if (state.view().dtype() != DType::u8) return set_values(state, values);
  constexpr auto kBlock = static_cast<std::size_t>(kStateBlock);
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  for (std::size_t e = 0; e < values.size(); ++e) {
    if (e % kBlock == 0) {
      scales.push_back(0);
      for (std::size_t other = e; other < std::min(e + kBlock, values.size()); ++other)
        scales.back() = std::max(scales.back(), std::abs(values[other]));
    }
    codes.push_back(state_code(map_of(family, s), scales.back() > 0 ? values[e] / scales.back() : 0.0f));
  }
  state.set(codes);
  family.states[i][s + 1].set(scales);
  return values_of(family, i, s);
}
/// Share of a state's codes that differ, and by how many values at most.
struct CodeDistance {
  double share = 0;
  int furthest = 0;
};
inline CodeDistance code_distance(const Family& one, const Family& other, std::size_t i, std::size_t s) {
  const std::vector<std::uint8_t> a = one.states[i][s].get<std::uint8_t>(), b = other.states[i][s].get<std::uint8_t>();
  CodeDistance distance;
  for (std::size_t e = 0; e < a.size(); ++e) {
    distance.share += a[e] != b[e] ? 1.0 / static_cast<double>(a.size()) : 0.0;
    distance.furthest = std::max(distance.furthest, std::abs(a[e] - b[e]));
  }
  return distance;
}

/// A decaying spectrum with noise, so that there is a subspace to find and a residual.
inline std::vector<float> gradient_of(const Shape& shape, std::size_t matrix, int step) {
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

/// The same weights for both.
inline void start(Family& device, Family& host) {
  for (std::size_t i = 0; i < device.shapes.size(); ++i)
    for (Family* each : {&device, &host}) each->set_weights(i, normals(device.shapes[i].numel(), i + 1, 0.02));
}
/// Steps [first, end) with the same gradients.
inline void run_steps(Family& device, Family& host, int first, int end) {
  for (int step = first; step < end; ++step) {
    for (std::size_t i = 0; i < device.shapes.size(); ++i)
      for (Family* each : {&device, &host}) each->set_gradient(i, gradient_of(device.shapes[i], i, step));
    device.step(step);
    host.step(step);
  }
}
/// The change of the weights since start(), and the states from `first_state` on, relative to the host's.
inline void compare(const Family& device, const Family& host, const std::string& what, double limit, double state_limit,
                    std::size_t first_state = 0) {
  for (std::size_t i = 0; i < device.shapes.size(); ++i) {
    const std::vector<float> before = normals(device.shapes[i].numel(), i + 1, 0.02);
    std::vector<float> found = device.weights(i), expected = host.weights(i);
    for (std::size_t e = 0; e < before.size(); ++e) {
      found[e] -= before[e];
      expected[e] -= before[e];
    }
    INFO(what << ", " << device.shapes[i].str() << " (matrix " << i << "), gradients of "
              << to_string(device.gradients));
    CHECK(relative_error({found.begin(), found.end()}, {expected.begin(), expected.end()}) <= limit);
    for (std::size_t s = first_state; s < device.states[i].size(); ++s) {
      INFO("state " << s);
      const std::vector<float> a = values_of(device, i, s), b = values_of(host, i, s);
      CHECK(relative_error({a.begin(), a.end()}, {b.begin(), b.end()}) <= state_limit);
    }
  }
}

}  // namespace kiln::test
