#include "kernels/device_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "catch.h"
#include "graph/parameter.h"
#include "ops/last_row.h"
#include "ops/linear.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

/// A node without work, whose gradient rule records the op under test.
class GradientRoot final : public Op {
 public:
  GradientRoot(OpPtr op, int inputs, int gradient) : op_(std::move(op)), inputs_(inputs), gradient_(gradient) {}
  std::string_view name() const override { return "test_gradient_root"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec>) const override { return {{{1}, DType::f32}}; }
  void gradient(GradientContext& context) const override {
    std::vector<ValueId> inputs;
    for (int i = 1; i <= inputs_; ++i) inputs.push_back(context.in(i));
    outputs = context.add(op_, inputs, "gradient");
    context.set_grad_in(0, outputs[static_cast<std::size_t>(gradient_)]);
  }
  bool any_device() const override { return true; }
  void run_cpu(const KernelArgs&) const override {}

  mutable std::vector<ValueId> outputs;  // what the rule recorded

 private:
  OpPtr op_;
  int inputs_, gradient_;
};

bool is_real(DType dtype) { return dtype == DType::bf16 || dtype == DType::f32; }

/// The inputs as the CPU reads them.
std::vector<HostTensor> host_inputs(const DeviceCase& c) {
  std::vector<HostTensor> list;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    const TensorSpec& spec = c.inputs[i].spec;
    list.emplace_back(TensorSpec{spec.shape, is_real(spec.dtype) ? DType::f64 : spec.dtype});
    if (!is_real(spec.dtype)) continue;
    const Philox random(i + 1, stream_of("values"));
    const std::span<double> values = list.back().span<double>();
    for (std::size_t n = 0; n < values.size(); ++n) values[n] = 2 * random.uniform(n) - 1;
  }
  if (c.prepare) c.prepare(list);
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    if (!is_real(c.inputs[i].spec.dtype)) continue;
    const bool narrow = c.inputs[i].spec.dtype == DType::bf16;
    for (double& x : list[i].span<double>()) {
      const auto value = static_cast<float>(x);
      x = static_cast<double>(narrow ? to_float(to_bfloat16(value)) : value);
    }
  }
  return list;
}

/// A host tensor's bytes in the dtype of a device.
std::vector<std::byte> bytes_as(const HostTensor& from, DType dtype) {
  const Tensor view = from.view();
  std::vector<std::byte> out(static_cast<std::size_t>(view.numel()) * size_of(dtype));
  if (view.dtype() == dtype) {
    std::memcpy(out.data(), view.data, out.size());
    return out;
  }
  const std::span<const double> values = from.span<double>();
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto value = static_cast<float>(values[i]);
    if (dtype == DType::bf16) {
      const bfloat16 half = to_bfloat16(value);
      std::memcpy(out.data() + i * sizeof(half), &half, sizeof(half));
    } else {
      std::memcpy(out.data() + i * sizeof(value), &value, sizeof(value));
    }
  }
  return out;
}

std::vector<double> read(Backend& backend, const Tensor& from) {
  HostTensor host(from.spec);
  backend.download(host.view().data, from);
  std::vector<double> values(static_cast<std::size_t>(from.numel()));
  for (std::size_t i = 0; i < values.size(); ++i) switch (from.dtype()) {
      case DType::bf16:
        values[i] = static_cast<double>(to_float(host.span<bfloat16>()[i]));
        break;
      case DType::f32:
        values[i] = static_cast<double>(host.span<float>()[i]);
        break;
      default:
        values[i] = host.span<double>()[i];
    }
  return values;
}

/// Columns [first, last) of a matrix.
std::vector<double> part(const std::vector<double>& values, std::int64_t width, std::int64_t first, std::int64_t last) {
  std::vector<double> out;
  for (std::size_t row = 0; row < values.size(); row += static_cast<std::size_t>(width))
    out.insert(out.end(), values.begin() + static_cast<std::ptrdiff_t>(row) + first,
               values.begin() + static_cast<std::ptrdiff_t>(row) + last);
  return out;
}

}  // namespace

Input scalars() { return {scalars_spec()}; }

DeviceRun run_case(const DeviceCase& c, Backend& backend) {
  const std::vector<HostTensor> host = host_inputs(c);
  Plan plan;
  std::vector<ValueId> ids;
  std::vector<Buffer> memory;
  std::vector<Tensor> inputs;
  for (std::size_t i = 0; i < c.inputs.size(); ++i) {
    const TensorSpec spec = backend.is_host() ? host[i].view().spec : c.inputs[i].spec;
    ids.push_back(plan.external(fmt::format("input {}", i), spec, c.inputs[i].role));
    memory.push_back(backend.allocate(spec.bytes(), "test input"));
    inputs.push_back({memory.back().data(), spec});
    backend.upload(inputs.back(), bytes_as(host[i], spec.dtype).data());
  }
  const std::vector<Compared> compared = c.record(plan, ids);
  for (const Compared& each : compared)
    if (!plan.value(each.value).external) plan.keep(each.value);

  Executor executor(plan, c.micro_batches, backend);
  for (std::size_t i = 0; i < ids.size(); ++i) executor.bind(ids[i], inputs[i]);
  executor.poison();
  for (int m = 0; m < c.micro_batches; ++m) executor.run(Phase::micro, m > 0);

  DeviceRun run;
  run.groups = executor.packing().groups.size();
  for (const Compared& each : compared) {
    const Tensor tensor = executor.tensor(each.value);
    run.results.push_back({read(backend, tensor), tensor.shape(), each});
  }
  std::vector<bool> written(ids.size(), false);
  for (const Node& node : plan.nodes())
    for (const int m : node.op->mutates())
      for (std::size_t i = 0; i < ids.size(); ++i)
        if (node.in[static_cast<std::size_t>(m)] == ids[i]) written[i] = true;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (written[i] || c.inputs[i].spec == scalars_spec()) continue;
    std::vector<std::byte> after(inputs[i].bytes());
    backend.download(after.data(), inputs[i]);
    INFO(c.name << ": input " << i << " was only to be read");
    CHECK(after == bytes_as(host[i], inputs[i].dtype()));
  }
  return run;
}

double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  REQUIRE(found.size() == expected.size());
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  REQUIRE(norm > 0);
  return std::isfinite(error) ? std::sqrt(error / norm) : INFINITY;
}

void check_close(const std::string& name, const DeviceRun& found, const DeviceRun& expected) {
  REQUIRE(found.results.size() == expected.results.size());
  for (std::size_t i = 0; i < found.results.size(); ++i) {
    const DeviceRun::Result& result = found.results[i];
    const std::int64_t width = result.shape[result.shape.rank() - 1];
    std::vector<std::int64_t> borders = result.compared.columns;
    borders.insert(borders.begin(), 0);
    borders.push_back(width);
    for (std::size_t b = 0; b + 1 < borders.size(); ++b) {
      const std::vector<double> values = part(result.values, width, borders[b], borders[b + 1]);
      const double error = relative_error(values, part(expected.results[i].values, width, borders[b], borders[b + 1]));
      // Of few numbers, one that rounds badly is most of the norm.
      const double limit = result.compared.limit * (1 + 2 / std::sqrt(static_cast<double>(values.size())));
      INFO(name << ": value " << i << ", columns " << borders[b] << " to " << borders[b + 1]);
      CHECK(error <= limit);
    }
  }
}

void check_case(const DeviceCase& c, Backend& gpu) {
  INFO(c.name);
  check_close(c.name, run_case(c, gpu), run_case(c, cpu_backend()));
}

void check_row_order(const DeviceCase& c, Backend& gpu) {
  const auto run_after = [&](int turns) {
    const std::size_t own = c.inputs.size();
    DeviceCase led = c;
    led.inputs.push_back(bf16({8, 8}));
    led.inputs.push_back(bf16({1, 16}));
    led.record = [&c, own, turns](Plan& plan, const std::vector<ValueId>& in) {
      plan.add1(std::make_shared<Linear>(), {in[own], in[own]}, "ascending");
      for (int i = 0; i < turns; ++i) plan.add1(std::make_shared<SwiGlu>(), {in[own + 1]}, "turn");
      return c.record(plan, {in.begin(), in.begin() + static_cast<std::ptrdiff_t>(own)});
    };
    return run_case(led, gpu);
  };
  const DeviceRun one = run_after(0), other = run_after(1);
  REQUIRE(one.results.size() == other.results.size());
  CHECK(other.groups == one.groups + 1);
  for (std::size_t i = 0; i < one.results.size(); ++i) {
    INFO(c.name << ": value " << i << " in both orders of the rows");
    const std::vector<double>& values = one.results[i].values;
    CHECK(std::ranges::all_of(values, [](double x) { return std::isfinite(x); }));
    CHECK(values == other.results[i].values);
  }
}

std::vector<ValueId> add_parameter_gradient(Plan& plan, const OpPtr& op, const std::vector<ValueId>& inputs,
                                            ValueId parameter, int gradient) {
  const auto root = std::make_shared<GradientRoot>(op, static_cast<int>(inputs.size()), gradient);
  std::vector<ValueId> all{parameter};
  all.insert(all.end(), inputs.begin(), inputs.end());
  plan.backward(plan.add1(root, all, "root"));
  return root->outputs;
}

void separate(Plan& plan, ValueId matrix) { plan.add(std::make_shared<LastRow>(), {matrix}, "separate"); }

std::int64_t Draw::between(std::int64_t first, std::int64_t last) {
  return first + static_cast<std::int64_t>(random_.bits(next_++) % static_cast<std::uint64_t>(last - first + 1));
}

std::int64_t Draw::pick(std::initializer_list<std::int64_t> choices) {
  return choices.begin()[random_.bits(next_++) % choices.size()];
}

}  // namespace kiln::test
