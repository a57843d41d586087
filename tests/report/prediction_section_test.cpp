#include "report/prediction_section.h"

#include <cmath>

#include "catch.h"
#include "report/plot.h"

using namespace kiln;

namespace {

RunData predicted_run() {
  RunData run{.dir = "runs/a", .name = "a<b"};
  for (std::int64_t step = 1; step <= 10; ++step)
    run.metrics.push_back({.step = step, .tokens = 100 * step, .loss = 4, .valid_loss = 4 - 0.01 * double(step)});
  run.anneals = {{"linear_0_00000008_00000010", {{.step = 10, .tokens = 1000, .valid_loss = 3.5}}}};
  run.prediction = Json::parse(R"({"anneal": {"begin": 8, "end": 10}, "tokens": 1000, "predicted_loss": 3.4567,
    "low": 3.4, "high": 3.5, "trusted": "schedule", "annealed_loss": 3.5,
    "trail": [{"step": 8, "tokens": 800, "loss": 3.7}],
    "sweep": [{"count": 2, "every_steps": 1, "against_last": -0.0123}, {"count": 5, "every_steps": 2, "against_last": 0.25}]})");
  return run;
}

}  // namespace

TEST_CASE("the section tells the prediction, the real anneal and the sweep") {
  const std::string html = prediction_section({predicted_run()});
  CHECK_THAT(html, ContainsSubstring("a&lt;b: after an anneal from step 8 to 10 the loss is predicted as 3.4567"));
  CHECK_THAT(html, ContainsSubstring("the real anneal reached 3.5000"));
  CHECK_THAT(html, ContainsSubstring("anneal linear_0_00000008_00000010"));
  CHECK_THAT(html, ContainsSubstring("-0.0123"));
  CHECK_THAT(html, ContainsSubstring("+0.2500"));
  CHECK(prediction_section({RunData{}}).empty());
  RunData damaged = predicted_run();
  damaged.prediction.erase("trail");
  CHECK_THROWS_WITH(prediction_section({damaged}), ContainsSubstring("no prediction of this version"));
}

TEST_CASE("a heat map colours by the best cell, leaves unknown ones empty, and needs a value for each") {
  HeatMap map{.rows = {"1", "2"}, .columns = {"2"}, .values = {-0.5, std::nan("")}};
  const std::string svg = svg_heat_map(map);
  CHECK_THAT(svg, ContainsSubstring("#0072b2"));  // the best cell in full colour
  CHECK_THAT(svg, ContainsSubstring("–"));
  map.values = {-0.5, 0.1};
  CHECK_THAT(svg_heat_map(map), ContainsSubstring("#f7dfcc"));  // a fifth of the way to orange
  map.values.pop_back();
  CHECK_THROWS_AS(svg_heat_map(map), std::exception);
}
