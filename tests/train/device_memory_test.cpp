#include "train/device_memory.h"

#include <algorithm>

#include "catch.h"

namespace kiln {
namespace {

std::vector<float> values_of(const ModelWeights& weights) {
  std::vector<float> all;
  for (const Parameter& parameter : weights.table().parameters)
    std::ranges::copy(weights.view(parameter).span<float>(), std::back_inserter(all));
  return all;
}

TEST_CASE("weights that a device starts from a seed are those of the host, which keeps no copy of them") {
  LlamaConfig config;
  config.hidden = 32, config.ffn = 40, config.heads = config.kv_heads = 4, config.head_dim = 8;
  config.layers = 2, config.vocab = 60;
  const ModelWeights expected(config, DType::f32);
  initialise(expected, 5);

  const ModelWeights host(config, DType::f32);
  const DeviceWeights direct(host, DType::f32, false, cpu_backend(), 5);
  REQUIRE(direct.shared());
  CHECK(values_of(host) == values_of(expected));

  // A device's layout on the host: padded bf16 storages and the lower halves of their masters.
  const ModelWeights behind(config, DType::f32);
  const DeviceWeights copied(behind, StorageLayout(DType::bf16, 64), true, cpu_backend(), 5);
  CHECK(std::ranges::all_of(values_of(behind), [](float value) { return value == 0; }));
  copied.pull();
  CHECK(values_of(behind) == values_of(expected));

  // Without masters the rounded weights are what is there.
  const DeviceWeights rounded(behind, StorageLayout(DType::bf16, 64), false, cpu_backend(), 5);
  rounded.pull();
  const std::vector<float> exact = values_of(expected), near = values_of(behind);
  for (std::size_t i = 0; i < exact.size(); ++i) REQUIRE(near[i] == to_float(to_bfloat16(exact[i])));
}

}  // namespace
}  // namespace kiln
