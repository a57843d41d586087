#include "apps/program.h"
#include "catch.h"

namespace kiln::test {
namespace {

void expect(const Outcome& outcome, int code, const std::string& text) {
  INFO(outcome.text);
  CHECK(outcome.code == code);
  CHECK_THAT(outcome.text, ContainsSubstring(text));
}

TEST_CASE("usage and configuration errors exit with 2 and name the place") {
  const Workspace at;
  expect(at("KILN"), 2, "subcommand is required");
  expect(at("KILN train DIR/none.yaml"), 2, "no such configuration file");
  expect(at("sed -i 's/peak_lr/peek_lr/' DIR/c.yaml; KILN train DIR/c.yaml"), 2,
         "c.yaml:5:28: schedule.peek_lr is not a known key; did you mean 'schedule.peak_lr'?");
  const Workspace fresh;
  expect(fresh("KILN train DIR/c.yaml optimizer.kind=firra"), 2, "did you mean 'fira'?");
  expect(fresh("KILN train DIR/c.yaml schedule.total_steps=many"), 2, "expected a whole number");
  expect(fresh("KILN train DIR/c.yaml run.device=cuda"), 2, "run.device: cuda, but this");
  expect(fresh("KILN train DIR/c.yaml batch.micro=5"), 2, "does not divide");
  expect(fresh("KILN train DIR/c.yaml model.heads=5"), 2, "expected a multiple of model.heads 5");
}

TEST_CASE("a budget that nothing fits exits with 4 and says both numbers") {
  const Workspace at;
  expect(at("KILN train DIR/c.yaml memory.budget=1000"), 4, "memory.budget: 1000 bytes, but training needs");
  expect(at("KILN plan DIR/c.yaml --budget 1000"), 0, "training takes");
}

TEST_CASE("bad data exits with 3 and names the file") {
  const Workspace at;
  expect(at("KILN train DIR/c.yaml data.train=DIR/none*"), 3, "no file matches");
  expect(at("head -c 5000 DIR/train.bin > DIR/torn.bin; KILN train DIR/c.yaml data.train=DIR/torn.bin"), 3,
         "the shard is torn");
  expect(at("head -c 2048 /dev/zero > DIR/zero.bin; KILN train DIR/c.yaml data.train=DIR/zero.bin"), 3,
         "it is no token shard");
  expect(at("KILN train DIR/c.yaml model.vocab=30"), 3, "expected less than the vocabulary of 30");
  expect(at("KILN train DIR/c.yaml data.seq_len=5000 "), 3, "at least 5001 for one sample");
  expect(at("KILN train DIR/c.yaml data.tokenizer=DIR/none.model"), 3, "none.model: no such file");
  expect(at("KILN eval DIR/none --data DIR/train.bin"), 3, "no such model directory");
}

TEST_CASE("a torn checkpoint is refused by name and skipped by --resume auto") {
  const Workspace at;
  expect(at("KILN train DIR/c.yaml schedule.total_steps=10 --quiet"), 0, "");
  expect(at("truncate -s 100 DIR/run/step_00000010/model.safetensors;"
            "KILN train DIR/c.yaml schedule.total_steps=10 --resume DIR/run/step_00000010"),
         3, "torn");
  expect(at("KILN train DIR/c.yaml schedule.total_steps=10"), 0, "step_00000005 at step 5");
}

TEST_CASE("a loss that is not finite exits with 5") {
  const Workspace at;
  expect(at("KILN train DIR/c.yaml optimizer.kind=adamw schedule.peak_lr=1e30 optimizer.clip_norm=0"), 5,
         "expected a finite number; the last checkpoint stands");
}

}  // namespace
}  // namespace kiln::test
