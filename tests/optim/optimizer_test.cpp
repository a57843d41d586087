#include "optim/optimizer.h"

#include <limits>
#include <vector>

#include "catch.h"
#include "optim/support.h"

using namespace kiln;

namespace {

OptimizerOptions of_kind(OptimizerKind kind) {
  return {.kind = kind, .rank = 8, .states = optimizer_defaults(kind).states};
}

}  // namespace

TEST_CASE("state bytes by formula: Adam 2mn, GaLore mr + 2nr, Fira one number more") {
  const auto [rows, columns] = GENERATE(table<std::int64_t, std::int64_t>({{40, 24}, {24, 40}, {32, 32}, {40, 5}}));
  const auto m = static_cast<std::size_t>(std::min(rows, columns)),
             n = static_cast<std::size_t>(std::max(rows, columns));
  const std::size_t r = std::min<std::size_t>(8, m);
  const Parameter linear = test::matrix(rows, columns);
  CHECK(make_optimizer(of_kind(OptimizerKind::adamw))->state_bytes(linear) == 4 * 2 * m * n);
  CHECK(make_optimizer(of_kind(OptimizerKind::galore))->state_bytes(linear) == 4 * (m * r + 2 * n * r));
  CHECK(make_optimizer(of_kind(OptimizerKind::fira))->state_bytes(linear) == 4 * (m * r + 2 * n * r + 1));

  Parameter embedding = linear;
  embedding.low_rank = false;
  CHECK(make_optimizer(of_kind(OptimizerKind::fira))->state_bytes(embedding) == 4 * 2 * m * n);
}

TEST_CASE("every kind has a name that parses back") {
  CHECK(optimizer_kinds().size() == 10);
  for (const OptimizerKind kind : optimizer_kinds()) {
    CHECK(parse_optimizer_kind(to_string(kind)) == kind);
    CHECK(make_optimizer(of_kind(kind))->name() == to_string(kind));
  }
  CHECK_THROWS_WITH(parse_optimizer_kind("adam"),
                    ContainsSubstring("'adam' is not known; choose one of adamw, adam8bit, galore, fira, fira+"));
}

TEST_CASE("options out of range name their key") {
  auto refuses = [](auto&& change, const std::string& words) {
    OptimizerOptions options = of_kind(OptimizerKind::fira);
    change(options);
    CHECK_THROWS_WITH(make_optimizer(options), ContainsSubstring(words));
  };
  refuses([](auto& o) { o.beta1 = 1.0; }, "optimizer.beta1: 1, expected at least 0 and less than 1");
  refuses([](auto& o) { o.beta2 = -0.5; }, "optimizer.beta2: -0.5");
  refuses([](auto& o) { o.eps = 0; }, "optimizer.eps: 0");
  refuses([](auto& o) { o.weight_decay = -1; }, "optimizer.weight_decay: -1");
  refuses([](auto& o) { o.rank = 0; }, "optimizer.rank: 0");
  refuses([](auto& o) { o.refresh = 0; }, "optimizer.refresh: 0");
  refuses([](auto& o) { o.alpha = 0; }, "optimizer.alpha: 0");
  refuses([](auto& o) { o.gamma = 0.9; }, "optimizer.gamma: 0.9");
  refuses([](auto& o) { o.alpha = std::numeric_limits<double>::quiet_NaN(); }, "optimizer.alpha: nan");

  OptimizerOptions adamw = of_kind(OptimizerKind::adamw);
  adamw.rank = 0;  // of no concern to AdamW
  CHECK_NOTHROW(make_optimizer(adamw));
}

TEST_CASE("an update refuses inputs that do not fit when the plan is built") {
  const Parameter parameter = test::matrix(24, 16);
  const test::Driver<float> driver(of_kind(OptimizerKind::fira), parameter);
  auto refuses = [&](std::size_t input, TensorSpec spec, const std::string& words) {
    std::vector<TensorSpec> specs = driver.specs();
    specs[input] = spec;
    CHECK_THROWS_WITH(driver.op().infer(specs), ContainsSubstring(words));
  };
  refuses(1, {{24, 15}, DType::f32}, "weights [24,16] and gradient [24,15] differ in shape");
  refuses(2, {{3}, DType::f64}, "the third input must be the step's scalars");
  refuses(3, {{24, 8}, DType::f32}, "layer.weight.projector: f32 [24,8], expected f32 [16,8]");
  refuses(4, {{24, 8}, DType::f64}, "layer.weight.exp_avg: f64 [24,8], expected f32 [24,8]");

  std::vector<TensorSpec> few = driver.specs();
  few.pop_back();
  CHECK_THROWS_WITH(driver.op().infer(few), ContainsSubstring("layer.weight: 6 inputs, expected 7"));

  Parameter late = parameter;
  late.row_begin = 30;
  CHECK_THROWS_WITH(test::Driver<float>(of_kind(OptimizerKind::fira), late, {{48, 16}, DType::f32}),
                    ContainsSubstring("[24,16] from row 30 does not fit its storage [48,16]"));

  Parameter vector = parameter;
  vector.shape = {24};
  CHECK_THROWS_WITH(make_optimizer(of_kind(OptimizerKind::fira))->update_op(vector),
                    ContainsSubstring("a low-rank update needs a matrix"));
}

TEST_CASE("an update op says what it writes") {
  const Parameter parameter = test::matrix(24, 16);
  CHECK(make_optimizer(of_kind(OptimizerKind::fira))->update_op(parameter)->mutates() ==
        std::vector<int>{0, 1, 3, 4, 5, 6});
  CHECK(make_optimizer(of_kind(OptimizerKind::adamw))->update_op(parameter)->mutates() == std::vector<int>{0, 1, 3, 4});
}
