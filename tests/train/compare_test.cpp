#include "train/compare.h"

#include <cmath>

#include "catch.h"
#include "train/small_config.h"

namespace kiln::test {
namespace {

CompareRow row_of(double lr, double loss) {
  CompareRow row{.name = "fira", .peak_lr = lr, .rank = 8, .seed = 1};
  row.last_loss = loss;
  row.diverged = std::isnan(loss);
  row.summary.state_bytes = 1234;
  return row;
}

TEST_CASE("the rank within a budget of state bytes is the largest that fits") {
  const Config base = small_config();
  const std::uint64_t adamw = state_bytes(base);
  CHECK(adamw == 8u * static_cast<std::uint64_t>(model_config(base).parameter_count()));
  for (const OptimizerKind kind : {OptimizerKind::galore, OptimizerKind::fira, OptimizerKind::fira_plus}) {
    const std::int64_t rank = rank_within(base, kind, adamw * 3 / 4);
    INFO(to_string(kind) << " rank " << rank);
    CHECK(rank % 8 == 0);
    Config config = small_config("optimizer: {rank: 8}\n");
    config.optimizer.kind = kind;
    config.optimizer.rank = rank;
    CHECK(state_bytes(config) <= adamw * 3 / 4);
    config.optimizer.rank = rank + 8;
    CHECK((rank == model_config(base).hidden || state_bytes(config) > adamw * 3 / 4));
  }
  CHECK(rank_within(base, OptimizerKind::fira, adamw * 100) == model_config(base).hidden);
  CHECK_THROWS_WITH(rank_within(base, OptimizerKind::fira, 10), ContainsSubstring("more than the 10"));
}

TEST_CASE("an optimizer's own settings hold for its run alone") {
  const Config base = small_config();
  const Config config = comparison_config(base, {.kind = OptimizerKind::fira,
                                                 .peak_lr = 0.25,
                                                 .rank = 16,
                                                 .seed = 7,
                                                 .overrides = {"optimizer.alpha=0.5", "optimizer.rank=24"},
                                                 .dir = "a/b"});
  CHECK(config.optimizer.kind == OptimizerKind::fira);
  CHECK(config.optimizer.alpha == 0.5);
  CHECK(config.optimizer.rank == 16);
  CHECK(config.schedule.peak_lr == 0.25);
  CHECK(config.run.seed == 7);
  CHECK(config.run.dir == "a/b");
  CHECK(comparison_config(base, {.dir = "c"}).optimizer.kind == OptimizerKind::adamw);
  CHECK_THROWS_WITH(
      comparison_config(base, {.kind = OptimizerKind::fira, .overrides = {"optimizer.alhpa=1"}, .dir = "d"}),
      ContainsSubstring("optimizer.alhpa"));
}

TEST_CASE("the best learning rate is that of the lowest loss, and seeds are averaged") {
  CompareMember member{.name = "fira",
                       .grid = {row_of(0.001, 3.5), row_of(0.002, 3.25), row_of(0.004, std::nan(""))},
                       .seeds = {row_of(0.002, 3.75)}};
  REQUIRE(member.best() == &member.grid[1]);
  CHECK(member.losses() == std::vector<double>{3.25, 3.75});
  const std::string table = members_table({member, {.name = "galore", .grid = {row_of(1, std::nan(""))}, .seeds = {}}});
  CHECK_THAT(table, ContainsSubstring("0.002") && ContainsSubstring("3.5000") && ContainsSubstring("0.2500") &&
                        ContainsSubstring("galore       every run diverged"));
  CHECK_THAT(compare_table(member.grid), ContainsSubstring("diverged"));
}

}  // namespace
}  // namespace kiln::test
