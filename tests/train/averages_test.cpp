#include "train/averages.h"

#include <atomic>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <latch>
#include <thread>

#include "base/files.h"
#include "base/rng.h"
#include "catch.h"
#include "io/checkpoint.h"
#include "io/shard.h"
#include "train/model_files.h"
#include "train/trainer.h"

namespace kiln {
namespace {

namespace fs = std::filesystem;

/// A run of 24 steps at a constant rate after a warm-up of 3.
struct Run {
  fs::path dir;
  Config config;
  std::unique_ptr<Communicator> communicator = make_local_communicator();

  explicit Run(const std::string& averages = "[{every: 2, count: 4}, {every: 3, count: 2, eval: false}]") {
    std::string pattern = (fs::temp_directory_path() / "kiln-averages-XXXXXX").string();
    dir = ::mkdtemp(pattern.data());
    TokenShardWriter shard(dir / "train.bin", 60);
    const Philox random(3, 3);
    std::vector<std::int32_t> text;
    for (std::uint64_t i = 0; i < 3000; ++i) text.push_back(static_cast<std::int32_t>(random.bits(i) % 60));
    shard.append(text);
    shard.finish();
    config = parse_config(fmt::format("run: {{dir: {0}/run, seed: 3, threads: 2}}\n"
                                      "model: {{hidden: 32, ffn: 40, heads: 4, layers: 1, vocab: 60}}\n"
                                      "data: {{train: {0}/train.bin, valid: {0}/train.bin, seq_len: 16}}\n"
                                      "batch: {{sequences: 4}}\n"
                                      "schedule: {{kind: constant, peak_lr: 0.01, warmup_steps: 3, total_steps: 24}}\n"
                                      "checkpoint: {{every: 5, keep: 0}}\n"
                                      "averages: {1}\n"
                                      "eval: {{every: 0, tokens: 320}}\n",
                                      dir.string(), averages),
                          "averages.yaml", {});
  }
  ~Run() { fs::remove_all(dir); }

  fs::path average(const std::string& window, std::int64_t step) const {
    return fs::path(config.run.dir) / "averages" / ("window_" + window) / checkpoint_name(step);
  }
  std::vector<std::int64_t> steps_of(const std::string& window) const {
    std::vector<std::int64_t> steps;
    for (const fs::path& path : list_checkpoints(average(window, 0).parent_path()))
      steps.push_back(checkpoint_step(path).value());
    return steps;
  }
};

void nothing(const FinishedAverage&) {}

std::vector<float> values_of(const ModelWeights& weights) {
  std::vector<float> all;
  for (const Parameter& parameter : weights.table().parameters) {
    const std::span<const float> values = weights.view(parameter).span<float>();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

TEST_CASE("windows give the fp64 mean of their steps, and leave the training as it is") {
  const Run run;
  std::map<std::int64_t, std::vector<float>> at;
  {
    Config plain = run.config;
    plain.averages.clear();
    Trainer trainer(plain, *run.communicator, {.quiet = true, .write_files = false});
    while (trainer.at().step < 24) {
      trainer.step();
      at[trainer.at().step] = values_of(trainer.weights());
    }
  }
  Trainer trainer(run.config, *run.communicator, {.quiet = true});
  trainer.run();
  CHECK(values_of(trainer.weights()) == at[24]);
  CHECK(run.steps_of("2x4") == std::vector<std::int64_t>{10, 18});  // 4 6 8 10, 12 14 16 18; 20 22 24 go on
  CHECK(run.steps_of("3x2") ==
        std::vector<std::int64_t>{6, 12, 18, 24});  // 3 is the last step of the warm-up: peak rate

  const std::vector<float> mean = values_of(load_model(run.average("2x4", 10)));
  for (std::size_t k = 0; k < mean.size(); ++k) {
    double sum = 0;
    for (const std::int64_t step : {4, 6, 8, 10}) sum += 0.25 * static_cast<double>(at[step][k]);
    if (mean[k] != static_cast<float>(sum)) FAIL_CHECK("element " << k);
  }
  const Json merge = read_json(run.average("2x4", 10) / "merge.json");
  CHECK(merge.at("method") == "sma");
  CHECK(merge.at("checkpoints").size() == 4);
  CHECK(merge.at("checkpoints")[1].at("step") == 6);
  CHECK(merge.at("checkpoints")[1].at("decay") == 0.75);
  CHECK(read_json(run.average("2x4", 10) / "state.json").at("step") == 10);
}

TEST_CASE("an average's loss is that of its directory, and metrics say what it cost") {
  const Run run;
  Trainer(run.config, *run.communicator, {.quiet = true}).run();
  const std::vector<StepMetrics> metrics = read_metrics(fs::path(run.config.run.dir) / "metrics.jsonl");
  REQUIRE(metrics.size() == 24);
  REQUIRE(metrics[9].average_loss.size() == 1);
  CHECK(metrics[9].average_loss[0].window == "2x4");
  const ModelWeights mean = load_model(run.average("2x4", 10));
  const Dataset data(run.config.data.valid, 16, 60, 3);
  Evaluator evaluator(mean, 4, 16);
  CHECK(metrics[9].average_loss[0].loss == Approx(evaluator.run(data, 20, *run.communicator).loss).epsilon(1e-9));
  CHECK(metrics[5].average_loss.empty());  // eval: false
  CHECK(metrics[9].average_ms.value() > 0);
  CHECK(metrics[5].average_ms.value() > 0);
  CHECK_FALSE(metrics[6].average_ms.has_value());
}

TEST_CASE("a run resumed anywhere gives the averages of one that never stopped, bit for bit") {
  const Run whole;
  Trainer(whole.config, *whole.communicator, {.quiet = true}).run();
  for (const std::int64_t stop : {5, 10, 15, 20}) {
    const Run run;
    Trainer(run.config, *run.communicator, {.quiet = true}).run();
    fs::remove_all(fs::path(run.config.run.dir) / "averages");
    Trainer resumed(run.config, *run.communicator, {.quiet = true});
    resumed.resume(fs::path(run.config.run.dir) / checkpoint_name(stop));
    resumed.run();
    for (const std::string window : {"2x4", "3x2"})
      for (const std::int64_t step : run.steps_of(window)) {
        INFO(window << " at " << step << " after " << stop);
        CHECK(step > stop);
        CHECK(hash_file(run.average(window, step) / "model.safetensors") ==
              hash_file(whole.average(window, step) / "model.safetensors"));
      }
    CHECK(run.steps_of("2x4").size() == (stop < 10 ? 2u : stop < 18 ? 1u : 0u));
  }
}

TEST_CASE("a checkpoint without averages, or with other windows, begins them anew") {
  const Run run("[{every: 2, count: 4}]");
  Trainer(run.config, *run.communicator, {.quiet = true}).run();
  const fs::path checkpoint = fs::path(run.config.run.dir) / checkpoint_name(15);
  CHECK(fs::exists(checkpoint / "averages.safetensors"));
  Config other = run.config;
  other.run.dir = (run.dir / "other").string();
  other.averages = {{.every = 2, .count = 5}};
  Trainer trainer(other, *run.communicator, {.quiet = true});
  trainer.resume(checkpoint);
  trainer.run();
  const auto found = list_checkpoints(fs::path(other.run.dir) / "averages/window_2x5");
  REQUIRE(found.size() == 1);
  CHECK(checkpoint_step(found[0]) == 24);  // 16 18 20 22 24
  Config larger = run.config;
  larger.model.ffn = 48;
  const ModelWeights loaded = load_model(checkpoint);
  const DeviceWeights weights(loaded);
  Averages fits(run.config, weights, true, nothing);
  fits.load(checkpoint);
  const ModelWeights another(model_config(larger), DType::f32);
  const DeviceWeights of_another(another);
  Averages refuses(larger, of_another, true, nothing);
  CHECK_THROWS_WITH(refuses.load(checkpoint), ContainsSubstring("is missing, or not f64 of shape"));
}

TEST_CASE("weights that come as bf16 halves through a copy give the same sums as those of the host") {
  const Run run("[{every: 1, count: 3, start: 1}, {every: 2, count: 2, start: 1}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  initialise(host, 7);
  const DeviceWeights direct(host);
  // A device's layout on the host: padded bf16 storages and the lower halves of their masters.
  const DeviceWeights device(host, StorageLayout(DType::bf16, 64), true, cpu_backend());
  REQUIRE_FALSE(device.shared());
  Averages at_once(run.config, direct, true, nothing), behind(run.config, device, true, nothing);
  int compared = 0;
  for (std::int64_t step = 1; step <= 6; ++step) {
    for (const Parameter& parameter : host.table().parameters)
      for (float& value : host.view(parameter).span<float>()) value = value * 1.25f - 0.003f;
    device.push();
    const RunPosition at{.step = step};
    CHECK(at_once.take(at).has_value());
    CHECK(behind.take(at).has_value());
    CHECK(at_once.to_evaluate() == behind.to_evaluate());
    for (const std::size_t window : at_once.to_evaluate()) {
      std::vector<float> mean, same;
      at_once.evaluate(window, [&](const FinishedAverage& average) { mean = values_of(*average.weights); });
      behind.evaluate(window, [&](const FinishedAverage& average) { same = values_of(*average.weights); });
      CHECK(same == mean);
      CHECK(std::abs(mean[5]) > 0);
      ++compared;
    }
  }
  CHECK(compared == 3);  // 1x3 at steps 3 and 6, 2x2 at step 4
  CHECK(at_once.to_evaluate().empty());

  // And back: while another model is shown, a plan reads that; afterwards the same bits as before.
  const ModelWeights other(model_config(run.config), DType::f32);
  initialise(other, 8);
  const std::vector<float> before = values_of(host);
  for (const DeviceWeights* weights : {&direct, &device}) {
    float seen = 0;
    weights->with(other, [&] {
      const Tensor first = weights->storage(0);
      seen = first.dtype() == DType::f32 ? first.as<float>()[3] : to_float(first.as<bfloat16>()[3]);
    });
    CHECK(seen == Approx(other.storage(0).as<float>()[3]).epsilon(0.01));
    weights->pull();
    CHECK(values_of(host) == before);
  }
}

TEST_CASE("a rank that keeps no sums knows what is due, and a mean must be evaluated before the next sample") {
  const Run run("[{every: 2, count: 2, start: 1}, {every: 2, count: 3, start: 1, eval: false}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  const DeviceWeights weights(host);
  Averages counts(run.config, weights, false, nothing);
  CHECK_FALSE(counts.take({.step = 1}).has_value());
  CHECK(counts.take({.step = 2}).has_value());
  CHECK(counts.take({.step = 4}).has_value());
  REQUIRE(counts.to_evaluate() == std::vector<std::size_t>{0});
  CHECK_THROWS_WITH(counts.take({.step = 6}), ContainsSubstring("the mean of 2x2 waits for its evaluation"));
  CHECK_THROWS_WITH(counts.evaluate(1, nothing), ContainsSubstring("the mean of 2x3 is not complete"));
  counts.evaluate(0, [](const FinishedAverage& average) {
    CHECK(average.taken.size() == 2);
    CHECK(average.weights != nullptr);  // what the first rank sends is evaluated by all
  });
  CHECK(counts.to_evaluate().empty());
  CHECK_FALSE(counts.settle().has_value());
}

/// A disk that takes its time: write() begins at once and ends after finish().
struct SlowDisk {
  std::latch open{1};
  std::vector<std::vector<float>> written;

  void write(const FinishedAverage& average) {
    open.wait();
    written.push_back(values_of(*average.weights));
  }
  void finish() { open.count_down(); }
};

TEST_CASE("a mean is written while its window goes on, and a checkpoint waits for it") {
  const Run run("[{every: 1, count: 2, start: 1, eval: false}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  initialise(host, 7);
  const DeviceWeights shared(host), copied(host, StorageLayout(DType::bf16, 64), true, cpu_backend());
  for (const DeviceWeights* weights : {&shared, &copied}) {
    SlowDisk disk;
    Averages averages(run.config, *weights, true, [&](const FinishedAverage& average) { disk.write(average); });
    weights->push();
    const std::vector<float> first = values_of(host);
    averages.take({.step = 1});
    averages.take({.step = 2});  // complete
    for (const Parameter& parameter : host.table().parameters)
      for (float& value : host.view(parameter).span<float>()) value *= 1.5f;
    weights->push();
    averages.take({.step = 3});  // the window goes on, and no write has ended
    std::jthread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      disk.finish();
    });
    const fs::path checkpoint = run.dir / (weights == &shared ? "shared" : "copied");
    fs::create_directories(checkpoint);
    averages.save(checkpoint);
    REQUIRE(disk.written.size() == 1);
    CHECK((disk.written[0] == first));  // in brackets: no list of the values
    later.join();
    Averages resumed(run.config, *weights, true, [&](const FinishedAverage& average) { disk.write(average); });
    resumed.load(checkpoint);
    resumed.take({.step = 4});
    CHECK_FALSE(resumed.settle().has_value());
    REQUIRE(disk.written.size() == 2);
    CHECK((disk.written[1] == values_of(host)));
    for (const Parameter& parameter : host.table().parameters)
      for (float& value : host.view(parameter).span<float>()) value /= 1.5f;
  }
}

/// Steps on which no window of even steps is due, until one throws.
void until_it_fails(Averages& averages) {
  for (int i = 0; i < 1000; ++i) {
    averages.take({.step = 11});
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

TEST_CASE("a mean that cannot be written ends the run with its name, and no checkpoint claims it") {
  const Run run("[{every: 2, count: 4, eval: false}]");
  fs::create_directories(run.dir / "run/averages");
  std::ofstream(run.dir / "run/averages/window_2x4") << "no directory";
  Trainer trainer(run.config, *run.communicator, {.quiet = true});
  CHECK_THROWS_WITH(trainer.run(), ContainsSubstring("averages/window_2x4/step_00000010"));
  const auto found = list_checkpoints(run.config.run.dir);
  REQUIRE(found.size() == 1);
  CHECK(checkpoint_step(found[0]) == 5);

  // Without a checkpoint in between, the next step says so.
  const ModelWeights host(model_config(run.config), DType::f32);
  const DeviceWeights weights(host);
  Averages averages(run.config, weights, true, [](const FinishedAverage&) { fail(ExitCode::resource, "disk full"); });
  for (const std::int64_t step : {4, 6, 8, 10}) averages.take({.step = step});
  CHECK_THROWS_WITH(until_it_fails(averages), "disk full");
}

/// Disks of two windows that stall: `first` writes when it is opened, `second` then fails, whenever it is asked.
struct TwoDisks {
  std::latch first_open{1}, second_open{1};
  std::atomic<int> asked_of_second = 0;

  void write(const FinishedAverage& average, const std::string& second) {
    if (average.name != second) return first_open.wait();
    ++asked_of_second;
    second_open.wait();
    fail(ExitCode::resource, "disk full");
  }
};

TEST_CASE("behind a mean that is lost no other is written while its thread is at work") {
  const Run run("[{every: 2, count: 1, start: 1, eval: false}, {every: 4, count: 1, start: 1, eval: false}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  initialise(host, 7);
  const DeviceWeights copied(host, StorageLayout(DType::bf16, 64), true, cpu_backend());
  copied.push();
  TwoDisks disks;
  {
    Averages averages(run.config, copied, true, [&](const FinishedAverage& mean) { disks.write(mean, "4x1"); });
    averages.take({.step = 4});
    averages.take({.step = 8});  // its thread waits for the first window's write before it comes to the second's
    disks.second_open.count_down();
    std::jthread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(200));
      disks.first_open.count_down();
    });
    CHECK_THROWS_WITH(until_it_fails(averages), "disk full");
  }
  CHECK(disks.asked_of_second == 1);
}

TEST_CASE("what the thread that adds up runs into ends the run at its next step, due or not") {
  const Run run("[{every: 4, count: 1, start: 1, eval: false}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  initialise(host, 7);
  const DeviceWeights copied(host, StorageLayout(DType::bf16, 64), true, cpu_backend());
  copied.push();
  TwoDisks disks;
  Averages averages(run.config, copied, true, [&](const FinishedAverage& mean) { disks.write(mean, "4x1"); });
  averages.take({.step = 4});
  averages.take({.step = 8});
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // that thread waits for the write, and takes its error
  disks.second_open.count_down();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  CHECK_THROWS_WITH(until_it_fails(averages), "disk full");
}

TEST_CASE("a mean that is not finite is not written, and is told when means are settled") {
  const Run run("[{every: 1, count: 2, start: 1, eval: false}]");
  const ModelWeights host(model_config(run.config), DType::f32);
  host.storage(0).span<float>()[0] = INFINITY;
  const DeviceWeights weights(host);
  bool written = false;
  Averages averages(run.config, weights, true, [&](const FinishedAverage&) { written = true; });
  for (std::int64_t step = 1; step <= 4; ++step) averages.take({.step = step});
  const std::optional<FinishedAverage> damaged = averages.settle();
  REQUIRE(damaged.has_value());
  CHECK(damaged->taken.back().step == 2);
  CHECK_FALSE(written);
  CHECK_FALSE(averages.settle().has_value());
}

TEST_CASE("windows are read, written and checked like any key") {
  const Run run;
  const Config again = parse_config(to_yaml(run.config), "again.yaml", {});
  CHECK(to_json(again) == to_json(run.config));
  CHECK(again.averages[1].count == 2);
  CHECK_FALSE(again.averages[1].evaluate);
  const auto message = [&](const std::string& value) {
    const std::vector<std::string> overrides{"averages=" + value};
    try {
      parse_config(to_yaml(run.config), "c.yaml", overrides);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(message("5"), ContainsSubstring("expected a list of windows"));
  CHECK_THAT(message("[{every: 5}]"), ContainsSubstring("every and count of at least 1"));
  CHECK_THAT(message("[{every: 5, coumt: 2}]"), ContainsSubstring("key 'coumt' is not known"));
  CHECK_THAT(message("[{every: 5, count: 2}, {every: 5, count: 2}]"), ContainsSubstring("is given twice"));
  CHECK(message("[{every: 5, count: 2, start: 7}]") == "no error");
  CHECK_THAT(config_help(), ContainsSubstring("averages"));
  Config none = run.config;
  none.averages.clear();
  const auto parameters = static_cast<std::uint64_t>(model_config(run.config).parameter_count());
  CHECK(average_host_bytes(run.config, 1000, cpu_backend()) == parameters * 2 * (8 + 4));
  CHECK(average_host_bytes(none, 1000, cpu_backend()) == 0);
}

}  // namespace
}  // namespace kiln
