#include "train/device.h"

#include "catch.h"
#include "graph/executor.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

std::int64_t multiple_of(const LlamaConfig& model, const OptimizerOptions& optimizer) {
  return layout_for_codes(model, optimizer, StorageLayout(DType::bf16, 64)).multiple;
}

TEST_CASE("a device pads to eights alone where codes would have other blocks than those of files") {
  const LlamaConfig model = llama_preset("llama_60m");
  REQUIRE(model.ffn % 64 == 32);
  REQUIRE(model.ffn > model.hidden);
  for (const OptimizerKind kind : optimizer_kinds()) {
    INFO(to_string(kind));
    if (kind != OptimizerKind::adam8bit) {
      CHECK(multiple_of(model, {.kind = kind}) == 64);
      CHECK(multiple_of(model, {.kind = kind, .states = StatePrecision::bf16}) == 64);
    }
    CHECK(multiple_of(model, {.kind = kind, .states = StatePrecision::int8}) == 8);
  }
  const OptimizerOptions basis{.kind = OptimizerKind::fira, .projector_states = StatePrecision::int8};
  CHECK(multiple_of(model, basis) == 64);  // of the shorter side, which has no padding
  LlamaConfig narrow = model;
  narrow.ffn = 200;
  CHECK(multiple_of(narrow, basis) == 8);
  LlamaConfig words = model;
  words.vocab = 1000;
  CHECK(multiple_of(words, {.kind = OptimizerKind::fira_plus}) == 8);  // whose embedding has codes
}

#ifdef KILN_WITH_CUDA
TEST_CASE("operands of a product that are not bf16 are refused, alone and fused, before there is a GPU") {
  const auto gpu = open_planning_device(Device::cuda);
  constexpr std::int64_t kTokens = 128, kWidth = 128;
  const AttentionShape heads{.heads = 2, .kv_heads = 1, .head_dim = 64, .seq_len = kTokens};
  const auto check_pair = [&](const std::string& after, std::int64_t rows, const auto& second) {
    for (const DType dtype : {DType::bf16, DType::f32}) {
      INFO("linear, then " << (after.empty() ? "nothing" : after) << ", in " << to_string(dtype));
      Plan plan;
      const auto input = [&](const Shape& shape) { return plan.external("input", {shape, dtype}, Role::input); };
      const ValueId y =
          plan.add1(std::make_shared<Linear>(), {input({kTokens, kWidth}), input({rows, kWidth})}, "product");
      second(plan, y, input);
      const NodeGroup group = gpu->group(plan, 0);
      CHECK(group.count == (after.empty() ? 1 : 2));
      if (dtype == DType::bf16)
        CHECK_NOTHROW(check_kernels(plan, *gpu));
      else
        CHECK_THROWS_WITH(check_kernels(plan, *gpu), ContainsSubstring("linear: operand f32 [128,128], expected bf16"));
    }
  };
  check_pair("", kWidth, [](Plan&, ValueId, const auto&) {});
  check_pair("swiglu", 2 * kWidth,
             [](Plan& plan, ValueId y, const auto&) { plan.add1(std::make_shared<SwiGlu>(), {y}, "a"); });
  check_pair("rope", heads.columns(), [&](Plan& plan, ValueId y, const auto&) {
    const ValueId table = plan.external("table", {{kTokens, heads.head_dim}, DType::f32}, Role::input);
    const ValueId first = plan.external("first", {{1}, DType::i32}, Role::input);
    plan.add(std::make_shared<Rope>(heads, Rope::Direction::forward), {y, table, first}, "rope");
  });
  check_pair("add_rms_norm", kWidth, [&](Plan& plan, ValueId y, const auto& input) {
    const auto norm = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = 1e-5, .residual = true});
    plan.add(norm, {input({kTokens, kWidth}), input({kWidth}), y}, "norm");
  });
}
#endif

}  // namespace
}  // namespace kiln::test
