#include "optim/state_codec.h"

#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include "base/rng.h"
#include "catch.h"
#include "core/parallel.h"
#include "optim/support.h"

using namespace kiln;

namespace {

/// A state with memory of its own.
struct Held {
  StateStore store;
  std::vector<HostTensor> memory;
  std::vector<Tensor> tensors;

  explicit Held(const StateStore::Options& options) : store(test::matrix(8, 8), options) {
    std::vector<StateSpec> specs;
    store.append_specs(specs);
    for (const StateSpec& spec : specs) memory.emplace_back(spec.spec);
    for (const HostTensor& tensor : memory) tensors.push_back(tensor.view());
  }
  StateView<float> at(std::int64_t step) const {
    std::span<const Tensor> rest = tensors;
    const StateView<float> view = store.view<float>(rest, step);
    CHECK(rest.empty());
    return view;
  }
};

std::vector<float> normals(std::size_t n, std::uint64_t stream) {
  const Philox random(7, stream);
  std::vector<float> list(n);
  for (std::size_t i = 0; i < n; ++i)
    list[i] = static_cast<float>(random.normal(i) * std::exp(3 * random.normal(i + n)));
  return list;
}

std::vector<float> kept(const Held& state, std::int64_t step, const std::vector<float>& values) {
  state.at(step).store_all(values.data());
  std::vector<float> back(values.size());
  const float* found = state.at(step).load_all(back.data());
  return {found, found + values.size()};
}

}  // namespace

TEST_CASE("the dynamic map holds 256 different values from its formula, and its thresholds halve the gaps") {
  for (const StateValues kind : {StateValues::any, StateValues::positive}) {
    const StateMap& map = state_map(kind);
    const std::set<float> all(map.values.begin(), map.values.end());
    CHECK(all.size() == 256);
    CHECK(std::is_sorted(map.values.begin(), map.values.end()));
    CHECK(all.contains(0.0f));
    CHECK(map.values[255] == 1.0f);
    for (std::size_t k = 0; k < 255; ++k) {
      CHECK(map.thresholds[k] < map.values[k + 1]);
      CHECK((map.thresholds[k] > map.values[k] || map.thresholds[k] == 0));
    }
  }
  // The last decade has 64 values of either sign, 0.1 + 0.9 (j + 1/2) / 64, or 128.
  CHECK(state_map(StateValues::any).values[254] == static_cast<float>(0.1 + 0.9 * 63.5 / 64));
  CHECK(state_map(StateValues::any).values[0] == -static_cast<float>(0.1 + 0.9 * 63.5 / 64));
  CHECK(state_map(StateValues::any).values[127] == 0.0f);
  CHECK(state_map(StateValues::positive).values[254] == static_cast<float>(0.1 + 0.9 * 127.5 / 128));
  CHECK(state_map(StateValues::positive).values[1] == static_cast<float>(1e-6 * 0.325));
}

TEST_CASE("a code is the nearest value, of two equally near the lower; only the positive map avoids zero") {
  const StateMap &any = state_map(StateValues::any), &positive = state_map(StateValues::positive);
  for (std::size_t k = 0; k < 255; ++k) {
    CHECK(state_code(any, any.values[k]) == k);
    CHECK(state_code(any, any.thresholds[k]) == k);  // a tie
    CHECK(state_code(any, std::nextafter(any.thresholds[k], 2.0f)) == k + 1);
  }
  CHECK(state_code(positive, 0.0f) == 0);
  CHECK(state_code(positive, 1e-30f) == 1);
  CHECK(state_code(any, 1e-30f) == 127);
}

TEST_CASE("blocks are encoded with the codes that the map defines, at every threshold and its neighbours") {
  for (const StateValues kind : {StateValues::any, StateValues::positive}) {
    const StateMap& map = state_map(kind);
    std::vector<float> x;
    auto add = [&](float value) {
      if (x.size() % 256 == 0) x.push_back(1.0f);  // so that the scale of every block is 1
      if (std::abs(value) <= 1 && (kind == StateValues::any || value >= 0)) x.push_back(value);
    };
    for (std::size_t k = 0; k < 255; ++k)
      for (const float t : {map.values[k], map.thresholds[k]})
        for (const float y : {t, std::nextafter(t, -2.0f), std::nextafter(t, 2.0f)}) add(y);
    const Philox random(1, 2);
    for (std::uint64_t i = 0; i < 20000; ++i) add(static_cast<float>(2 * random.uniform(i) - 1));
    for (std::uint64_t i = 0; i < 20000; ++i)
      add(static_cast<float>((random.uniform(i) < 0.5 ? -1 : 1) * std::pow(10.0, -9 * random.uniform(i + 30000))));
    const Held state({.name = "s",
                      .shape = {static_cast<std::int64_t>(x.size())},
                      .precision = StatePrecision::int8,
                      .values = kind});
    state.at(1).store_all(x.data());
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < x.size(); ++i) wrong += state.tensors[0].as<std::uint8_t>()[i] != state_code(map, x[i]);
    CHECK(wrong == 0);
  }
}

TEST_CASE("int8 keeps the largest of a block, zeros, and others within the width of their decade") {
  const std::size_t n = 1000;  // three blocks and a rest
  const Held state({.name = "s", .shape = {1000}, .precision = StatePrecision::int8});
  REQUIRE(state.tensors.size() == 2);
  CHECK(state.tensors[0].spec == TensorSpec{{1000}, DType::u8});
  CHECK(state.tensors[1].spec == TensorSpec{{4}, DType::f32});
  std::vector<float> x = normals(n, 1);
  for (std::size_t i = 512; i < 768; ++i) x[i] = 0;
  const std::vector<float> y = kept(state, 1, x);
  for (std::size_t block = 0; block < 4; ++block) {
    float largest = 0;
    const std::size_t end = std::min(n, 256 * (block + 1));
    for (std::size_t i = 256 * block; i < end; ++i) largest = std::max(largest, std::abs(x[i]));
    CHECK(state.tensors[1].as<float>()[block] == largest);
    for (std::size_t i = 256 * block; i < end; ++i)
      CHECK(std::abs(x[i] - y[i]) <= (block == 2 ? 0.0f : std::max(0.08f * std::abs(x[i]), 0.0071f * largest)));
  }
  // What was decoded is encoded to the same codes again, but for a negative largest, which the map lacks.
  std::vector<float> all_positive(n);
  for (std::size_t i = 0; i < n; ++i) all_positive[i] = std::abs(x[i]);
  const std::vector<float> once = kept(state, 2, all_positive);
  CHECK(kept(state, 3, once) == once);
}

TEST_CASE("bf16 rounds up as often as the cut part says, with bits of seed, state, step and element alone") {
  const std::int64_t n = 4096 + 37;
  const auto options = [&](std::string name) {
    return StateStore::Options{.name = std::move(name), .shape = {n}, .precision = StatePrecision::bf16, .seed = 5};
  };
  const Held state(options("exp_avg"));
  const float low = 1.0f, high = 1.0f + 0x1p-7f, x = low + 0.3f * (high - low);
  const std::vector<float> values(static_cast<std::size_t>(n), x), y = kept(state, 3, values);
  std::size_t up = 0;
  for (const float value : y) {
    CHECK((value == low || value == high));
    up += value == high;
  }
  CHECK(static_cast<double>(up) / static_cast<double>(n) == Approx(0.3).margin(0.03));
  CHECK(kept(state, 4, values) != y);
  CHECK(kept(Held(options("exp_avg_sq")), 3, values) != y);
  CHECK(kept(state, 3, values) == y);

  // The bits as the header gives them, so that a device can draw the same.
  const Philox random(5 ^ (3 * 0x9E3779B97F4A7C15u), stream_of("layer.weight.exp_avg"));
  for (std::uint64_t e = 0; e < 1000; ++e) {
    const std::uint32_t word = random.block(e / 8)[(e / 2) % 4], half = e % 2 == 0 ? word & 0xffffu : word >> 16;
    const std::uint32_t bits = (std::bit_cast<std::uint32_t>(x) + half) >> 16;
    CHECK(std::bit_cast<float>(bits << 16) == y[e]);
  }
  for (const int threads : {1, 3}) {
    const int before = thread_count();
    set_thread_count(threads);
    CHECK(kept(state, 3, values) == y);
    set_thread_count(before);
  }
}

TEST_CASE("a mean survives in bf16 although each change is less than its last bit") {
  // v <- 0.999 v + 0.001 with v near 0.5: to nearest it would stand still.
  const Held state({.name = "v", .shape = {4096}, .precision = StatePrecision::bf16, .values = StateValues::positive});
  std::vector<float> v(4096, 0.5f);
  v = kept(state, 1, v);
  for (std::int64_t step = 2; step < 700; ++step) {
    for (float& x : v) x = 0.999f * x + 0.001f;
    v = kept(state, step, v);
  }
  double mean = 0;
  for (const float x : v) mean += static_cast<double>(x) / 4096;
  CHECK(mean == Approx(1 - 0.5 * std::pow(0.999, 698)).epsilon(1e-3));
  const Held nearest(
      {.name = "v", .shape = {4096}, .precision = StatePrecision::bf16, .rounding = StateRounding::nearest});
  CHECK(kept(nearest, 1, std::vector<float>(4096, 0.999f * 0.5f + 0.001f)).front() == 0.5f);
}

TEST_CASE("vectors have fp32 instead of int8") {
  CHECK(stored_precision(test::matrix(3, 4), StatePrecision::int8) == StatePrecision::int8);
  CHECK(stored_precision({.name = "norm", .shape = {4}}, StatePrecision::int8) == StatePrecision::fp32);
  CHECK(stored_precision({.name = "norm", .shape = {4}}, StatePrecision::bf16) == StatePrecision::bf16);
}
