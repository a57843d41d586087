#include "report/metrics.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "base/error.h"
#include "catch.h"
#include "support.h"

std::atomic<long> allocations{0};

// Not inlined, where GCC would find malloc's memory given to another function than free.
[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* p = std::malloc(size)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(size);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

using namespace kiln;

TEST_CASE("metrics: the line has exactly the agreed keys") {
  TempDir dir;
  MetricsWriter writer(dir.path / "run", 0);
  StepMetrics m{.step = 1,
                .tokens = 2048,
                .loss = 10.5,
                .lr = 1e-5,
                .grad_norm = 0.1,
                .step_ms = 12.25,
                .tokens_per_s = 167183.67,
                .mfu = 0.5,
                .memory_bytes = 18446744073709551615ULL};
  writer.write(m);
  m.loss = std::numeric_limits<double>::quiet_NaN();
  m.grad_norm = -std::numeric_limits<double>::infinity();
  m.valid_loss = 3.25;
  m.average_loss = {{"20x10", 3.125}, {"50x4", std::nan("")}};
  m.average_ms = 1.5;
  writer.write(m);
  CHECK(slurp(dir.path / "run/metrics.jsonl") ==
        R"({"step": 1, "tokens": 2048, "loss": 10.5, "lr": 1e-05, "grad_norm": 0.1, "step_ms": 12.25, )"
        R"("tokens_per_s": 167183.67, "mfu": 0.5, "memory_bytes": 18446744073709551615})"
        "\n"
        R"({"step": 1, "tokens": 2048, "loss": null, "lr": 1e-05, "grad_norm": null, "step_ms": 12.25, )"
        R"("tokens_per_s": 167183.67, "mfu": 0.5, "memory_bytes": 18446744073709551615, "valid_loss": 3.25, )"
        R"("average_loss": {"20x10": 3.125, "50x4": null}, "average_ms": 1.5})"
        "\n");
}

TEST_CASE("metrics: what is written is read back exactly") {
  TempDir dir;
  MetricsWriter writer(dir.path, 0);
  StepMetrics m = metrics_at(3);
  m.loss = 1.0 / 3;
  m.lr = 5e-324;
  m.valid_loss = std::numeric_limits<double>::max();
  m.mfu = std::numeric_limits<double>::infinity();
  m.average_loss = {{"20x10", 1.0 / 7}};
  m.average_ms = 0.1;
  writer.write(m);
  writer.write(metrics_at(4));
  const auto read = read_metrics(dir.path / "metrics.jsonl");
  REQUIRE(read.size() == 2);
  CHECK(read[0].step == 3);
  CHECK(read[0].tokens == m.tokens);
  CHECK(read[0].loss == m.loss);
  CHECK(read[0].lr == m.lr);
  CHECK(read[0].grad_norm == m.grad_norm);
  CHECK(read[0].step_ms == m.step_ms);
  CHECK(read[0].tokens_per_s == m.tokens_per_s);
  CHECK(read[0].memory_bytes == m.memory_bytes);
  CHECK(read[0].valid_loss == m.valid_loss);
  REQUIRE(read[0].average_loss.size() == 1);
  CHECK(read[0].average_loss[0].window == "20x10");
  CHECK(read[0].average_loss[0].loss == 1.0 / 7);
  CHECK(read[0].average_ms == 0.1);
  CHECK(read[1].average_loss.empty());
  CHECK(std::isnan(read[0].mfu));
  CHECK_FALSE(read[1].valid_loss.has_value());
}

TEST_CASE("metrics: the longest line fits") {
  TempDir dir;
  MetricsWriter writer(dir.path, 0);
  constexpr double kLong = -2.2250738585072014e-308;
  constexpr std::int64_t kLow = std::numeric_limits<std::int64_t>::min();
  writer.write({.step = kLow,
                .tokens = kLow,
                .loss = kLong,
                .lr = kLong,
                .grad_norm = kLong,
                .step_ms = kLong,
                .tokens_per_s = kLong,
                .mfu = kLong,
                .memory_bytes = ~0ULL,
                .valid_loss = kLong});
  const auto read = read_metrics(dir.path / "metrics.jsonl");
  REQUIRE(read.size() == 1);
  CHECK(read[0].valid_loss == kLong);
}

TEST_CASE("metrics: a rescue stands in the line of the step that follows it") {
  TempDir dir;
  MetricsWriter writer(dir.path, 0);
  StepMetrics m = metrics_at(56);
  m.rescue = RescueEvent{.number = 2,
                         .step = 57,
                         .resumed_step = 55,
                         .oldest_step = 45,
                         .checkpoints = 3,
                         .optimizer_states = "average",
                         .reason = "runs/\"a\": the loss is 9"};
  writer.write(m);
  writer.write(metrics_at(57));
  CHECK_THAT(slurp(dir.path / "metrics.jsonl"),
             ContainsSubstring(R"("rescue": {"number":2,"step":57,"resumed_step":55,"oldest_step":45,"checkpoints":3,)"
                               R"("optimizer_states":"average","reason":"runs/\"a\": the loss is 9"}})"
                               "\n"));
  const auto read = read_metrics(dir.path / "metrics.jsonl");
  REQUIRE(read.size() == 2);
  CHECK(read[0].rescue == m.rescue);
  CHECK_FALSE(read[1].rescue.has_value());
  CHECK(to_string(*m.rescue) ==
        "rescue 2, step 57: mean of 3 checkpoints, steps 45 to 55, optimizer states averaged; went on after step 55 "
        "(runs/\"a\": the loss is 9)");
  // A long reason is cut, between characters, so that the line stays whole.
  m.rescue->reason = std::string(399, 'x') + "\u00e9 and more";
  writer.write(m);
  CHECK(read_metrics(dir.path / "metrics.jsonl").back().rescue->reason == std::string(399, 'x'));
  spill(dir.path / "metrics.jsonl", R"({"step": 1, "tokens": 1, "loss": 1, "lr": 1, "grad_norm": 1, "step_ms": 1, )"
                                    R"("tokens_per_s": 1, "mfu": 1, "memory_bytes": 1, "rescue": {"number": 1}})"
                                    "\n");
  CHECK_THROWS_WITH(read_metrics(dir.path / "metrics.jsonl"),
                    ContainsSubstring("metrics.jsonl:1: key \"rescue\" is {\"number\":1}"));
}

TEST_CASE("metrics: a resumed file equals one that never stopped") {
  TempDir dir;
  const auto path = dir.path / "metrics.jsonl";
  {
    MetricsWriter writer(dir.path, 0);
    for (int step = 1; step <= 10; ++step) writer.write(metrics_at(step));
  }
  const std::string whole = slurp(path);
  const auto resume = [&](std::int64_t k) {
    MetricsWriter writer(dir.path, k);
    for (std::int64_t step = k + 1; step <= 10; ++step) writer.write(metrics_at(step));
  };
  SECTION("later lines are dropped") {
    resume(4);
    CHECK(slurp(path) == whole);
  }
  SECTION("a half-written last line is dropped") {
    const std::size_t cut = GENERATE(2, 30, 100);
    spill(path, whole.substr(0, whole.size() - cut));
    resume(9);
    CHECK(slurp(path) == whole);
  }
  SECTION("a last line that lacks only its newline is kept") {
    spill(path, whole.substr(0, whole.size() - 1));
    resume(10);
    CHECK(slurp(path) == whole);
  }
  SECTION("nothing to drop leaves the file alone") {
    const auto before = std::filesystem::last_write_time(path);
    MetricsWriter writer(dir.path, 10);
    CHECK(std::filesystem::last_write_time(path) == before);
  }
  SECTION("step 0 starts afresh, whatever is there") {
    spill(path, whole + "rubbish\n");
    resume(0);
    CHECK(slurp(path) == whole);
  }
}

TEST_CASE("metrics: a bad line is a data error with file and line") {
  TempDir dir;
  const auto path = dir.path / "metrics.jsonl";
  MetricsWriter(dir.path, 0).write(metrics_at(1));
  const std::string good = slurp(path);
  const auto error_of = [&](const std::string& text) {
    spill(path, text);
    try {
      read_metrics(path);
    } catch (const Error& e) {
      CHECK(e.code() == ExitCode::data);
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(error_of(good + "{\"step\": 2, \n" + good), ContainsSubstring("metrics.jsonl:2: found `{\"step\": 2, `"));
  CHECK_THAT(error_of(good + "[1]\n"), ContainsSubstring("metrics.jsonl:2: found `[1]`, expected one JSON object"));
  CHECK_THAT(error_of("{\"step\": 1}\n"), ContainsSubstring(":1: key \"tokens\" is missing, expected an integer"));
  CHECK_THAT(error_of("{\"step\": 1.5}\n"), ContainsSubstring(":1: key \"step\" is 1.5, expected an integer"));
  CHECK_THAT(error_of("{\"step\": 1, \"tokens\": 1, \"loss\": \"x\"}\n"), ContainsSubstring("key \"loss\" is \"x\""));
  CHECK(error_of(good + good.substr(0, 40)) == "no error");
  CHECK(read_metrics(path).size() == 1);
  CHECK_THROWS_AS(read_metrics(dir.path / "missing"), Error);
}

TEST_CASE("metrics: a full disk is a resource error") {
  if (!std::filesystem::exists("/dev/full")) return;
  AppendFile full("/dev/full", AppendFile::Open::append);
  try {
    full.write("x");
    FAIL("no error");
  } catch (const Error& e) {
    CHECK(e.code() == ExitCode::resource);
  }
}

TEST_CASE("metrics: writing does not allocate") {
  TempDir dir;
  MetricsWriter writer(dir.path, 0);
  StepMetrics m = metrics_at(1);
  m.valid_loss = 1e300 / 3;
  const long before = allocations;
  for (int i = 0; i < 100; ++i) writer.write(m);
  CHECK(allocations == before);
}
