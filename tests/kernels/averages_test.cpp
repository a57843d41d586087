// Averages of weights that train on the GPU: copied beside the steps, summed on the host.
#include "train/averages.h"

#include <algorithm>
#include <cmath>

#include "catch.h"
#include "io/checkpoint.h"
#include "kernels/run_config.h"
#include "train/device.h"
#include "train/model_files.h"
#include "train/trainer.h"

namespace kiln::test {
namespace {

namespace fs = std::filesystem;

Config make_config(const Scratch& scratch, const std::string& weights) {
  return run_config(scratch, weights,
                    "schedule: {kind: constant, peak_lr: 0.003, total_steps: 12}\n"
                    "averages: [{every: 1, count: 4}, {every: 2, count: 3, eval: false}]\n"
                    "eval: {every: 0, tokens: 640}\n");
}

std::vector<float> values_of(const ModelWeights& weights) {
  std::vector<float> all;
  for (const Parameter& parameter : weights.table().parameters) {
    const std::span<const float> values = weights.view(parameter).span<float>();
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

TEST_CASE("a copy to the host holds what the device had when it was started", "[gpu]") {
  const auto backend = open_device(Device::cuda);
  constexpr std::int64_t kElements = 1 << 24;  // 64 MiB: still on its way when the device overwrites it
  const DeviceTensor a(*backend, {{kElements}, DType::i32}, "a"), b(*backend, {{5}, DType::i32}, "b");
  const std::unique_ptr<HostCopy> copy = backend->host_copy({a.view(), b.view()});
  for (const std::uint8_t value : std::initializer_list<std::uint8_t>{3, 7}) {
    backend->fill_bytes(a.view(), value);
    backend->fill_bytes(b.view(), static_cast<std::uint8_t>(value + 1));
    copy->start();
    backend->fill_bytes(a.view(), 99);
    backend->fill_bytes(b.view(), 99);
    const std::span<const std::byte> bytes = copy->wait();
    REQUIRE(bytes.size() == a.view().bytes() + b.view().bytes());
    const auto first = bytes.first(a.view().bytes()), second = bytes.subspan(a.view().bytes());
    CHECK(std::ranges::all_of(first, [&](std::byte x) { return x == std::byte{value}; }));
    CHECK(std::ranges::all_of(second, [&](std::byte x) { return x == static_cast<std::byte>(value + 1); }));
  }
}

TEST_CASE("averages on the GPU are the fp64 means of its weights, and leave the training as it is", "[gpu]") {
  for (const std::string weights : {"fp32", "bf16_sr"}) {
    INFO(weights);
    const Scratch scratch;
    const auto communicator = make_local_communicator();
    const Config config = make_config(scratch, weights);
    Config plain = config;
    plain.averages.clear();
    std::vector<std::vector<float>> at(1);  // by step
    Trainer stepped(plain, *communicator, {.quiet = true, .write_files = false});
    for (int i = 0; i < 12; ++i) {
      stepped.step();
      at.push_back(values_of(stepped.weights()));
    }
    Trainer trainer(config, *communicator, {.quiet = true});
    trainer.run();
    CHECK(values_of(trainer.weights()) == at[12]);
    const auto expect = [&](const std::string& window, std::int64_t last, const std::vector<std::size_t>& steps) {
      const std::vector<float> mean =
          values_of(load_model(fs::path(config.run.dir) / "averages" / ("window_" + window) / checkpoint_name(last)));
      std::size_t wrong = 0;
      for (std::size_t k = 0; k < mean.size(); ++k) {
        double sum = 0;
        for (const std::size_t step : steps)
          sum += 1.0 / static_cast<double>(steps.size()) * static_cast<double>(at[step][k]);
        wrong += mean[k] != static_cast<float>(sum) ? 1 : 0;
      }
      INFO(window << " at " << last);
      CHECK(wrong == 0);
    };
    expect("1x4", 4, {1, 2, 3, 4});
    expect("1x4", 12, {9, 10, 11, 12});
    expect("2x3", 6, {2, 4, 6});
    const std::vector<StepMetrics> metrics = read_metrics(fs::path(config.run.dir) / "metrics.jsonl");
    REQUIRE(metrics[3].average_loss.size() == 1);
    CHECK(metrics[3].average_loss[0].loss < 7.0);  // log(1000) is 6.9
    CHECK(metrics[3].average_ms.value() > 0);
  }
}

}  // namespace
}  // namespace kiln::test
