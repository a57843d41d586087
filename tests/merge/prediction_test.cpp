#include "merge/prediction.h"

#include <cmath>
#include <fstream>

#include "core/parallel.h"
#include "merge/memory_merge.h"
#include "merge/prediction_report.h"
#include "merge/streaming_merge.h"
#include "merge_fixture.h"
#include "report/metrics.h"

using namespace kiln;

namespace {

LlamaConfig tiny_model(std::int64_t vocab = 7) {
  LlamaConfig config;
  config.vocab = vocab;
  config.hidden = config.head_dim = 4;
  config.ffn = 6;
  config.heads = config.kv_heads = config.layers = 1;
  return config;
}

/// A snapshot whose weights are all of the initial ones plus `shift`.
fs::path write_snapshot(const fs::path& directory, std::int64_t step, double shift,
                        const LlamaConfig& config = tiny_model()) {
  TestModel model;
  std::uint64_t stream = 0;
  for (const Parameter& parameter : llama_parameters(config, DType::f32).parameters) {
    TestTensor tensor{DType::f32, parameter.shape.sizes(), {}};
    tensor.values = random_values(static_cast<std::size_t>(parameter.shape.numel()), ++stream);
    for (double& value : tensor.values) value += shift;
    model[parameter.name] = tensor;
  }
  write_checkpoint(directory / checkpoint_name(step), model, step);
  return directory / checkpoint_name(step);
}

/// A run that swings across a bowl while it drifts towards the bottom.
double shift_at(std::int64_t i) { return 0.03 - 0.001 * static_cast<double>(i) + (i % 2 == 0 ? 0.05 : -0.05); }

struct Toy {
  TempDirectory temp;
  ModelWeights weights{tiny_model(), DType::f32};
  std::vector<MergeInput> snapshots;
  ModelWeights origin{tiny_model(), DType::f32};

  Toy() {
    std::vector<fs::path> paths;
    for (std::int64_t i = 0; i <= 20; ++i)
      paths.push_back(write_snapshot(temp / "snapshots", 10 * i + 100, shift_at(i)));
    snapshots = open_inputs(paths, Hashes::all);
    const std::vector<MergeInput> zero = open_inputs({write_snapshot(temp / "origin", 1, 0.0)}, Hashes::all);
    const MergeInput* input = &zero.front();
    const double one = 1.0;
    merge_into(std::span(&input, 1), std::span(&one, 1), origin);
  }

  /// Losses of 50 sequences: 2 + shift^2 of the weights, and what is hard about each sequence.
  SequenceLosses evaluate() const {
    const Tensor w = weights.storage(0), o = origin.storage(0);
    const double shift = static_cast<double>(w.span<float>()[3]) - static_cast<double>(o.span<float>()[3]);
    SequenceLosses losses;
    const Philox random(1, 1);
    for (std::uint64_t i = 0; i < 50; ++i) {
      const double hard = random.normal(i);
      losses.nats.push_back(16 * (2 + hard + shift * shift * (1 + 0.1 * random.normal(i + 100))));
      losses.targets.push_back(16);
    }
    return losses;
  }

  PredictionRequest request() const {
    return {.snapshots = snapshots,
            .anneal = {.begin = 200, .end = 300, .shape = DecayShape::linear, .final_ratio = 0.0},
            .curves = {},
            .checks = {},
            .weights = weights,
            .evaluate = [this] { return evaluate(); },
            .run_anneal = {}};
  }
};

const Predictor& named(const Prediction& prediction, const std::string& name) {
  for (const Predictor& predictor : prediction.predictors)
    if (predictor.name == name) return predictor;
  FAIL("no predictor " << name);
  return prediction.predictors.front();
}

/// The mean loss of a model that is `shift` off, as Toy::evaluate has it.
double loss_of(double shift) {
  const Philox random(1, 1);
  double sum = 0;
  for (std::uint64_t i = 0; i < 50; ++i)
    sum += 2 + random.normal(i) + shift * shift * (1 + 0.1 * random.normal(i + 100));
  return sum / 50;
}

}  // namespace

TEST_CASE("one held-out sequence gives an interval of the predictor's own error, and says so") {
  const Toy toy;
  PredictionRequest request = toy.request();
  request.evaluate = [&] {
    SequenceLosses losses = toy.evaluate();
    losses.nats.resize(1);
    losses.targets.resize(1);
    return losses;
  };
  const Prediction prediction = predict(request);
  CHECK(std::isfinite(prediction.interval.low));
  CHECK(prediction.interval.low < prediction.loss);
  CHECK(prediction.interval.high > prediction.loss);
  CHECK_THAT(prediction.reason, ContainsSubstring("the held-out set is one sequence"));
  const std::string text = prediction_text("run", prediction);
  CHECK_THAT(text, ContainsSubstring("in 1 sequence, in f32") && !ContainsSubstring("nan"));
  CHECK(Json::parse(to_json(prediction).dump()).at("low").is_number());
  CHECK_THAT(predict(toy.request()).reason, !ContainsSubstring("one sequence"));
}

TEST_CASE("a merge in memory has the bits of the file that a merge writes") {
  const TempDirectory temp;
  const LlamaConfig config = tiny_model(50000);  // an embedding that several threads share
  std::vector<fs::path> paths;
  for (const std::int64_t step : {1, 2, 3})
    paths.push_back(write_snapshot(temp.path(), step, 0.1 * static_cast<double>(step), config));
  const std::vector<MergeInput> opened = open_inputs(paths, Hashes::all);
  std::vector<const MergeInput*> inputs;
  for (const MergeInput& input : opened) inputs.push_back(&input);
  const WeightOptions options{.method = MergeMethod::ema, .alpha = 0.3};
  const ModelWeights weights(config, DType::f32);
  const int threads = thread_count();
  set_thread_count(3);
  merge_into(inputs, merge_weights(options, 3), weights);
  set_thread_count(threads);
  merge_checkpoints({.inputs = paths, .output = temp / "out", .weights = options});
  for (const Parameter& parameter : weights.table().parameters) {
    const std::vector<double> expected = read_values(temp / "out", parameter.name);
    const std::span<float> found = weights.view(parameter).span<float>();
    REQUIRE(found.size() == expected.size());
    std::size_t different = 0;
    for (std::size_t k = 0; k < found.size(); ++k) different += static_cast<double>(found[k]) != expected[k];
    INFO(parameter.name);
    CHECK(different == 0);
  }
}

TEST_CASE("predictors are what they say: the last snapshot, weighted merges of the window, the best of the sweep") {
  const Toy toy;
  const Prediction prediction = predict(toy.request());
  CHECK(prediction.sequences == 50);
  CHECK(prediction.targets == 800);
  CHECK(prediction.last_loss == Approx(loss_of(shift_at(20))).margin(1e-6));
  double mean = 0;  // of snapshots 10 to 20
  for (int i = 10; i <= 20; ++i) mean += shift_at(i) / 11;
  CHECK(*named(prediction, "sma").loss == Approx(loss_of(mean)).margin(1e-6));
  // Ten snapshots before the last, alpha 0.1: the recursion leaves 0.9^10 on the oldest, the closed form 0.9^i on each.
  double recursion = shift_at(10), closed = 0, sum = 0;
  for (int i = 10; i <= 20; ++i) {
    if (i > 10) recursion = 0.1 * shift_at(i) + 0.9 * recursion;
    closed += std::pow(0.9, 20 - i) * shift_at(i);
    sum += std::pow(0.9, 20 - i);
  }
  CHECK(*named(prediction, "ema").loss == Approx(loss_of(recursion)).margin(1e-6));
  CHECK(*named(prediction, "ema-closed").loss == Approx(loss_of(closed / sum)).margin(1e-6));
  CHECK(std::abs(loss_of(recursion) - loss_of(closed / sum)) > 1e-5);
  CHECK_THAT(named(prediction, "ema-closed").note, ContainsSubstring("closed form with alpha 0.1"));
  CHECK(*named(prediction, "last").loss == prediction.last_loss);
  CHECK(named(prediction, "last").standard_error == 0.0);
  // The difference is known far better than either loss.
  CHECK(named(prediction, "sma").standard_error < 1e-3);
  CHECK(named(prediction, "sma").standard_error.value() > 0.0);
  CHECK_FALSE(named(prediction, "MTL").loss.has_value());
  CHECK_FALSE(named(prediction, "calibrated gap").loss.has_value());

  double best = 1e9;
  for (const SweepCell& cell : prediction.sweep) {
    best = std::min(best, cell.loss);
    CHECK(static_cast<std::int64_t>(cell.count - 1) * cell.every_steps <= 200);
    if (cell.count == 2 && cell.every_steps == 10)
      CHECK(cell.loss == Approx(loss_of((shift_at(19) + shift_at(20)) / 2)).margin(1e-6));
  }
  CHECK(*named(prediction, "best of sweep").loss == best);
  CHECK(prediction.trusted == "schedule");
  CHECK(prediction.loss == *named(prediction, "schedule").loss);
  CHECK(prediction.interval.low < prediction.loss);
  CHECK(prediction.interval.high > prediction.loss);
  CHECK(prediction.trail.size() == 8);
  CHECK(prediction.trail.front().loss > prediction.loss);
}

TEST_CASE("a window that lacks snapshots is matched to its real steps, and says so") {
  Toy toy;
  CHECK_THAT(named(predict(toy.request()), "schedule").note, !ContainsSubstring("missing"));
  toy.snapshots.erase(toy.snapshots.begin() + 15);
  const Prediction prediction = predict(toy.request());
  CHECK(named(prediction, "schedule").note == "10 snapshots (1 missing)");
  // A linear decay over ten intervals, of which the updates of two are recorded together: the mean of their factors.
  double decayed = shift_at(10);
  for (int i = 11; i <= 20; ++i)
    if (i != 15) decayed += (i == 16 ? 0.495 : (20 - i + 0.45) / 10) * (shift_at(i) - shift_at(i == 16 ? 14 : i - 1));
  CHECK(*named(prediction, "schedule").loss == Approx(loss_of(decayed)).margin(1e-6));
}

TEST_CASE("a check fills signed errors, and what it found is trusted later") {
  const Toy toy;
  PredictionRequest request = toy.request();
  const fs::path annealed = write_snapshot(toy.temp / "annealed", 300, 0.002);
  request.run_anneal = [&] { return annealed; };
  const Prediction checked = predict(request);
  CHECK(*checked.annealed_loss == Approx(loss_of(0.002)).margin(1e-6));
  CHECK(*named(checked, "sma").error == Approx(*named(checked, "sma").loss - *checked.annealed_loss));
  CHECK_FALSE(named(checked, "MPL").error.has_value());
  CHECK_THAT(prediction_text("run", checked), ContainsSubstring("the real anneal reached"));

  const fs::path run = toy.temp / "run";
  write_check(run / "anneals" / anneal_name(checked.anneal), check_of(checked));
  std::vector<AnnealCheck> checks = read_checks(run);
  REQUIRE(checks.size() == 1);
  CHECK(checks[0].anneal.begin == 200);
  CHECK(checks[0].errors.at("sma") == *named(checked, "sma").error);

  checks[0].errors = {{"last", 0.5}, {"wma", 0.001}, {"schedule", 0.25}};
  checks[0].last_loss = 3.5;
  checks[0].annealed_loss = 3.25;
  request.checks = checks;
  request.run_anneal = {};
  const Prediction later = predict(request);
  CHECK(later.trusted == "wma");
  // One error says little about the next: Student's t of one degree of freedom.
  CHECK(later.interval.high - later.loss == Approx(12.71 * 0.001).epsilon(0.2));
  CHECK(*named(later, "calibrated gap").loss == Approx(later.last_loss - 0.25));
  CHECK(*named(later, "schedule, corrected").loss == Approx(*named(later, "schedule").loss - 0.25));
  // The gap comes from other models: over sequences nothing is known of it.
  CHECK_FALSE(named(later, "calibrated gap").standard_error);
  CHECK(named(later, "schedule, corrected").standard_error == named(later, "schedule").standard_error);
  CHECK(named(later, "calibrated gap").note == "mean gap 0.2500 of 1 earlier anneals");
}

TEST_CASE("what earlier anneals showed counts for those of the same shape, final ratio and share") {
  const Toy toy;
  PredictionRequest request = toy.request();
  AnnealCheck check{.anneal = request.anneal, .last_loss = 3.5, .annealed_loss = 3.25, .errors = {{"wma", 0.001}}};
  request.checks = std::span(&check, 1);
  const auto counts = [&] {
    const Prediction prediction = predict(request);
    CHECK(prediction.checks == (named(prediction, "calibrated gap").loss ? 1u : 0u));
    CHECK(prediction.trusted == (prediction.checks == 1 ? "wma" : "schedule"));
    return prediction.checks == 1;
  };
  CHECK(counts());  // 100 of 300 steps
  SECTION("of any length") {
    check.anneal = {.begin = 400, .end = 600};
    CHECK(counts());
    check.anneal.begin = 440;  // 0.27, where 0.33 was asked for
    CHECK(counts());
  }
  SECTION("another share") {
    check.anneal.begin = 250;
    CHECK_FALSE(counts());
    check.anneal.begin = 100;
    CHECK_FALSE(counts());
    CHECK(named(predict(request), "calibrated gap").note ==
          "no earlier anneal of this shape, final ratio and share was checked; 1 of others");
    CHECK_THAT(predict(request).reason, ContainsSubstring("no earlier anneal of this kind"));
  }
  SECTION("another shape") {
    check.anneal.shape = DecayShape::cosine;
    CHECK_FALSE(counts());
  }
  SECTION("another end") {
    check.anneal.final_ratio = 0.1;
    CHECK_FALSE(counts());
  }
}

TEST_CASE("a law's fall of the loss has no error over sequences, its error against a real anneal has one") {
  const Toy toy;
  LossCurve trunk, branch;
  for (std::int64_t step = 1; step <= 300; ++step) {
    trunk.lr.push_back(1e-3);
    trunk.step.push_back(step);
    trunk.loss.push_back(2 + 4 / std::sqrt(static_cast<double>(step)));
    if (step > 200) continue;
    branch.lr.push_back(step <= 150 ? 1e-3 : 1e-3 * static_cast<double>(200 - step) / 50);
    branch.step.push_back(step);
    branch.loss.push_back(trunk.loss.back() - (step <= 150 ? 0 : 0.002 * static_cast<double>(step - 150)));
  }
  const std::vector<LossCurve> curves{trunk, branch};
  PredictionRequest request = toy.request();
  request.curves = curves;
  const fs::path annealed = write_snapshot(toy.temp / "annealed", 300, 0.002);
  request.run_anneal = [&] { return annealed; };
  const Prediction prediction = predict(request);
  for (const std::string law : {"MTL", "MPL"}) {
    INFO(law);
    REQUIRE(named(prediction, law).loss);
    CHECK_FALSE(named(prediction, law).standard_error);
    CHECK(named(prediction, law).error_standard_error == named(prediction, "last").error_standard_error);
    CHECK(named(prediction, law).error_standard_error.value() > 0.0);
    const Json json = to_json(prediction);
    for (const Json& row : json["predictors"])
      if (row["name"] == law) CHECK(row["standard_error"].is_null());
    std::string row = prediction_text("run", prediction);
    row = row.substr(row.find(law));
    row = row.substr(0, row.find('\n'));
    CHECK_THAT(row, ContainsSubstring(" - ") && !ContainsSubstring("0.0000"));
  }
}

TEST_CASE(
    "a second prediction evaluates no merge again, and none of a snapshot that has changed is taken for another") {
  const Toy toy;
  int evaluations = 0;
  const LossCache known(toy.temp / "predictions", {{"data", "a"}});
  PredictionRequest request = toy.request();
  request.known = &known;
  request.evaluate = [&] {
    ++evaluations;
    return toy.evaluate();
  };
  fs::path annealed = write_snapshot(toy.temp / "annealed", 300, 0.002);
  request.run_anneal = [&] { return annealed; };
  const Prediction first = predict(request);
  CHECK(first.models_evaluated == evaluations);
  CHECK(evaluations > 20);
  const auto figures = [](const Prediction& prediction) {
    Json json = to_json(prediction);
    json.erase("models_evaluated");
    json.erase("models_known");
    return json;
  };
  CHECK(figures(predict(toy.request())).at("sweep") == figures(first).at("sweep"));

  evaluations = 0;
  const Prediction again = predict(request);
  CHECK(evaluations == 0);
  CHECK(again.models_evaluated == 0);
  CHECK(figures(again) == figures(first));
  // Another anneal of the same end: only what depends on its shape, and the real anneal.
  request.anneal.shape = DecayShape::cosine;
  annealed = write_snapshot(toy.temp / "other", 300, 0.003);
  const Prediction other = predict(request);
  CHECK(evaluations == 3);  // schedule, QAM, and the anneal
  CHECK(*other.annealed_loss == Approx(loss_of(0.003)).margin(1e-6));
  CHECK(figures(other).at("sweep") == figures(first).at("sweep"));

  // Snapshot 5 of 20 is written anew: merges with it are evaluated again, and only those.
  std::vector<fs::path> paths;
  for (const MergeInput& input : toy.snapshots) paths.push_back(input.directory);
  write_snapshot(toy.temp / "snapshots", 150, shift_at(5) + 0.5);
  const std::vector<MergeInput> changed = open_inputs(paths, Hashes::all);
  PredictionRequest later = request;
  later.snapshots = changed;
  evaluations = 0;
  const Prediction renewed = predict(later);
  CHECK(evaluations > 0);
  CHECK(evaluations < first.models_evaluated / 2);
  later.known = nullptr;
  CHECK(figures(renewed) == figures(predict(later)));
  CHECK(figures(renewed).at("trail") != figures(other).at("trail"));

  // Other held-out data share nothing.
  const LossCache elsewhere(toy.temp / "predictions", {{"data", "b"}});
  request.known = &elsewhere;
  evaluations = 0;
  CHECK(predict(request).models_known < 3);  // but what two predictors have in common
  CHECK(evaluations > 20);
}

TEST_CASE("losses that were kept are read bit for bit, and a damaged file counts for nothing") {
  const Toy toy;
  const LossCache known(toy.temp / "predictions", {{"data", "a"}});
  const std::vector<const MergeInput*> inputs{&toy.snapshots[1], &toy.snapshots[2]};
  const std::vector<const MergeInput*> other_order{&toy.snapshots[2], &toy.snapshots[1]};
  const std::vector<double> weights{0.3, 0.7}, nearly{0.3, std::nextafter(0.7, 1.0)};
  const SequenceLosses losses = toy.evaluate();
  CHECK_FALSE(known.find(inputs, weights).has_value());
  known.store(inputs, weights, losses);
  const std::optional<SequenceLosses> found = known.find(inputs, weights);
  REQUIRE(found.has_value());
  CHECK(found->nats == losses.nats);
  CHECK(found->targets == losses.targets);
  CHECK_FALSE(known.find(inputs, nearly).has_value());
  CHECK_FALSE(known.find(other_order, weights).has_value());

  const fs::path file = fs::directory_iterator(toy.temp / "predictions")->path();
  std::fstream bytes(file, std::ios::in | std::ios::out | std::ios::binary);
  bytes.seekp(static_cast<std::streamoff>(fs::file_size(file)) - 500);
  bytes.put('x');
  bytes.close();
  CHECK_FALSE(known.find(inputs, weights).has_value());
  fs::resize_file(file, 100);
  CHECK_FALSE(known.find(inputs, weights).has_value());
  known.store(inputs, weights, losses);
  CHECK(known.find(inputs, weights).has_value());
  const std::vector<MergeInput> unverified = open_inputs({toy.snapshots[1].directory}, Hashes::none);
  const MergeInput* const input = &unverified.front();
  if (input->files.front().hash.empty())
    CHECK_THROWS_WITH(known.find(std::span(&input, 1), std::span(weights).first(1)),
                      ContainsSubstring("without verification"));
}

TEST_CASE("loss laws are fitted once a curve holds a decay, and predict from the last snapshot") {
  const Toy toy;
  LossCurve trunk, branch;
  for (std::int64_t step = 1; step <= 300; ++step) {
    trunk.lr.push_back(1e-3);
    trunk.step.push_back(step);
    trunk.loss.push_back(2 + 4 / std::sqrt(static_cast<double>(step)));
  }
  PredictionRequest request = toy.request();
  request.curves = std::span(&trunk, 1);
  CHECK_THAT(named(predict(request), "MTL").note, ContainsSubstring("no curve holds a decay"));
  branch.lr.assign(150, 1e-3);
  for (std::int64_t step = 151; step <= 200; ++step) {
    const double x = static_cast<double>(step - 150) / 50;
    branch.lr.push_back(1e-3 * (1 - x));
    branch.step.push_back(step);
    branch.loss.push_back(2 + 4 / std::sqrt(static_cast<double>(step)) - 0.1 * x);
  }
  const std::vector<LossCurve> curves{trunk, branch};
  request.curves = curves;
  const Prediction prediction = predict(request);
  for (const std::string law : {"MTL", "MPL"}) {
    INFO(law);
    CHECK(*named(prediction, law).loss < prediction.last_loss - 0.03);
    CHECK(*named(prediction, law).loss > prediction.last_loss - 0.4);
  }
}

TEST_CASE("what cannot be predicted is refused") {
  const Toy toy;
  PredictionRequest request = toy.request();
  request.anneal.begin = 295;
  CHECK_THROWS_WITH(predict(request), ContainsSubstring("1 snapshots lie in the anneal's window"));
  request.anneal = {.begin = 200, .end = 305};
  CHECK_THROWS_WITH(predict(request), ContainsSubstring("not of the anneal's end"));
}

TEST_CASE("curves of a run and of its anneals are read up to a step") {
  const TempDirectory temp;
  const Anneal anneal{.begin = 10, .end = 15};
  const fs::path directory = temp / "anneals" / anneal_name(anneal);
  fs::create_directories(directory);
  CHECK(read_curves(temp.path(), 20).empty());
  const auto write = [](const fs::path& run, std::int64_t from, std::int64_t to, double lr) {
    MetricsWriter writer(run, 0);
    for (std::int64_t step = from; step <= to; ++step)
      writer.write({.step = step, .tokens = step, .loss = 3, .lr = lr});
  };
  write(temp.path(), 1, 30, 0.5);
  write(directory, 11, 15, 0.1);
  CHECK(read_curves(temp.path(), 20).size() == 1);  // not checked yet
  write_check(directory, {.anneal = anneal, .errors = {}});
  const std::vector<LossCurve> curves = read_curves(temp.path(), 20);
  REQUIRE(curves.size() == 2);
  CHECK(curves[0].lr.size() == 20);
  CHECK(curves[1].lr == std::vector<double>{0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1});
  CHECK(curves[1].step == std::vector<std::int64_t>{11, 12, 13, 14, 15});
  CHECK(read_curves(temp.path(), 15).size() == 1);  // the anneal does not end before
  write_text_atomic(directory / "check.json", "{}");
  CHECK_THROWS_WITH(read_checks(temp.path()), ContainsSubstring("no record of an anneal check"));
}
