// A whole model on the GPU: gradients against the CPU, replay, determinism, generation.
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "kernels/cuda_backend.h"
#include "kernels/device_case.h"
#include "kernels/model_run.h"
#include "train/generator.h"

namespace kiln::test {
namespace {

/// A parameter's gradient on the host, and the largest magnitude in what pads its storage.
struct Gradient {
  std::vector<double> values;
  double padding = 0;
};

std::vector<Gradient> gradients(ModelRun& run) {
  std::vector<std::vector<float>> storages;
  for (const ValueId storage : run.train.values.storages) {
    const Tensor gradient = run.executor.tensor(run.train.plan.gradient(storage));
    storages.emplace_back(static_cast<std::size_t>(gradient.numel()));
    if (gradient.dtype() == DType::bf16) {
      std::vector<bfloat16> half(storages.back().size());
      run.backend.download(half.data(), gradient);
      std::ranges::transform(half, storages.back().begin(), [](bfloat16 x) { return to_float(x); });
    } else {
      run.backend.download(storages.back().data(), gradient);
    }
  }
  std::vector<Gradient> list;
  const std::vector<Parameter>& narrow = run.weights.table().parameters;
  for (std::size_t p = 0; p < narrow.size(); ++p) {
    const Parameter& wide = run.train.table.parameters[p];
    const std::vector<float>& from = storages[wide.storage];
    auto columns = [](const Shape& shape) { return shape.rank() > 1 ? shape[1] : 1; };
    Gradient gradient;
    for (std::int64_t r = 0; r < wide.shape[0]; ++r)
      for (std::int64_t c = 0; c < columns(wide.shape); ++c) {
        const auto x =
            static_cast<double>(from[static_cast<std::size_t>((wide.row_begin + r) * columns(wide.shape) + c)]);
        if (r < narrow[p].shape[0] && c < columns(narrow[p].shape))
          gradient.values.push_back(x);
        else
          gradient.padding = std::isfinite(x) ? std::max(gradient.padding, std::abs(x)) : INFINITY;
      }
    list.push_back(std::move(gradient));
  }
  return list;
}

TEST_CASE("loss and every gradient of a model on the GPU follow the CPU's f32", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool tied : {false, true})
    for (const int micro_batches : {1, 3}) {
      const ModelRunOptions options{.model = small_model(tied),
                                    .micro_batches = micro_batches,
                                    .half_gradients = micro_batches == 1,
                                    .keep_gradients = true};
      ModelRun device(options, *gpu), host(options, cpu_backend());
      device.executor.poison();
      for (ModelRun* run : {&device, &host}) {
        run->load(1);
        run->run_micro_batches();
      }
      INFO("tied " << tied << ", micro-batches " << micro_batches);
      const double expected = host.loss();
      CHECK(device.loss() == Approx(expected).epsilon(3e-3));
      const std::vector<Gradient> found = gradients(device), wanted = gradients(host);
      for (std::size_t p = 0; p < wanted.size(); ++p) {
        INFO(host.weights.table().parameters[p].name);
        CHECK(relative_error(found[p].values, wanted[p].values) <= 4e-2);
        CHECK(found[p].padding == 0);
      }
    }
}

TEST_CASE("replay on the GPU equals eager runs bit for bit", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool masters : {true, false}) {
    const ModelRunOptions options{.micro_batches = 2, .masters = masters};
    ModelRun eager(options, *gpu), replayed(options, *gpu);
    std::vector<std::byte> before = eager.bytes();
    for (int step = 1; step <= 6; ++step) {
      const double loss = eager.step(step, false);
      CHECK(replayed.step(step, true) == loss);
      std::vector<std::byte> after = eager.bytes();
      CHECK(replayed.bytes() == after);
      CHECK(after != before);
      before = std::move(after);
    }
  }
}

TEST_CASE("two runs on the GPU with one seed are equal bit for bit", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool masters : {true, false}) {
    auto run = [&](std::uint64_t seed) {
      ModelRun model({.micro_batches = 2, .masters = masters, .seed = seed}, *gpu);
      for (int step = 1; step <= 5; ++step) model.step(step, true);
      return model.bytes();
    };
    const std::vector<std::byte> once = run(1);
    CHECK(run(1) == once);
    CHECK(run(2) != once);
  }
}

TEST_CASE("micro-batches on the GPU agree with one batch", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  ModelRun whole({.batch = {12, 80}}, *gpu), parts({.batch = {3, 80}, .micro_batches = 4}, *gpu);
  double difference = 0;
  for (int step = 1; step <= 10; ++step)
    difference = std::max(difference, std::abs(whole.step(step, true) - parts.step(step, true)));
  CHECK(difference <= 1e-2);
}

TEST_CASE("training on the GPU follows the CPU's f32 losses", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool half_gradients : {false, true}) {
    ModelRun device({.half_gradients = half_gradients}, *gpu), host({}, cpu_backend());
    double difference = 0;
    for (int step = 1; step <= 10; ++step)
      difference = std::max(difference, std::abs(device.step(step, true) - host.step(step, false)));
    CHECK(difference <= 2e-2);
  }
}

TEST_CASE("generation on the GPU gives the CPU's logits, and its text up to ties", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool tied : {false, true}) {
    ModelWeights weights(small_model(tied), DType::f32);
    initialise(weights, 4);
    for (std::size_t s = 0; s < weights.table().storages.size(); ++s)
      for (float& w : weights.storage(s).span<float>()) w = to_float(to_bfloat16(w));
    const DeviceWeights on_device(weights, storage_layout(*gpu), false, *gpu);
    Generator device(on_device, 200), host(weights, 200);
    std::vector<std::int32_t> text;
    for (int i = 0; i < 150; ++i) text.push_back((i * i * 7 + 3) % 1000);  // a pass of 128 and one of 22
    std::vector<std::int32_t> next = text;
    for (int step = 0; step < 40; ++step) {
      const std::span<const float> a = device.feed(next), b = host.feed(next);
      REQUIRE(a.size() == b.size());
      const std::vector<double> found(a.begin(), a.end()), expected(b.begin(), b.end());
      CHECK(relative_error(found, expected) <= 3e-2);
      const auto likeliest = std::max_element(found.begin(), found.end()) - found.begin();
      // The CPU may prefer another token only by as much as bf16 blurs a logit.
      const double best = *std::max_element(expected.begin(), expected.end());
      CHECK(expected[static_cast<std::size_t>(likeliest)] >= best - 0.03 * std::abs(best));
      next = {static_cast<std::int32_t>(likeliest)};
    }
  }
}

}  // namespace
}  // namespace kiln::test
