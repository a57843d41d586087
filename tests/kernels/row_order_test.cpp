// Which kernels take part in the order of the rows; that results do not depend on it, check_row_order() says.
#include "kernels/row_order.h"

#include "catch.h"
#include "kernels/context.h"
#include "ops/attention.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

using cuda::RowOrder;
using Ids = std::vector<ValueId>;

/// The order that the kernel of a plan's first group leaves to the next. Making a kernel needs no device.
RowOrder order_after(const Plan& plan, RowOrder before) {
  NodeGroup group;
  const cuda::OpEntry* entry = cuda::find_entry(plan, 0, group);
  REQUIRE(entry != nullptr);
  REQUIRE(group.count == plan.nodes().size());
  cuda::Context context;
  context.last_order = before;
  entry->make({plan, group}, context);
  return context.last_order;
}

TEST_CASE("kernels with an order turn, products by cuBLASLt ascend, and others leave it") {
  enum class Leaves { opposite, ascending, descending, same };
  const auto input = [](Plan& plan, const Shape& shape, DType dtype = DType::bf16) {
    return plan.external("input", {shape, dtype}, Role::input);
  };
  const auto check_plan = [](const char* what, Leaves leaves, const std::function<void(Plan&)>& record) {
    Plan plan;
    record(plan);
    for (const RowOrder before : {RowOrder::ascending, RowOrder::descending}) {
      INFO(what << " after " << (before == RowOrder::ascending ? "ascending" : "descending"));
      const RowOrder expected = leaves == Leaves::opposite     ? opposite(before)
                                : leaves == Leaves::ascending  ? RowOrder::ascending
                                : leaves == Leaves::descending ? RowOrder::descending
                                                               : before;
      CHECK(order_after(plan, before) == expected);
    }
  };
  const auto norm = [](bool residual) {
    return std::make_shared<RmsNorm>(RmsNorm::Options{.eps = 1e-5, .residual = residual});
  };
  check_plan("swiglu", Leaves::opposite, [&](Plan& plan) {
    plan.add1(std::make_shared<SwiGlu>(), {input(plan, {64, 256})}, "a");
  });
  check_plan("rms_norm", Leaves::opposite, [&](Plan& plan) {
    plan.add(norm(false), {input(plan, {64, 128}), input(plan, {128})}, "y");
  });
  check_plan("linear", Leaves::ascending, [&](Plan& plan) {
    plan.add1(std::make_shared<Linear>(), {input(plan, {64, 128}), input(plan, {128, 128})}, "y");
  });
  check_plan("linear and swiglu", Leaves::opposite, [&](Plan& plan) {
    const Ids in{input(plan, {64, 128}), input(plan, {256, 128})};
    plan.add1(std::make_shared<SwiGlu>(), {plan.add1(std::make_shared<Linear>(), in, "y")}, "a");
  });
  // The norm begins where the product ended, whatever came before.
  check_plan("linear and add_rms_norm", Leaves::descending, [&](Plan& plan) {
    const ValueId delta =
        plan.add1(std::make_shared<Linear>(), {input(plan, {64, 128}), input(plan, {128, 128})}, "delta");
    plan.add(norm(true), {input(plan, {64, 128}), input(plan, {128}), delta}, "y");
  });
  check_plan("attention", Leaves::opposite, [&](Plan& plan) {
    const AttentionShape shape{.heads = 2, .kv_heads = 2, .head_dim = 64, .seq_len = 64};
    plan.add(std::make_shared<Attention>(shape), {input(plan, {64, shape.columns()})}, "o");
  });
  check_plan("embedding", Leaves::same, [&](Plan& plan) {
    plan.add1(std::make_shared<Embedding>(), {input(plan, {64}, DType::i32), input(plan, {100, 128})}, "y");
  });
}

}  // namespace
}  // namespace kiln::test
