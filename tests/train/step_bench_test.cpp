#include "train/step_bench.h"

#include <map>

#include "catch.h"

namespace kiln::test {
namespace {

StepBenchOptions small_bench() {
  StepBenchOptions options;
  options.model = {.vocab = 64, .hidden = 32, .ffn = 48, .heads = 2, .kv_heads = 2, .layers = 2, .head_dim = 16};
  options.batch = {.sequences = 2, .seq_len = 8};
  options.steps = 1;
  options.device = Device::cpu;
  return options;
}

/// FLOPs by row.
std::map<std::string, double> rows(const StepBenchOptions& options) {
  std::map<std::string, double> flops;
  for (const OpTime& op : bench_step(options).ops) CHECK(flops.emplace(op.op, op.flops).second);
  return flops;
}

TEST_CASE("a benchmark of steps has a row for every op, or for every op and shape") {
  StepBenchOptions options = small_bench();
  const std::map<std::string, double> by_op = rows(options);
  options.by_shape = true;
  const std::map<std::string, double> by_shape = rows(options);
  CHECK(by_shape.size() > by_op.size());
  CHECK(by_op.contains("linear"));
  CHECK(by_shape.contains("linear_dx [16,32] [32,48]"));
  CHECK_FALSE(by_shape.contains("linear_dx"));
  // Two layers' down projections, forward: 2 * 2 * 16 * 32 * 48.
  CHECK(by_shape.at("linear [16,48] [32,48]") == 2 * 2 * 16 * 32 * 48);
  std::map<std::string, double> sums;
  for (const auto& [row, flops] : by_shape) sums[row.substr(0, row.find(' '))] += flops;
  REQUIRE(sums.size() == by_op.size());
  for (const auto& [op, flops] : by_op) CHECK(sums.at(op) == Approx(flops));
}

}  // namespace
}  // namespace kiln::test
