#include "apps/program.h"
#include "base/files.h"
#include "base/json.h"
#include "catch.h"

namespace kiln::test {
namespace {

const std::string kScript = "python3 " KILN_SOURCE_DIR "/scripts/experiments/merge_prediction.py --kiln KILN ";

TEST_CASE("the experiment on merges trains, predicts, chooses (N, V) on one seed, and does nothing twice", "[long]") {
  const Workspace at;
  if (at("command -v python3").code != 0) {
    WARN("python3 is missing: scripts/experiments/merge_prediction.py was not run");
    return;
  }
  const std::string command =
      kScript + "--quick --out DIR/x --seeds 1,2 --steps 200 --shares 0.2 --shapes linear,1-sqrt --ends 0.5,1";
  const Outcome first = at(command);
  INFO(first.text);
  REQUIRE(first.code == 0);
  const Json seed = read_json(at.dir / "x/seed_2.json");
  REQUIRE(seed.at("predictions").size() == 4);
  const Json& last = seed.at("predictions")[3];
  CHECK(last.at("anneal") == Json{{"begin", 160}, {"end", 200}, {"shape", "1-sqrt"}, {"final_ratio", 0.0}});
  CHECK(last.at("checks") == 1);  // the same shape at the earlier end
  const Json summary = read_json(at.dir / "x/summary.json");
  CHECK(summary.at("predictions") == 8);
  // An entry of the table by hand: the plain mean of the window at the later end.
  double error = 0, gap = 0;
  for (const std::string name : {"1", "2"}) {
    const Json predictions = read_json(at.dir / ("x/seed_" + name + ".json")).at("predictions");
    for (const std::size_t i : {2, 3}) {
      for (const Json& predictor : predictions[i].at("predictors"))
        if (predictor.at("name") == "sma") error += predictor.at("error").get<double>() / 4;
      gap += (predictions[i].at("last_loss").get<double>() - predictions[i].at("annealed_loss").get<double>()) / 4;
    }
  }
  bool found = false, chosen = false;
  for (const Json& row : summary.at("table")) {
    if (row.at("end") == 200 && row.at("predictor") == "sma") {
      found = true;
      CHECK(row.at("signed_error").get<double>() == Approx(error).epsilon(1e-9));
      CHECK(row.at("gap").get<double>() == Approx(gap).epsilon(1e-9));
      CHECK(row.at("anneals") == 4);
    }
    if (row.at("end") == 100 && row.at("predictor").get<std::string>().starts_with("mean, N")) {
      chosen = true;
      CHECK(row.at("anneals") == 2);  // not those that (N, V) was chosen on
    }
  }
  CHECK(found);
  CHECK(chosen);
  CHECK_THAT(read_text(at.dir / "x/summary.md"), ContainsSubstring("| 200 | MPL | 4 |"));

  const Outcome again = at(command);
  CHECK(again.code == 0);
  CHECK_THAT(first.text, ContainsSubstring("+ ") && ContainsSubstring(" predict "));
  CHECK_THAT(again.text, !ContainsSubstring(" predict ") && !ContainsSubstring(" train "));
  fs::remove(at.dir / "x/seed_2/predictions/1-sqrt_0_0.2_00000200.json");
  const Outcome repaired = at(command);
  CHECK_THAT(repaired.text, ContainsSubstring(" predict ") && !ContainsSubstring(" train "));
  CHECK(read_json(at.dir / "x/summary.json") == summary);
}

TEST_CASE("the experiment says what it lacks") {
  const Workspace at;
  if (at("command -v python3").code != 0) return;
  const Outcome none = at(kScript + "DIR/none.yaml --out DIR/x --steps 100");
  CHECK(none.code == 1);
  CHECK_THAT(none.text, ContainsSubstring("none.yaml: no such configuration"));
  CHECK_THAT(at(kScript + "DIR/c.yaml --out DIR/x").text, ContainsSubstring("--steps None: give the steps"));
  CHECK_THAT(at(kScript + "DIR/c.yaml --out DIR/x --steps 40 --snapshots 2 --shares 0.01").text,
             ContainsSubstring("would have no steps"));
}

}  // namespace
}  // namespace kiln::test
