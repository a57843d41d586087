#include "ops/op_case.h"

#include <cmath>

#include "base/rng.h"
#include "catch.h"
#include "graph/parameter.h"

namespace kiln::test {
namespace {

/// y = x, so that an input is an activation and not a parameter to the op under test.
class Copy final : public Op {
 public:
  std::string_view name() const override { return "test_copy"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override { return {in[0]}; }
  void gradient(GradientContext& context) const override {
    context.set_grad_in(0, context.add(std::make_shared<Copy>(), {context.grad_out(0)}, "copy.dx")[0]);
  }
  void run_cpu(const KernelArgs& args) const override {
    const auto* from = static_cast<const std::byte*>(args.in[0].data);
    std::copy(from, from + args.in[0].bytes(), static_cast<std::byte*>(args.out[0].data));
  }
};

/// sum(x * seed), whose gradient is the seed.
class WeightedSum final : public Op {
 public:
  std::string_view name() const override { return "test_weighted_sum"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override { return {{{1}, in[0].dtype}}; }
  void gradient(GradientContext& context) const override {
    context.set_grad_in(0, context.add(std::make_shared<Copy>(), {context.in(1)}, "seed")[0]);
  }
  void run_cpu(const KernelArgs& args) const override {
    double total = 0;
    for (std::size_t i = 0; i < args.in[0].span<double>().size(); ++i)
      total += args.in[0].span<double>()[i] * args.in[1].span<double>()[i];
    *args.out[0].as<double>() = total;
  }
};

bool converts(const TensorSpec& spec) { return spec.dtype == DType::f64 && spec != scalars_spec(); }

std::vector<HostTensor> make_inputs(const OpCase& c) {
  std::vector<HostTensor> inputs;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    inputs.emplace_back(c.inputs[i]);
    if (!converts(c.inputs[i])) continue;
    const std::vector<double> values = random_values(c.inputs[i].shape.numel(), i + 1);
    std::copy(values.begin(), values.end(), inputs.back().span<double>().begin());
  }
  if (c.prepare) c.prepare(inputs);
  return inputs;
}

HostTensor converted(const HostTensor& source, DType dtype) {
  const Tensor from = source.view();
  HostTensor to({from.shape(), converts(from.spec) ? dtype : from.dtype()});
  if (to.view().dtype() == from.dtype()) {
    const auto* bytes = static_cast<const std::byte*>(from.data);
    std::copy(bytes, bytes + from.bytes(), static_cast<std::byte*>(to.view().data));
  } else {
    std::transform(from.span<double>().begin(), from.span<double>().end(), to.span<float>().begin(),
                   [](double x) { return static_cast<float>(x); });
  }
  return to;
}

/// Largest error over the largest expected value; infinite where the result is not finite.
double worst(const Tensor& found, const std::vector<double>& expected) {
  REQUIRE(found.numel() == static_cast<std::int64_t>(expected.size()));
  double most = 0, scale = 1e-30;
  for (const double e : expected) scale = std::max(scale, std::abs(e));
  visit_real(found.dtype(), [&]<typename T>() {
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double value = static_cast<double>(found.span<T>()[i]);
      most = std::isfinite(value) ? std::max(most, std::abs(value - expected[i])) : INFINITY;
    }
  });
  return most / scale;
}

/// The op behind copies, reduced to one number.
struct Differentiable {
  Plan plan;
  std::vector<ValueId> inputs;
  ValueId loss, seed;
  std::vector<HostTensor> memory;
  HostTensor seed_memory;

  explicit Differentiable(const OpCase& c) : memory(make_inputs(c)) {
    std::vector<ValueId> fed;
    for (std::size_t i = 0; i < c.inputs.size(); ++i) {
      const bool wanted = std::find(c.gradients.begin(), c.gradients.end(), static_cast<int>(i)) != c.gradients.end();
      inputs.push_back(plan.external("input", c.inputs[i], wanted ? Role::parameter : Role::input));
      fed.push_back(c.inputs[i].dtype == DType::f64 && converts(c.inputs[i])
                        ? plan.add1(std::make_shared<Copy>(), {inputs.back()}, "copy")
                        : inputs.back());
    }
    const std::vector<ValueId> out = plan.add(c.op, fed, "op");
    const ValueId result = out.empty() ? fed[0] : out[0];
    if (c.loss) {
      loss = result;
    } else {
      seed = plan.external("seed", plan.value(result).spec, Role::input);
      seed_memory = HostTensor(plan.value(result).spec);
      const std::vector<double> values = random_values(seed_memory.view().numel(), 99);
      std::copy(values.begin(), values.end(), seed_memory.span<double>().begin());
      loss = plan.add1(std::make_shared<WeightedSum>(), {result, seed}, "loss");
    }
    plan.keep(loss);
    plan.backward(loss);
    for (const int i : c.gradients) plan.keep(plan.gradient(inputs[static_cast<std::size_t>(i)]));
  }

  void bind(Executor& executor) {
    for (std::size_t i = 0; i < inputs.size(); ++i) executor.bind(inputs[i], memory[i].view());
    if (seed.valid()) executor.bind(seed, seed_memory.view());
  }
};

}  // namespace

std::vector<double> random_values(std::int64_t count, std::uint64_t seed) {
  const Philox random(seed, 7);
  std::vector<double> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 2 * random.uniform(i) - 1;
  return values;
}

void check_forward(const OpCase& c) {
  const std::vector<HostTensor> inputs = make_inputs(c);
  const std::vector<double> expected = c.reference(inputs);
  for (const DType dtype : {DType::f64, DType::f32}) {
    std::vector<HostTensor> memory;
    Plan plan;
    std::vector<ValueId> ids;
    for (const HostTensor& input : inputs) {
      memory.push_back(converted(input, dtype));
      ids.push_back(plan.external("input", memory.back().view().spec, Role::input));
    }
    const std::vector<ValueId> out = plan.add(c.op, ids, "op");
    for (const ValueId id : out) plan.keep(id);
    Executor executor(plan, 1);
    for (std::size_t i = 0; i < ids.size(); ++i) executor.bind(ids[i], memory[i].view());
    executor.poison();
    executor.run(Phase::micro, false);
    const Tensor found = out.empty() ? memory[0].view() : executor.tensor(out[0]);
    INFO(c.name << " in " << to_string(dtype));
    CHECK(worst(found, expected) <= (dtype == DType::f64 ? 1e-12 : c.f32_tolerance));
  }
}

void check_gradients(const OpCase& c) {
  Differentiable d(c);
  Executor executor(d.plan, 1);
  d.bind(executor);
  auto value = [&] {
    executor.run(Phase::micro, false);
    double total = 0;
    for (const double x : executor.tensor(d.loss).span<double>()) total += x;
    return c.loss ? total * scalar(d.memory.back().view(), Scalar::loss_scale) : total;
  };
  for (const int i : c.gradients) {
    executor.poison();
    value();
    const ValueId input = d.inputs[static_cast<std::size_t>(i)];
    const auto found = executor.tensor(d.plan.gradient(input)).span<double>();
    const std::vector<double> analytic(found.begin(), found.end());
    const auto x = d.memory[static_cast<std::size_t>(i)].span<double>();
    const std::size_t stride = std::max<std::size_t>(1, x.size() / 300);  // a sample of a large input
    double error = 0, norm = 0;
    for (std::size_t e = 0; e < x.size(); e += stride) {
      const double kept = x[e], h = 1e-4;
      x[e] = kept + h;
      const double above = value();
      x[e] = kept - h;
      const double below = value();
      x[e] = kept;
      const double numeric = (above - below) / (2 * h);
      error += (numeric - analytic[e]) * (numeric - analytic[e]);
      norm += numeric * numeric;
    }
    INFO(c.name << ": gradient of input " << i);
    REQUIRE(norm > 0);
    CHECK(std::sqrt(error / norm) <= 1e-6);
  }
}

}  // namespace kiln::test
