// Traces made by scripts/golden/optimizer_traces.py (PyTorch, f64, exact SVD): 26 steps across two refreshes of all
// matrices at once.
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "catch.h"
#include "optim/support.h"

using namespace kiln;

namespace {

struct Golden {
  nlohmann::json header;
  std::vector<float> paths;  // W - W0

  Golden() {
    const std::string directory = KILN_GOLDEN_DIR "/optim/";
    header = nlohmann::json::parse(std::ifstream(directory + "traces.json"));
    std::ifstream file(directory + "traces.bin", std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    paths.resize(bytes.size() / sizeof(float));
    std::memcpy(paths.data(), bytes.data(), paths.size() * sizeof(float));
  }
};

StatePrecision precision_of(const nlohmann::json& item, const char* key) {
  const std::string name = item.value(key, "fp32");
  for (const StatePrecision precision : {StatePrecision::fp32, StatePrecision::bf16, StatePrecision::int8})
    if (to_string(precision) == name) return precision;
  FAIL("no such precision: " << name);
  return {};
}

OptimizerOptions options_of(const nlohmann::json& header, const nlohmann::json& item) {
  OptimizerOptions options;
  options.kind = parse_optimizer_kind(item["kind"].get<std::string>());
  options.variant = item["variant"] == "reference" ? FiraVariant::reference : FiraVariant::paper;
  options.eps = item["eps"];
  options.weight_decay = item["weight_decay"];
  options.rank = header["rank"];
  options.refresh = header["refresh"];
  options.alpha = item.value("alpha", header["alpha"].get<double>());
  options.states = precision_of(item, "states");
  options.projector_states = precision_of(item, "projector_states");
  options.muon_scale = item.value("muon_scale", "") == "spectral" ? MuonScale::spectral : MuonScale::match_rms;
  options.rewarm = item.value("rewarm", options.rewarm);
  options.stagger = false;
  options.gamma = item["gamma"];
  options.beta1 = header["beta1"];
  options.beta2 = header["beta2"];
  options.projector = ProjectorKind::svd;
  return options;
}

/// Largest relative error of the path W - W0 over the stored steps; W itself would hide errors of small steps.
template <typename T>
double replay(const nlohmann::json& header, const nlohmann::json& item, std::span<const float> expected) {
  const std::int64_t rows = item["rows"], columns = item["columns"];
  const auto size = static_cast<std::size_t>(rows * columns);
  test::Driver<T> driver(options_of(header, item), test::matrix(rows, columns));
  test::fill_weights(driver.w(), rows, columns);
  const std::vector<T> initial(driver.w().begin(), driver.w().end());
  const std::vector<std::int64_t> stored = item["steps"];
  double worst = 0;
  std::size_t next = 0;
  for (std::int64_t t = 1; t <= stored.back(); ++t) {
    test::fill_gradient(driver.g(), rows, columns, t);
    driver.step(t, test::learning_rate(t));
    if (t != stored[next]) continue;
    std::vector<double> path(size);
    for (std::size_t i = 0; i < size; ++i)
      path[i] = static_cast<double>(driver.w()[i]) - static_cast<double>(initial[i]);
    worst = std::max(worst, test::relative_error(std::span(path), expected.subspan(next * size, size)));
    ++next;
  }
  CHECK(next == stored.size());
  return worst;
}

}  // namespace

TEST_CASE("optimizers follow the golden traces") {
  const Golden golden;
  REQUIRE(golden.header["cases"].size() == 3 * (8 + 12));
  std::size_t offset = 0;
  std::set<std::string> kinds;
  for (const nlohmann::json& item : golden.header["cases"]) {
    kinds.insert(item["kind"]);
    const std::size_t steps = item["steps"].size();
    const auto count = steps * item["rows"].get<std::size_t>() * item["columns"].get<std::size_t>();
    REQUIRE(offset + count <= golden.paths.size());
    const std::span expected(golden.paths.data() + offset, count);
    offset += count;
    INFO(item.dump());
    CHECK(replay<double>(golden.header, item, expected) < 1e-6);  // the trace is stored in f32
    // A number on the edge between two codes, or two bf16 values, may fall to the other side in f32.
    const bool rounded = item.contains("states");
    CHECK(replay<float>(golden.header, item, expected) < (rounded ? 5e-3 : 1e-5));
  }
  CHECK(offset == golden.paths.size());
  CHECK(kinds.size() == optimizer_kinds().size());
}
