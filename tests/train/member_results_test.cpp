#include "train/member_results.h"

#include <algorithm>

#include "catch.h"
#include "dist/communicator.h"
#include "small_config.h"
#include "train/memory_report.h"

namespace kiln {
namespace {

TEST_CASE("results are those of the nearest size by ratio, best first, of the members asked for") {
  using enum OptimizerKind;
  const std::vector<MemberTable> small = nearest_results(30'000'000), between = nearest_results(700'000'000),
                                 large = nearest_results(33'000'000'000);
  REQUIRE(small.size() == 3);
  CHECK(small[0].model == "60M");
  CHECK(between[0].model == "350M");  // 700M is 1.9 times 368M, and 1.3B 1.9 times it: 1.90 < 1.91
  CHECK(large[0].model == "1B");
  CHECK(large[2].model == "60M");  // the project's own
  for (const std::vector<MemberTable>& tables : {small, between, large})
    for (const MemberTable& table : tables) {
      const OptimizerKind asked[] = {adamw, fira, galore};
      const std::vector<MemberResult> list = ranked(table, asked);
      CHECK(list.size() >= 2);
      CHECK(std::ranges::is_sorted(list, {}, &MemberResult::perplexity));
      CHECK(std::ranges::none_of(list, [](const MemberResult& r) { return r.kind == muon; }));
    }
  CHECK(ranked(small[0], std::vector{adamw, fira})[0].kind == fira);
  CHECK(ranked(small[0], {}).empty());
}

TEST_CASE("a plan ranks the members that fit its budget") {
  Config config = test::small_config();
  const auto communicator = make_local_communicator();
  const std::string all = memory_tables(memory_report(config, *communicator));
  CHECK_THAT(all, ContainsSubstring("members that run there"));
  CHECK_THAT(all, ContainsSubstring("muon"));
  config.memory.budget = 1;
  const MemoryReport none = memory_report(config, *communicator);
  CHECK_THAT(memory_tables(none), ContainsSubstring(": none"));
  const Json json = to_json(none);
  for (const Json& table : json.at("results")) CHECK(table.at("ranking").empty());
}

}  // namespace
}  // namespace kiln
