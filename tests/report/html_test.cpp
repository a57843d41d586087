#include "report/html.h"

#include <limits>

#include "base/error.h"
#include "catch.h"
#include "support.h"

using namespace kiln;

namespace {

/// A run directory of `steps` steps with a validation at every tenth.
std::filesystem::path make_run(const TempDir& root, const std::string& name, int steps) {
  const auto dir = root.path / name;
  MetricsWriter writer(dir, 0);
  for (int step = 1; step <= steps; ++step) {
    StepMetrics m = metrics_at(step);
    if (step % 10 == 0) m.valid_loss = m.loss + 0.5;
    writer.write(m);
  }
  return dir;
}

std::string error_of(const std::filesystem::path& dir) {
  try {
    load_run(dir);
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::data);
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("run: metrics alone are enough") {
  TempDir root;
  const RunData run = load_run(make_run(root, "fira60m", 25).string() + "/");
  CHECK(run.name == "fira60m");
  CHECK(run.optimizer.empty());
  CHECK(run.metrics.size() == 25);
  CHECK(run.final_valid_loss == run.metrics[19].valid_loss);
  CHECK(run.tokens_per_s == Approx(12345.678));
  CHECK(final_train_loss(run, 2) == Approx((run.metrics[23].loss + run.metrics[24].loss) / 2));
  CHECK(peak_memory_bytes(run) == 3'221'225'472);
  CHECK(elapsed_seconds(run).back() == Approx(25 * 0.08125));
}

TEST_CASE("run: summary.json comes first, the configuration's text second") {
  TempDir root;
  const auto dir = make_run(root, "a", 10);
  const auto config =
      GENERATE(as<std::string>{}, "run: {}\noptimizer: {rank: 8, kind: galore}\nschedule: {kind: wsd}\n",
               "optimizer:\n  # which\n  rank: 8\n  kind: galore\nschedule:\n  kind: wsd\n",
               "schedule: {kind: wsd}\noptimizer: {kind: \"galore\"}");
  spill(dir / "config.yaml", config);
  CHECK(load_run(dir).optimizer == "galore");
  spill(dir / "summary.json", R"({"name": "n", "optimizer": "fira", "final_valid_loss": 3.5, "state_bytes": 1024,
    "tokens_per_s": 7, "merged_valid_loss": null, "last_valid_loss": 3.6, "parameters": 9000000, "more": []})");
  const RunData run = load_run(dir);
  CHECK(run.name == "n");
  CHECK(run.optimizer == "fira");
  CHECK(run.final_valid_loss == 3.5);
  CHECK(run.state_bytes == 1024.0);
  CHECK(run.tokens_per_s == 7.0);
  CHECK(run.last_valid_loss == 3.6);
  CHECK_FALSE(run.merged_valid_loss.has_value());
}

TEST_CASE("run: a schedule's kind is not taken for the optimizer's") {
  TempDir root;
  const auto dir = make_run(root, "a", 1);
  spill(dir / "config.yaml", "optimizer: {rank: 8}\nschedule: {kind: wsd}\n");
  CHECK(load_run(dir).optimizer.empty());
}

TEST_CASE("run: errors name the file and the key") {
  TempDir root;
  CHECK_THAT(error_of(root.path / "none"), ContainsSubstring("none: no metrics.jsonl in it"));
  const auto dir = make_run(root, "a", 1);
  spill(dir / "summary.json", R"({"state_bytes": "much"})");
  CHECK_THAT(error_of(dir), ContainsSubstring("summary.json: key \"state_bytes\" is \"much\", expected a number"));
  spill(dir / "summary.json", "[]");
  CHECK_THAT(error_of(dir), ContainsSubstring("found array, expected one JSON object"));
  spill(dir / "summary.json", "{");
  CHECK_THAT(error_of(dir), ContainsSubstring("summary.json"));
}

TEST_CASE("report: one page with every run, nothing from outside, all text escaped") {
  TempDir root;
  const auto a = make_run(root, "a", 40), b = make_run(root, "b<script>", 30);
  spill(a / "config.yaml", "run: {name: \"<img src=x>\"}  # & more\n");
  spill(a / "summary.json", R"({"name": "a", "optimizer": "fira", "state_bytes": 1048576, "merged_valid_loss": 2.25})");
  spill(b / "summary.json", R"({"optimizer": "adamw", "state_bytes": 3145728})");
  write_report({a, b}, root.path / "out/report.html", "R & D");
  const std::string page = slurp(root.path / "out/report.html");
  CHECK(page.starts_with("<!doctype html>"));
  for (const char* part : {"R &amp; D", "b&lt;script&gt;", "&lt;img src=x&gt;", ">fira<", ">adamw<", "1.00 MiB",
                           "3.00 MiB", "a, merged", ">2.2500<", "Training loss", "Validation loss", "Learning rate",
                           "Gradient norm", "Speed", "Optimizer state", "Training time (s)", ">Tokens<"})
    CHECK_THAT(page, ContainsSubstring(part));
  for (const char* part : {"<script", "<img", "<link", "@import", "url(", "href="})
    CHECK(page.find(part) == std::string::npos);
}

TEST_CASE("report: rescues are marked on the loss and told one by one") {
  TempDir root;
  const auto dir = make_run(root, "a<b", 40);
  CHECK_THAT(html_report("t", {load_run(dir)}), !ContainsSubstring("rescue") && !ContainsSubstring("Rescues"));
  MetricsWriter writer(dir, 30);
  StepMetrics m = metrics_at(31);
  m.rescue = RescueEvent{.number = 1,
                         .step = 37,
                         .resumed_step = 30,
                         .oldest_step = 10,
                         .checkpoints = 3,
                         .optimizer_states = "keep-last",
                         .reason = "loss < 1"};
  writer.write(m);
  const std::string page = html_report("t", {load_run(dir)});
  CHECK_THAT(page, ContainsSubstring("a&lt;b, rescue"));  // in the legend
  CHECK_THAT(page, ContainsSubstring("<li>a&lt;b: rescue 1, step 37: mean of 3 checkpoints, steps 10 to 30, optimizer "
                                     "states of the newest; went on after step 30 (loss &lt; 1)</li>"));
}

TEST_CASE("report: the best value of a column is marked once, ties twice") {
  TempDir root;
  const auto count_best = [](const std::string& page) {
    std::size_t n = 0;
    for (std::size_t at = page.find("class=\"best\""); at != std::string::npos;
         at = page.find("class=\"best\"", at + 1))
      ++n;
    return n;
  };
  const RunData a = load_run(make_run(root, "a", 40)), b = load_run(make_run(root, "b", 30));
  CHECK(count_best(html_report("t", {a, b})) == 2 + 2);  // both losses are a's; the memory is the same
  CHECK(count_best(html_report("t", {a})) == 0);
}

TEST_CASE("report: runs of one name are told apart, and a run without a step has its row") {
  TempDir root;
  const RunData a = load_run(make_run(root, "x/run", 5)), b = load_run(make_run(root, "y/run", 0));
  const std::string page = html_report("t", {a, b});
  CHECK_THAT(page, ContainsSubstring("run (" + (root.path / "x/run").string() + ")"));
  CHECK_THAT(page, ContainsSubstring("run (" + (root.path / "y/run").string() + ")"));
  CHECK_THAT(html_report("t", {b}), ContainsSubstring("no data"));
}

TEST_CASE("report: no run directory is a usage error") {
  try {
    write_report({}, "unused.html", "t");
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::usage);
  }
}
