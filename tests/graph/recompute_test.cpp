#include "base/error.h"
#include "catch.h"
#include "graph/executor.h"

namespace kiln {
namespace {

/// y = x + w, whose gradient rule reads what it is told to; `in_place` adds one to x instead.
class Step final : public Op {
 public:
  explicit Step(bool in_place) : in_place_(in_place) {}
  std::string_view name() const override { return in_place_ ? "test_increment" : "test_step"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override {
    return in_place_ ? std::vector<TensorSpec>{} : std::vector<TensorSpec>{in[0]};
  }
  std::vector<int> mutates() const override { return in_place_ ? std::vector<int>{0} : std::vector<int>{}; }
  /// dx = dy + x, so that a wrong copy of x shows.
  void gradient(GradientContext& context) const override {
    if (in_place_ || !context.needs_gradient(0)) return;
    const ValueId dy = context.grad_out(0);
    context.set_grad_in(
        0, context.add(std::make_shared<Step>(false), {dy.valid() ? dy : context.out(0), context.in(0)}, "dx")[0]);
  }
  void run_cpu(const KernelArgs& args) const override {
    if (in_place_)
      for (float& x : args.in[0].span<float>()) x += 1;
    else
      for (std::size_t i = 0; i < args.out[0].span<float>().size(); ++i)
        args.out[0].span<float>()[i] = args.in[0].span<float>()[i] + args.in[1].span<float>()[i];
  }

 private:
  bool in_place_;
};

/// w -> a -> (a + 1 in place) -> b -> c.
struct Chain {
  Plan plan;
  ValueId w, a, b, c;

  /// `early`: b reads a before it is changed.
  explicit Chain(bool early = false) {
    const OpPtr step = std::make_shared<Step>(false), increment = std::make_shared<Step>(true);
    w = plan.external("w", {{4}, DType::f32}, Role::parameter);
    a = plan.add1(step, {w, w}, "a");
    if (!early) plan.add(increment, {a}, "change");
    b = plan.add1(step, {a, w}, "b");
    if (early) plan.add(increment, {a}, "change");
    c = plan.add1(step, {b, w}, "c");
  }
  float gradient() {
    plan.backward(c);
    plan.keep(plan.gradient(w));
    HostTensor memory({{4}, DType::f32});
    for (float& x : memory.span<float>()) x = 3;
    Executor executor(plan, 1);
    executor.poison();
    executor.bind(w, memory.view());
    executor.run(Phase::micro, false);
    return executor.tensor(plan.gradient(w)).span<float>()[0];
  }
};

TEST_CASE("gradient rules read a recomputed value as it was, changes in place included") {
  Chain plain;
  const float expected = plain.gradient();
  CHECK(expected == 13 + 10 + 7 + 3);  // c, b, a after its change, w
  const std::size_t nodes = plain.plan.nodes().size();
  Chain first, second, both;
  first.plan.recompute(first.a);
  second.plan.recompute(second.b);
  both.plan.recompute(both.a);
  both.plan.recompute(both.b);
  CHECK(first.gradient() == expected);
  CHECK(second.gradient() == expected);
  CHECK(both.gradient() == expected);
  CHECK(first.plan.nodes().size() == nodes + 2);  // a and its change
  CHECK(second.plan.nodes().size() == nodes + 1);
  CHECK(both.plan.nodes().size() == nodes + 3);  // each once
}

TEST_CASE("what can not be computed again is refused by name") {
  Chain chain(true);
  chain.plan.recompute(chain.b);
  CHECK_THROWS_WITH(chain.plan.backward(chain.c), ContainsSubstring("a: changed in place after test_step read it"));
  Chain other;
  CHECK_THROWS_WITH(other.plan.recompute(other.w), ContainsSubstring("w: bound by the caller"));
  other.plan.backward(other.c);
  CHECK_THROWS_WITH(other.plan.recompute(other.a), ContainsSubstring("before backward()"));
}

}  // namespace
}  // namespace kiln
