#include "apps/program.h"
#include "base/files.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "io/safetensors.h"
#include "report/metrics.h"

namespace kiln::test {
namespace {

/// A stretch of noise in the data makes the loss of a few batches spike, once the rest is learnt.
struct Spiky : Workspace {
  Spiky() {
    TokenShardWriter writer(dir / "spiky.bin", 64);
    const Philox random(3, 4);
    std::vector<std::int32_t> text;
    std::int64_t token = 1;
    for (std::uint64_t i = 0; i < 4000; ++i) {
      token = (token * 5 + static_cast<std::int64_t>(random.bits(i) % 3)) % 64;
      if (i >= 3000 && i < 3060) token = static_cast<std::int64_t>(random.bits(i) % 64);
      text.push_back(static_cast<std::int32_t>(token));
    }
    writer.append(text);
    writer.finish();
  }
  Outcome train(const std::string& more, const std::string& launcher = "KILN ") const {
    return (*this)(
        launcher +
        "train DIR/c.yaml --quiet data.train=DIR/spiky.bin optimizer.kind=adamw batch.sequences=4 batch.micro=2 "
        "schedule.peak_lr=0.01 schedule.warmup_steps=5 schedule.total_steps=120 checkpoint.keep=0 "
        "eval.every=0 run.on_divergence=merge rescue.spike=1.35 " +
        more);
  }
};

std::vector<fs::path> rescues(const fs::path& run) {
  std::vector<fs::path> found;
  for (const fs::directory_entry& entry : fs::directory_iterator(run))
    if (entry.path().filename().string().starts_with("rescue_")) found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

std::string fingerprint(const fs::path& checkpoint) {
  return hash_file(checkpoint / "model.safetensors") + hash_file(checkpoint / "optimizer-00000-of-00001.safetensors");
}

TEST_CASE("a run goes on from the merge of its last checkpoints after a spike, behind the batch that made it") {
  const Spiky at;
  const Outcome outcome = at.train("rescue.limit=20");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("times the median") && ContainsSubstring("rescue 1 of 20"));
  const std::vector<fs::path> found = rescues(at.dir / "run");
  REQUIRE_FALSE(found.empty());
  const Json state = read_json(found[0] / "state.json");
  const auto diverged = state.at("rescued_from").at("step").get<std::int64_t>(),
             step = state.at("step").get<std::int64_t>();
  CHECK(step < diverged);
  CHECK(diverged - step <= 5);
  CHECK(state.at("data_position") == diverged * 4);  // 4 samples a step, none left out before
  CHECK(state.at("rescues") == 1);
  CHECK(state.at("merged_from").size() == 3);
  // The same as kiln merge of those checkpoints, optimizer states averaged.
  std::string inputs;
  for (const Json& path : state.at("merged_from")) inputs += path.get<std::string>() + " ";
  REQUIRE(at("KILN merge " + inputs + "--optimizer-state average --out DIR/merged").code == 0);
  CHECK(fingerprint(found[0]) == fingerprint(at.dir / "merged"));
  const std::vector<StepMetrics> metrics = read_metrics(at.dir / "run/metrics.jsonl");
  REQUIRE(metrics.size() == 120);
  for (std::size_t i = 0; i < metrics.size(); ++i) CHECK(metrics[i].step == static_cast<std::int64_t>(i + 1));
  // Each rescue stands in the line of the step behind it, unless a later one dropped that.
  std::vector<std::int64_t> numbers;
  for (const StepMetrics& m : metrics)
    if (m.rescue) {
      CHECK(m.step == m.rescue->resumed_step + 1);
      const fs::path rescued = at.dir / "run" / fmt::format("rescue_{:08}", m.rescue->step);
      CHECK(to_json(*m.rescue) == read_json(rescued / "state.json").at("rescued_from"));
      numbers.push_back(m.rescue->number);
    }
  REQUIRE_FALSE(numbers.empty());
  CHECK(std::is_sorted(numbers.begin(), numbers.end()));
  CHECK(numbers.back() == read_json(at.dir / "run/step_00000120/state.json").at("rescues"));
  CHECK(state.at("rescued_from").at("checkpoints") == 3);
  CHECK(state.at("rescued_from").at("resumed_step") == step);
  CHECK(state.at("rescued_from").at("oldest_step") == step - 10);
  REQUIRE(at("KILN report DIR/run --out DIR/report.html").code == 0);
  CHECK_THAT(read_text(at.dir / "report.html"), ContainsSubstring("run, rescue") &&
                                                    ContainsSubstring("times the median") &&
                                                    !ContainsSubstring("and resume"));

  // Stopped and resumed, also just before a spike, the run is the same: losses before it are judged by as well.
  for (const std::int64_t stop : {step, step + 10})
    REQUIRE(at.train("rescue.limit=20 run.dir=DIR/again schedule.total_steps=" + std::to_string(stop)).code == 0);
  REQUIRE(at.train("rescue.limit=20 run.dir=DIR/again").code == 0);
  CHECK(fingerprint(at.dir / "again/step_00000120") == fingerprint(at.dir / "run/step_00000120"));
}

TEST_CASE("snapshots and averages of the steps that a rescue drops are removed") {
  const Spiky at;
  const Outcome outcome = at.train(
      "rescue.limit=20 snapshots.every=2 'averages=[{every: 1, count: 2, eval: false}, {every: 1, count: 3, eval: "
      "false}]'");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("run/snapshots: ") && ContainsSubstring("run/averages/window_1x2: ") &&
                               ContainsSubstring("of steps that are dropped"));
  std::vector<fs::path> written;
  for (const char* home : {"snapshots", "averages/window_1x2", "averages/window_1x3"})
    for (const fs::path& path : list_checkpoints(at.dir / "run" / home)) written.push_back(path);
  CHECK(written.size() > 100);
  // What is behind the step at which a rescue went on was written after that rescue.
  int behind = 0;
  for (const fs::path& rescued : rescues(at.dir / "run")) {
    const Json state = read_json(rescued / "state.json");
    for (const fs::path& path : written) {
      if (checkpoint_step(path).value() <= state.at("step").get<std::int64_t>()) continue;
      INFO(path << " and " << rescued);
      CHECK(read_json(path / "state.json").at("rescues").get<int>() >= state.at("rescues").get<int>());
      ++behind;
    }
  }
  CHECK(behind > 0);
}

TEST_CASE("no merge stands beside snapshots and averages of the steps that it drops") {
  const Spiky at;
  const std::string windows =
      "rescue.limit=20 checkpoint.every=8 snapshots.every=1 'averages=[{every: 1, count: 2, eval: false}]' "
      "run.dir=DIR/";
  REQUIRE(at.train(windows + "run").code == 0);
  const std::vector<fs::path> found = rescues(at.dir / "run");
  REQUIRE_FALSE(found.empty());
  const Json state = read_json(found[0] / "state.json");
  const auto step = state.at("step").get<std::int64_t>();
  REQUIRE(state.at("rescued_from").at("step").get<std::int64_t>() > step + 2);

  // The same run, where the merge of the first rescue finds a damaged input, and thus never ends.
  REQUIRE(at.train(windows + "again schedule.total_steps=" + std::to_string(step)).code == 0);
  const fs::path again = at.dir / "again", input = again / checkpoint_name(step - 8) / "model.safetensors";
  fs::copy_file(input, at.dir / "whole");
  std::fstream(input, std::ios::in | std::ios::out | std::ios::binary).seekp(-4, std::ios::end).write("bits", 4);
  const Outcome stopped = at.train(windows + "again");
  INFO(stopped.text);
  CHECK(stopped.code == 3);
  CHECK_THAT(stopped.text, ContainsSubstring("again/snapshots: ") && ContainsSubstring("of steps that are dropped"));
  CHECK(rescues(again).empty());
  const char* homes[] = {"snapshots", "averages/window_1x2"};
  for (const char* home : homes) {
    const std::vector<fs::path> left = list_checkpoints(again / home);
    REQUIRE_FALSE(left.empty());
    CHECK(checkpoint_step(left.back()).value() <= step);
  }

  // A plain resume writes them again, and comes to what the undisturbed run came to.
  fs::copy_file(at.dir / "whole", input, fs::copy_options::overwrite_existing);
  REQUIRE(at.train(windows + "again").code == 0);
  CHECK(fingerprint(again / "step_00000120") == fingerprint(at.dir / "run/step_00000120"));
  for (const char* home : homes) {
    const std::vector<fs::path> whole = list_checkpoints(at.dir / "run" / home), same = list_checkpoints(again / home);
    REQUIRE(same.size() == whole.size());
    for (std::size_t i = 0; i < whole.size(); ++i)
      CHECK(hash_file(same[i] / "model.safetensors") == hash_file(whole[i] / "model.safetensors"));
  }
}

TEST_CASE("rescues end at their limit, also over resumes, and without a checkpoint there is none") {
  const Spiky at;
  const Outcome first = at.train("rescue.limit=1 schedule.total_steps=2000");
  INFO(first.text);
  CHECK(first.code == 5);
  CHECK_THAT(first.text, ContainsSubstring("rescue 1 of 1") && ContainsSubstring("no rescue is left of 1"));
  const auto again = at.train("rescue.limit=1 schedule.total_steps=2000");
  CHECK(again.code == 5);
  // The first loss is finite, its update is not: step 2 sees it, and the only checkpoint holds it.
  const std::string damaged = "run.dir=DIR/nan schedule.peak_lr=1e30 schedule.warmup_steps=0 optimizer.clip_norm=0 ";
  const Outcome none = at.train(damaged);
  INFO(none.text);
  CHECK(none.code == 5);
  CHECK_THAT(none.text, ContainsSubstring("no checkpoint from before to merge (checkpoint.every: 5)"));
  const Outcome stopped = at.train(damaged + "run.on_divergence=stop");
  CHECK(stopped.code == 5);
  CHECK_THAT(stopped.text, ContainsSubstring("the last checkpoint stands") && !ContainsSubstring("rescue"));
}

TEST_CASE("states in the basis of a projector are kept and not averaged") {
  const Spiky at;
  const Outcome outcome = at.train("optimizer.kind=galore optimizer.refresh=4 rescue.limit=20 rescue.spike=1.3");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("with optimizer states of the newest"));
}

TEST_CASE("moments in random bases are kept and not averaged") {
  const Spiky at;
  const Outcome outcome = at.train("optimizer.kind=apollo optimizer.refresh=4 rescue.limit=20 rescue.spike=1.3");
  INFO(outcome.text);
  CHECK_THAT(outcome.text, ContainsSubstring("with optimizer states of the newest"));
}

TEST_CASE("rescue settings that do not fit are refused") {
  const Workspace at;
  const auto refused = [&](const std::string& settings, const std::string& text) {
    const Outcome outcome = at("KILN train DIR/c.yaml run.on_divergence=merge " + settings);
    CHECK(outcome.code == 2);
    CHECK_THAT(outcome.text, ContainsSubstring(text));
  };
  refused("checkpoint.keep=2", "checkpoint.keep: 2, but rescue.checkpoints merges 3");
  refused("checkpoint.every=0", "merge needs checkpoints");
  refused("checkpoint.keep=0 rescue.spike=0.9", "rescue.spike: 0.9, expected more than 1");
  refused("run.on_divergence=merg", "did you mean 'merge'?");
}

TEST_CASE("ranks are rescued together", "[mpi]") {
  const Spiky at;
  const Outcome outcome = at.train("rescue.limit=20",
                                   "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n 2 "
                                   "--oversubscribe --bind-to none KILN ");
  INFO(outcome.text);
  REQUIRE(outcome.code == 0);
  CHECK_THAT(outcome.text, ContainsSubstring("rescue 1 of 20"));
  CHECK_FALSE(rescues(at.dir / "run").empty());
  CHECK(read_metrics(at.dir / "run/metrics.jsonl").size() == 120);
}

}  // namespace
}  // namespace kiln::test
