#include <fmt/format.h>

#include <cmath>

#include "apps/program.h"
#include "catch.h"
#include "report/metrics.h"

// Runs under mpirun; labelled `mpi` in CTest.
namespace kiln::test {
namespace {

std::string launch(int ranks) {
  return fmt::format(
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n {} --oversubscribe --bind-to none KILN ",
      ranks);
}

TEST_CASE("one, two, three and four ranks give the same losses over 50 steps", "[mpi]") {
  for (const std::string optimizer : {"adamw", "galore", "fira"}) {
    const Workspace at;
    const std::string train = "train DIR/c.yaml --quiet optimizer.kind=" + optimizer;
    REQUIRE(at("KILN " + train + " run.dir=DIR/r1").code == 0);
    const std::vector<StepMetrics> one = read_metrics(at.dir / "r1/metrics.jsonl");
    REQUIRE(one.size() == 50);
    for (const int ranks : {2, 3, 4}) {
      const Outcome outcome = at(launch(ranks) + train + fmt::format(" run.dir=DIR/r{}", ranks));
      INFO(outcome.text);
      REQUIRE(outcome.code == 0);
      const std::vector<StepMetrics> many = read_metrics(at.dir / fmt::format("r{}/metrics.jsonl", ranks));
      REQUIRE(many.size() == 50);
      double worst = 0;
      for (std::size_t i = 0; i < 50; ++i) worst = std::max(worst, std::abs(many[i].loss / one[i].loss - 1));
      INFO(optimizer << " on " << ranks << " ranks");
      CHECK(worst < 1e-6);
      CHECK(std::abs(many.back().valid_loss.value() / one.back().valid_loss.value() - 1) < 1e-6);
    }
  }
}

TEST_CASE("ranks that update in backward give the weights of updates after it, bit for bit", "[mpi]") {
  const Workspace at;
  const std::string train = launch(2) +
                            "train DIR/c.yaml --quiet schedule.total_steps=20 batch.micro=6 "
                            "optimizer.clip_norm=0 optimizer.kind=fira ";
  for (const std::string update : {"after_backward", "in_backward"}) {
    const Outcome outcome = at(train + "memory.update=" + update + " run.dir=DIR/" + update);
    INFO(outcome.text);
    REQUIRE(outcome.code == 0);
  }
  for (const std::string file : {"model.safetensors", "optimizer-00000-of-00001.safetensors"})
    CHECK(at("cmp DIR/after_backward/step_00000020/" + file + " DIR/in_backward/step_00000020/" + file).code == 0);
}

TEST_CASE("ranks resume bitwise, and an error on the ranks ends the launch with its code", "[mpi]") {
  const Workspace at;
  const std::string train = launch(2) + "train DIR/c.yaml --quiet ";
  REQUIRE(at(train + "run.dir=DIR/whole schedule.total_steps=20").code == 0);
  REQUIRE(at(train + "schedule.total_steps=12").code == 0);
  REQUIRE(at(train + "schedule.total_steps=20").code == 0);
  const Outcome same = at("cmp DIR/whole/step_00000020/model.safetensors DIR/run/step_00000020/model.safetensors");
  INFO(same.text);
  CHECK(same.code == 0);
  const Outcome uneven = at(launch(5) + "train DIR/c.yaml"), missing = at(train + "data.train=DIR/none");
  CHECK(uneven.code == 2);
  CHECK_THAT(uneven.text, ContainsSubstring("batch.sequences: 12 do not divide over 5 ranks"));
  CHECK(missing.code == 3);
  CHECK_THAT(missing.text, ContainsSubstring("no file matches"));
}

TEST_CASE("ranks share the evaluation of averages that the first one keeps", "[mpi]") {
  const Workspace at;
  const std::string train = launch(2) + "train DIR/c.yaml --quiet snapshots.every=2 'averages=[{every: 2, count: 5}]' ";
  const Outcome outcome = at(train);
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  REQUIRE(at("KILN merge DIR/run/snapshots/step_0000002[02468] --out DIR/merged").code == 0);
  CHECK(at("cmp DIR/merged/model.safetensors DIR/run/averages/window_2x5/step_00000028/model.safetensors").code == 0);
  const std::vector<StepMetrics> metrics = read_metrics(at.dir / "run/metrics.jsonl");
  REQUIRE(metrics[27].average_loss.size() == 1);
  const Outcome alone = at("KILN train DIR/c.yaml --quiet run.dir=DIR/one 'averages=[{every: 2, count: 5}]'");
  REQUIRE(alone.code == 0);
  const double one = read_metrics(at.dir / "one/metrics.jsonl")[27].average_loss[0].loss;
  CHECK(std::abs(metrics[27].average_loss[0].loss / one - 1) < 1e-6);
}

}  // namespace
}  // namespace kiln::test
