#include "graph/packing.h"

#include "base/rng.h"
#include "catch.h"
#include "graph/executor.h"

namespace kiln {
namespace {

/// y = sum of the inputs plus `add`; may ask for scratch. Enough to build any graph.
class Sum final : public Op {
 public:
  Sum(std::int64_t size, float add, std::size_t workspace) : size_(size), add_(add), workspace_(workspace) {}
  std::string_view name() const override { return "test_sum"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec>) const override { return {{{size_}, DType::f32}}; }
  std::size_t workspace_bytes(std::span<const TensorSpec>) const override { return workspace_; }
  void run_cpu(const KernelArgs& args) const override {
    float total = add_;
    for (const Tensor& in : args.in)
      for (const float x : in.span<float>()) total += x / static_cast<float>(in.numel());
    if (workspace_ > 0) std::fill_n(static_cast<std::byte*>(args.workspace.data), workspace_, std::byte{0x7f});
    for (float& y : args.out[0].span<float>()) y = total;
  }

 private:
  std::int64_t size_;
  float add_;
  std::size_t workspace_;
};

struct RandomPlan {
  Plan plan;
  std::vector<ValueId> values;

  explicit RandomPlan(std::uint64_t seed) {
    const Philox random(seed, 1);
    std::uint64_t n = 0;
    auto draw = [&](std::uint64_t bound) { return random.bits(n++) % bound; };
    values.push_back(plan.external("x", {{4}, DType::f32}, Role::input));
    for (int i = 0; i < 60; ++i) {
      if (i == 45) plan.set_phase(Phase::update);
      std::vector<ValueId> in;
      for (std::uint64_t k = 0; k < 1 + draw(3); ++k)
        in.push_back(values[values.size() - 1 - draw(std::min<std::uint64_t>(values.size(), 12))]);
      const auto size = static_cast<std::int64_t>(1 + draw(3000));
      values.push_back(plan.add1(std::make_shared<Sum>(size, static_cast<float>(i), draw(2) * draw(5000)), in, "v"));
      if (draw(8) == 0) plan.keep(values.back());
    }
    plan.keep(values.back());
  }
};

TEST_CASE("packing changes no result and stays between its bounds") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    RandomPlan random(seed);
    HostTensor x({{4}, DType::f32});
    // Reference: every value in memory of its own.
    std::vector<HostTensor> own;
    for (const Value& value : random.plan.values()) own.emplace_back(value.spec);
    for (const Node& node : random.plan.nodes()) {
      std::vector<Tensor> in, out;
      for (const ValueId id : node.in) in.push_back(own[static_cast<std::size_t>(id.index)].view());
      for (const ValueId id : node.out) out.push_back(own[static_cast<std::size_t>(id.index)].view());
      HostTensor scratch({{static_cast<std::int64_t>(node.op->workspace_bytes({}))}, DType::u8});
      node.op->run_cpu({.in = in, .out = out, .workspace = scratch.view()});
    }
    Executor executor(random.plan, 1);
    executor.bind(random.values[0], x.view());
    executor.poison();
    executor.run(Phase::micro, false);
    executor.run(Phase::update, false);
    for (std::size_t v = 0; v < random.plan.values().size(); ++v) {
      if (!random.plan.values()[v].kept) continue;
      const auto found = executor.tensor({static_cast<int>(v)}).span<float>(), expected = own[v].span<float>();
      CHECK(std::equal(found.begin(), found.end(), expected.begin()));
    }
    const Packing& packing = executor.packing();
    CHECK(packing.arena_bytes >= packing.live_bytes);
    CHECK(packing.arena_bytes < packing.unpacked_bytes);
  }
}

TEST_CASE("what the update phase reads survives repeated micro-batches") {
  Plan plan;
  const ValueId x = plan.external("x", {{4}, DType::f32}, Role::input);
  const ValueId early = plan.add1(std::make_shared<Sum>(100, 1.0f, 0), {x}, "early");
  const ValueId late = plan.add1(std::make_shared<Sum>(100, 2.0f, 0), {x}, "late");
  const ValueId other = plan.add1(std::make_shared<Sum>(100, 3.0f, 0), {late}, "other");
  plan.set_phase(Phase::update);
  plan.keep(plan.add1(std::make_shared<Sum>(1, 0.0f, 0), {early, other}, "out"));
  const Packing once = pack(plan, 1), repeated = pack(plan, 4);
  auto offset = [](const Packing& p, ValueId id) { return p.value_offset[static_cast<std::size_t>(id.index)]; };
  // In one pass `other` is written after everything before it but `early` is dead or shared; repeated, it may share
  // with none.
  CHECK(offset(repeated, other) != offset(repeated, late));
  CHECK(offset(repeated, other) != offset(repeated, early));
  CHECK(repeated.arena_bytes >= once.arena_bytes);
}

/// y = x w with its gradient rules; enough to have gradients of parameters in a plan.
class Product final : public Op {
 public:
  std::string_view name() const override { return "test_product"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override { return {in[0]}; }
  void gradient(GradientContext& context) const override {
    const auto sum = std::make_shared<Sum>(4, 0.0f, 0);
    const ValueId dy = context.grad_out(0).valid() ? context.grad_out(0) : context.out(0);
    if (context.needs_gradient(0)) context.set_grad_in(0, context.add(sum, {dy}, "dx")[0]);
    if (context.needs_gradient(1)) context.set_grad_in(1, context.add(sum, {dy}, "dw")[0]);
  }
  void run_cpu(const KernelArgs&) const override {}
};

/// Changes its first input.
class Change final : public Op {
 public:
  std::string_view name() const override { return "test_change"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec>) const override { return {}; }
  std::vector<int> mutates() const override { return {0}; }
  void run_cpu(const KernelArgs&) const override {}
};

TEST_CASE("an update moves up behind the last node that it depends on, to the next gradient of a parameter") {
  Plan plan;
  const ValueId x = plan.external("x", {{4}, DType::f32}, Role::input);
  std::vector<ValueId> w, y{x};
  for (int i = 0; i < 3; ++i) {
    w.push_back(plan.external(fmt::format("w{}", i), {{4}, DType::f32}, Role::parameter));
    y.push_back(plan.add1(std::make_shared<Product>(), {y.back(), w.back()}, fmt::format("y{}", i)));
  }
  plan.backward(y.back());
  auto names = [&] {
    std::string all;
    for (const Node& node : plan.nodes())
      all += (node.out.empty() ? fmt::format("change {}", plan.value(node.in[0]).name) : plan.value(node.out[0]).name) +
             "; ";
    return all;
  };
  // The product's gradients of layer 2, 1, 0; the first has none to x.
  const std::string before = names();
  auto position = [&](ValueId written) {
    for (std::size_t n = 0; n < plan.nodes().size(); ++n)
      for (const ValueId id : plan.nodes()[n].out)
        if (id == written) return n;
    return plan.nodes().size();
  };
  auto update = [&](std::size_t i) {
    plan.add(std::make_shared<Change>(), {w[i], plan.gradient(w[i])}, "update");
    plan.move_up();
  };
  update(2);
  INFO(before << " -> " << names());
  // w2 is read by its product in the forward part alone, so its gradient is the last dependence.
  const std::size_t second = position(plan.gradient(w[2]));
  std::size_t found = 0;
  for (std::size_t n = 0; n < plan.nodes().size(); ++n)
    if (plan.nodes()[n].out.empty()) found = n;
  CHECK(found > second);
  CHECK(found < position(plan.gradient(w[1])));
  CHECK(plan.is_parameter_gradient(plan.nodes()[found + 1].out.at(0)));  // nothing but the next gradient follows
  // What nothing follows stays last, and a node of another phase never passes into this one.
  update(0);
  CHECK(plan.nodes().back().out.empty());
  CHECK(plan.nodes().back().in[0] == w[0]);
  plan.set_phase(Phase::update);
  update(1);
  CHECK(plan.nodes().back().in[0] == w[1]);
}

TEST_CASE("a plan says what is wrong with its use") {
  Plan plan;
  const ValueId x = plan.external("x", {{4}, DType::f32}, Role::input);
  const ValueId y = plan.add1(std::make_shared<Sum>(4, 1.0f, 0), {x}, "y");
  Executor executor(plan, 1);
  CHECK_THROWS_WITH(executor.run(Phase::micro, false), ContainsSubstring("x: not bound"));
  HostTensor wrong({{5}, DType::f32});
  CHECK_THROWS_WITH(executor.bind(x, wrong.view()), ContainsSubstring("[5], expected f32 [4]"));
  CHECK_THROWS_WITH(executor.bind(y, wrong.view()), ContainsSubstring("only external"));
  CHECK_THROWS_WITH(plan.backward(y), ContainsSubstring("no parameter leads to it"));
  const ValueId p = plan.external("p", {{4}, DType::f32}, Role::parameter);
  const ValueId z = plan.add1(std::make_shared<Sum>(4, 1.0f, 0), {p}, "z");
  CHECK_THROWS_WITH(plan.backward(z), ContainsSubstring("test_sum: this op has no gradient rule"));
  plan.set_phase(Phase::update);
  CHECK_THROWS_AS(plan.set_phase(Phase::micro), Error);
}

}  // namespace
}  // namespace kiln
