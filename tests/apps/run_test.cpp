#include <cmath>

#include "apps/program.h"
#include "base/files.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "report/metrics.h"
#include "train/config.h"

namespace kiln::test {
namespace {

std::vector<double> losses(const fs::path& run) {
  std::vector<double> list;
  for (const StepMetrics& step : read_metrics(run / "metrics.jsonl")) list.push_back(step.loss);
  return list;
}

std::string fingerprint(const fs::path& checkpoint) {
  return hash_file(checkpoint / "model.safetensors") + hash_file(checkpoint / "optimizer-00000-of-00001.safetensors");
}

TEST_CASE("train, merge, evaluate, generate, export and report work on one another's files") {
  const Workspace at;
  REQUIRE(at("KILN train DIR/c.yaml snapshots.every=10 --quiet").code == 0);
  REQUIRE(at("KILN merge DIR/run --last 3 --out DIR/merged").code == 0);
  const Outcome merged = at("KILN eval DIR/merged --data DIR/train.bin --seq-len 16 --json");
  INFO(merged.text);
  REQUIRE(merged.code == 0);
  CHECK(Json::parse(merged.text).at("loss").get<double>() < std::log(64.0));
  CHECK(at("KILN train DIR/c.yaml run.dir=DIR/more --init-from DIR/merged --quiet").code == 0);
  // In shards it is the same model.
  REQUIRE(at("KILN merge DIR/run --last 3 --out DIR/shards --max-shard-size 20KiB").code == 0);
  CHECK(fs::exists(at.dir / "shards/model.safetensors.index.json"));
  const Outcome sharded = at("KILN eval DIR/shards --data DIR/train.bin --seq-len 16 --json");
  INFO(sharded.text);
  REQUIRE(sharded.code == 0);
  CHECK(Json::parse(sharded.text).at("loss") == Json::parse(merged.text).at("loss"));
  CHECK(losses(at.dir / "more").front() < losses(at.dir / "run").front());
  CHECK(at("KILN export DIR/merged --out DIR/exported --dtype bf16").code == 0);
  CHECK(at("KILN import DIR/exported --out DIR/imported").code == 0);
  CHECK(at("KILN eval DIR/imported --data DIR/train.bin --seq-len 16").code == 0);
  CHECK(at("KILN report DIR/run DIR/more --out DIR/report.html").code == 0);
  CHECK(fs::file_size(at.dir / "report.html") > 5000);
  CHECK(at("KILN plan DIR/c.yaml").code == 0);
  const Outcome doctor = at("KILN doctor --json");
  CHECK(doctor.code == 0);
  const Json findings = Json::parse(doctor.text);
  const bool cuda = findings.at("CUDA backend").at("state") != "not compiled in";
  for (const char* library : {"cuBLASLt", "cuSOLVER"})
    CHECK((findings.at(library).at("state") != "not compiled in") == cuda);
  CHECK(at("KILN generate DIR/merged --prompt x").code == 3);  // no tokenizer in it
}

TEST_CASE("averages kept while training are the merges of snapshots, byte for byte, also after kill -9") {
  const Workspace at;
  const std::string train =
      "KILN train DIR/c.yaml --quiet snapshots.every=2 checkpoint.every=3 'averages=[{every: 2, count: 5}]' ";
  REQUIRE(at(train + "run.dir=DIR/whole").code == 0);
  const auto found = list_checkpoints(at.dir / "whole/averages/window_2x5");
  REQUIRE(found.size() == 4);  // steps 10 to 18, 20 to 28, 30 to 38, 40 to 48
  REQUIRE(checkpoint_step(found[1]) == 28);
  REQUIRE(at("KILN merge DIR/whole/snapshots/step_0000002[02468] --out DIR/merged").code == 0);
  CHECK(hash_file(found[1] / "model.safetensors") == hash_file(at.dir / "merged/model.safetensors"));
  CHECK(hash_file(found[0] / "model.safetensors") != hash_file(at.dir / "merged/model.safetensors"));
  const Outcome eval = at("KILN eval DIR/whole/averages/window_2x5/step_00000028 --data DIR/train.bin --seq-len 16");
  CHECK(eval.code == 0);
  CHECK(read_metrics(at.dir / "whole/metrics.jsonl")[27].average_loss.size() == 1);
  CHECK(at("KILN report DIR/whole --out DIR/report.html").code == 0);
  CHECK_THAT(read_text(at.dir / "report.html"), ContainsSubstring("average 2x5"));
  CHECK_THAT(at("KILN plan DIR/c.yaml 'averages=[{every: 2, count: 5}]'").text,
             ContainsSubstring("of host memory on the first rank"));

  for (const char* wait : {"0.12", "0.16", "0.2"}) at(train + "& sleep " + std::string(wait) + "; kill -9 $!; wait $!");
  REQUIRE(at(train).code == 0);
  for (const fs::path& path : found)
    CHECK(hash_file(at.dir / "run/averages/window_2x5" / path.filename() / "model.safetensors") ==
          hash_file(path / "model.safetensors"));
}

TEST_CASE("predict tells the annealed loss, checks it with a real anneal, and learns from the error") {
  const Workspace at;
  REQUIRE(at("KILN train DIR/c.yaml snapshots.every=2 checkpoint.keep=0 schedule.final_ratio=0 --quiet").code == 0);
  const Outcome plain = at("KILN predict DIR/run --json");
  INFO(plain.text);
  REQUIRE(plain.code == 0);
  CHECK(Json::parse(plain.text).at("annealed_loss").is_null());
  CHECK(Json::parse(plain.text).at("anneal").at("begin") == 44);  // the snapshot nearest to 45
  REQUIRE(at("KILN predict DIR/run --anneal-check --end 30 --share 0.3 --quiet").code == 0);
  REQUIRE(at("KILN predict DIR/run --anneal-check --end 20 --share 0.25 --quiet").code == 0);
  const Outcome checked = at("KILN predict DIR/run --anneal-check --end 40 --share 0.25");
  INFO(checked.text);
  REQUIRE(checked.code == 0);
  CHECK_THAT(checked.text, ContainsSubstring("the real anneal reached") && ContainsSubstring("1 earlier anneal"));
  const Json prediction = read_json(at.dir / "run/prediction.json");
  CHECK(prediction.at("anneal").at("begin") == 30);
  CHECK(prediction.at("checks") == 1);  // that of a third of the steps is another kind
  // Its loss is that of the anneal's own last validation, on the same sequences.
  const fs::path anneal = at.dir / "run/anneals/linear_0_00000030_00000040";
  CHECK(prediction.at("annealed_loss").get<double>() ==
        Approx(read_metrics(anneal / "metrics.jsonl").back().valid_loss.value()).epsilon(1e-6));
  CHECK(read_metrics(anneal / "metrics.jsonl").back().lr == 0.0);
  CHECK(fs::is_regular_file(anneal / "check.json"));
  CHECK_THAT(read_text(at.dir / "run/prediction.html"), ContainsSubstring("Predicted anneals"));

  // A second anneal of the same end shares the merges; the same one again evaluates nothing.
  REQUIRE(at("KILN predict DIR/run --anneal-check --end 40 --share 0.25 --shape 1-sqrt --quiet").code == 0);
  const Json other = read_json(at.dir / "run/prediction.json");
  CHECK(other.at("models_evaluated") == 3);  // schedule, QAM, and the anneal
  CHECK(other.at("sweep") == prediction.at("sweep"));
  REQUIRE(at("KILN predict DIR/run --anneal-check --end 40 --share 0.25 --quiet").code == 0);
  Json again = read_json(at.dir / "run/prediction.json");
  CHECK(again.at("models_evaluated") == 0);
  CHECK(again.at("predictors") == prediction.at("predictors"));
  // Other held-out tokens, and merges that nobody kept, are evaluated.
  REQUIRE(at("KILN predict DIR/run --end 40 --share 0.25 --tokens 320 --quiet").code == 0);
  CHECK(read_json(at.dir / "run/prediction.json").at("models_evaluated") > 5);
  fs::remove_all(at.dir / "run/predictions");
  REQUIRE(at("KILN predict DIR/run --anneal-check --end 40 --share 0.25 --quiet").code == 0);
  again = read_json(at.dir / "run/prediction.json");
  CHECK(again.at("models_evaluated") > 20);
  CHECK(again.at("predictors") == prediction.at("predictors"));
}

TEST_CASE("predict evaluates where it is told, and a held-out set of one sequence has no interval over sequences") {
  const Workspace at;
  REQUIRE(at("KILN train DIR/c.yaml snapshots.every=2 --quiet").code == 0);
  const Outcome one = at("KILN predict DIR/run --tokens 16");
  INFO(one.text);
  REQUIRE(one.code == 0);
  CHECK_THAT(one.text, ContainsSubstring("16 held-out tokens in 1 sequence, in f32") && !ContainsSubstring("nan"));
  CHECK(read_json(at.dir / "run/prediction.json").at("low").is_number());
  const Outcome device = at("KILN predict DIR/run --device gpu");
  CHECK(device.code == 2);
  CHECK_THAT(device.text, ContainsSubstring("device 'gpu', expected auto, cpu or cuda"));
  for (const char* wrong : {"--tokens -5", "--counts 1", "--strides 0", "--end -1"}) {
    const Outcome refused = at(std::string("KILN predict DIR/run ") + wrong);
    CHECK(refused.code == 2);
    CHECK_THAT(refused.text, ContainsSubstring(std::string(wrong).substr(0, 5)));
  }
}

TEST_CASE("predict names what a run lacks") {
  const Workspace at;
  CHECK(at("KILN predict DIR/run").code == 2);  // no run
  REQUIRE(at("KILN train DIR/c.yaml --quiet").code == 0);
  const Outcome none = at("KILN predict DIR/run");
  CHECK(none.code == 3);
  CHECK_THAT(none.text, ContainsSubstring("holds 0 snapshots of a constant learning rate"));
  REQUIRE(at("KILN train DIR/c.yaml snapshots.every=10 --resume none --quiet").code == 0);
  const Outcome end = at("KILN predict DIR/run --end 25");
  CHECK(end.code == 2);
  CHECK_THAT(end.text, ContainsSubstring("step 25 has no snapshot; the nearest before is 20"));
  CHECK_THAT(at("KILN predict --help").text, ContainsSubstring("Example:"));
  // Other runs to calibrate on, and the run itself, must know their own losses.
  const Outcome other = at("mkdir DIR/other; KILN predict DIR/run --calibrate DIR/other");
  CHECK(other.code == 3);
  CHECK_THAT(other.text, ContainsSubstring("other: given as --calibrate, and holds no metrics.jsonl"));
  const Outcome self = at("KILN predict DIR/run --calibrate DIR/other/../run");
  CHECK(self.code == 2);
  CHECK_THAT(self.text, ContainsSubstring("--calibrate names the run itself"));
  REQUIRE(at("mv DIR/run/metrics.jsonl DIR/other").code == 0);
  const Outcome own = at("KILN predict DIR/run --calibrate DIR/other");
  CHECK(own.code == 3);
  CHECK_THAT(own.text, ContainsSubstring("run: holds no metrics.jsonl"));
}

TEST_CASE("a run starts or goes on from a merge that holds optimizer states") {
  const Workspace at;
  REQUIRE(at("KILN train DIR/c.yaml checkpoint.keep=0 optimizer.kind=adamw --quiet").code == 0);
  for (const std::string merge : {"reset", "keep-last", "average"})
    REQUIRE(
        at("KILN merge DIR/run/step_0000004* DIR/run/step_00000050 --out DIR/" + merge + " --optimizer-state " + merge)
            .code == 0);
  CHECK_THAT(at("KILN train DIR/c.yaml optimizer.kind=adamw run.dir=DIR/a --init-from DIR/average").text,
             ContainsSubstring("optimizer states of"));
  CHECK_THAT(at("KILN train DIR/c.yaml optimizer.kind=adamw run.dir=DIR/b --init-from DIR/reset").text,
             !ContainsSubstring("optimizer states of"));
  CHECK(losses(at.dir / "a").front() == losses(at.dir / "b").front());  // one model
  CHECK(losses(at.dir / "a").back() != losses(at.dir / "b").back());    // other states
  // With states and state.json a merge is a checkpoint of the run: step 51 follows.
  REQUIRE(at("KILN train DIR/c.yaml optimizer.kind=adamw run.dir=DIR/c schedule.total_steps=55 --quiet "
             "--resume DIR/keep-last")
              .code == 0);
  CHECK(read_metrics(at.dir / "c/metrics.jsonl").front().step == 51);
  CHECK(at("KILN train DIR/c.yaml run.dir=DIR/d --init-from DIR/average --quiet").code == 3);  // Fira's states differ
}

TEST_CASE("compare trains each optimizer and writes table and plots") {
  const Workspace at;
  const Outcome outcome = at(
      "KILN compare DIR/c.yaml snapshots.every=10 --optimizers adamw,fira --peak-lr 0.001,0.002 --out DIR/cmp --quiet");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("adamw") && ContainsSubstring("fira"));
  CHECK(fs::is_regular_file(at.dir / "cmp/table.txt"));
  CHECK(fs::is_regular_file(at.dir / "cmp/report.html"));
  CHECK(read_json(at.dir / "cmp/fira/summary.json").contains("merged_valid_loss"));
}

TEST_CASE("compare tries learning rates and seeds, and gives every optimizer the same bytes of states") {
  const Workspace at;
  const Outcome outcome =
      at("KILN compare DIR/c.yaml --optimizers adam8bit,fira,apollo --peak-lr 0.001 --lr-grid 1,2 --seeds 3,4 "
         "--state-budget 300KiB --for fira:optimizer.alpha=0.5 --out DIR/cmp --quiet");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("best lr"));
  for (const char* name : {"adam8bit", "fira", "apollo"}) {
    int seeds = 0;
    for (const char* run : {"lr0.001-seed3", "lr0.002-seed3", "lr0.001-seed4", "lr0.002-seed4"}) {
      const fs::path summary = at.dir / "cmp" / fmt::format("{}-{}", name, run) / "summary.json";
      if (!fs::is_regular_file(summary)) continue;
      ++seeds;
      CHECK(read_json(summary).at("state_bytes") <= 300 * 1024);
    }
    CHECK(seeds == 3);  // two rates, and the better one once more
  }
  CHECK(load_config(at.dir / "cmp/fira-lr0.001-seed3/config.yaml", {}).optimizer.alpha == 0.5);
  CHECK(load_config(at.dir / "cmp/apollo-lr0.001-seed3/config.yaml", {}).optimizer.alpha != 0.5);
  const Outcome wild = at("KILN compare DIR/c.yaml --optimizers adamw --peak-lr 1e30 --out DIR/wild --quiet");
  CHECK(wild.code == 5);
  CHECK_THAT(wild.text, ContainsSubstring("adamw: every run diverged"));
  CHECK_THAT(read_text(at.dir / "wild/table.txt"), ContainsSubstring("diverged"));
  CHECK(at("KILN compare DIR/c.yaml --optimizers adamw --state-budget 1KiB --out DIR/no").code == 2);
  CHECK(at("KILN compare DIR/c.yaml --optimizers adamw --for fira:optimizer.rank=8 --out DIR/no").code == 2);
}

TEST_CASE("SIGTERM saves and exits with 143; the resumed run ends bitwise as one that never stopped") {
  const Workspace at;
  const std::string longer = " schedule.total_steps=1500 checkpoint.every=0 --quiet";
  REQUIRE(at("KILN train DIR/c.yaml run.dir=DIR/whole" + longer).code == 0);
  const Outcome stopped = at("KILN train DIR/c.yaml" + longer +
                             " & while [ ! -s DIR/run/metrics.jsonl ]; do sleep 0.02; done; kill -TERM $!; wait $!");
  INFO(stopped.text);
  REQUIRE(stopped.code == 143);
  const auto saved = list_checkpoints(at.dir / "run");
  REQUIRE(saved.size() == 1);
  CHECK(checkpoint_step(saved[0]).value() < 1500);
  REQUIRE(at("KILN train DIR/c.yaml" + longer).code == 0);
  CHECK(fingerprint(at.dir / "run/step_00001500") == fingerprint(at.dir / "whole/step_00001500"));
  CHECK(losses(at.dir / "run") == losses(at.dir / "whole"));
}

TEST_CASE("kill -9 at any moment loses no more than the steps since the last checkpoint") {
  const Workspace at;
  const std::string longer = " schedule.total_steps=300 checkpoint.every=3 --quiet";
  REQUIRE(at("KILN train DIR/c.yaml run.dir=DIR/whole" + longer).code == 0);
  for (const char* wait : {"0.15", "0.23", "0.31", "0.19", "0.27"})
    at("KILN train DIR/c.yaml" + longer + " & sleep " + std::string(wait) + "; kill -9 $!; wait $!");
  REQUIRE(at("KILN train DIR/c.yaml" + longer).code == 0);
  CHECK(fingerprint(at.dir / "run/step_00000300") == fingerprint(at.dir / "whole/step_00000300"));
  CHECK(losses(at.dir / "run") == losses(at.dir / "whole"));
}

}  // namespace
}  // namespace kiln::test
