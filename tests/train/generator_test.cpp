#include "train/generator.h"

#include <cmath>
#include <limits>
#include <set>

#include "base/rng.h"
#include "catch.h"
#include "ops/rope.h"

using namespace kiln;

namespace {

LlamaConfig small_model() {
  LlamaConfig config;
  config.vocab = 97;
  config.hidden = 32;
  config.ffn = 48;
  config.heads = 4;
  config.kv_heads = 2;
  config.layers = 2;
  config.head_dim = 8;
  config.init_std = 0.3;  // logits far apart
  return config;
}

ModelWeights small_weights() {
  ModelWeights weights(small_model(), DType::f32);
  initialise(weights, 7);
  return weights;
}

std::vector<std::int32_t> sequence(std::int64_t length) {
  const Philox random(3, 0);
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < length; ++i)
    tokens.push_back(static_cast<std::int32_t>(random.bits(static_cast<std::uint64_t>(i)) % 97));
  return tokens;
}

/// The last row of a plan that sees the whole sequence at once, without a cache.
std::vector<float> last_logits(const ModelWeights& weights, const std::vector<std::int32_t>& tokens) {
  const auto length = static_cast<std::int64_t>(tokens.size());
  Plan plan;
  const LlamaValues values = record_llama(plan, weights.config(), DType::f32, {.sequences = 1, .seq_len = length},
                                          LlamaOutput::logits, length);
  Executor executor(plan, 1);
  HostTensor input({{length}, DType::i32}), first({{1}, DType::i32});
  HostTensor table({{length, weights.config().head_dim}, DType::f32});
  std::copy(tokens.begin(), tokens.end(), input.span<std::int32_t>().begin());
  fill_rope_table(table.view(), weights.config().rope_base);
  for (std::size_t s = 0; s < values.storages.size(); ++s) executor.bind(values.storages[s], weights.storage(s));
  executor.bind(values.tokens, input.view());
  executor.bind(values.first, first.view());
  executor.bind(values.rope_table, table.view());
  executor.run(Phase::micro, false);
  const auto row = executor.tensor(values.logits).rows(length - 1, 1).span<float>();
  return {row.begin(), row.end()};
}

void require_close(std::span<const float> found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  double scale = 0;
  for (const float value : expected) scale = std::max(scale, std::abs(static_cast<double>(value)));
  REQUIRE(scale > 1);
  for (std::size_t i = 0; i < expected.size(); ++i)
    REQUIRE(std::abs(static_cast<double>(found[i] - expected[i])) < 1e-5 * scale);
}

std::set<std::int32_t> drawn(const std::vector<float>& logits, const SamplingOptions& options, std::uint64_t draws) {
  std::set<std::int32_t> tokens;
  for (std::uint64_t n = 0; n < draws; ++n) tokens.insert(sample_token(logits, options, n));
  return tokens;
}

}  // namespace

TEST_CASE("A sequence fed in pieces gives the logits of the whole one", "[generator]") {
  const ModelWeights weights = small_weights();
  const std::vector<std::int32_t> tokens = sequence(300);  // prefill passes of 128, 128 and 44
  const std::vector<float> expected = last_logits(weights, tokens);
  Generator generator(weights, 310);
  require_close(generator.feed(tokens), expected);

  const std::span<const std::int32_t> all = tokens;
  generator.reset();
  for (const auto& [begin, count] : {std::pair<std::size_t, std::size_t>{0, 1}, {1, 130}, {131, 69}, {200, 98}})
    generator.feed(all.subspan(begin, count));
  generator.feed(all.subspan(298, 1));
  require_close(generator.feed(all.subspan(299, 1)), expected);
}

TEST_CASE("Tokens one by one equal one pass", "[generator]") {
  const ModelWeights weights = small_weights();
  const std::vector<std::int32_t> tokens = sequence(20);
  Generator generator(weights, 20);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::span<const float> logits = generator.feed(std::span(tokens).subspan(i, 1));
    require_close(logits, last_logits(weights, {tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(i) + 1}));
  }
}

TEST_CASE("Greedy generation takes the likeliest token and repeats itself", "[generator]") {
  const ModelWeights weights = small_weights();
  const std::vector<std::int32_t> prompt = sequence(5);
  Generator generator(weights, 64);
  const SamplingOptions greedy{.temperature = 0};
  std::vector<std::int32_t> emitted;
  const auto first = generator.run(prompt, 12, -1, greedy, [&](std::int32_t token) { emitted.push_back(token); });
  REQUIRE(first.size() == 12);
  CHECK(emitted == first);
  CHECK(generator.run(prompt, 12, -1, greedy, {}) == first);
  CHECK(Generator(weights, 40).run(prompt, 12, -1, greedy, {}) == first);

  std::vector<std::int32_t> whole = prompt;
  for (const std::int32_t token : first) {
    const std::vector<float> logits = last_logits(weights, whole);
    CHECK(token == std::max_element(logits.begin(), logits.end()) - logits.begin());
    whole.push_back(token);
  }
  // The third distinct token as end of sequence: the run stops before it.
  const auto end = std::find_if(first.begin(), first.end(), [&](std::int32_t token) { return token != first[0]; });
  REQUIRE(end != first.end());
  const auto stopped = generator.run(prompt, 12, *end, greedy, {});
  CHECK(stopped == std::vector<std::int32_t>(first.begin(), end));
}

TEST_CASE("Sampling is a function of the seed", "[generator]") {
  const ModelWeights weights = small_weights();
  Generator generator(weights, 64);
  const std::vector<std::int32_t> prompt = sequence(5);
  const auto run = [&](std::uint64_t seed) {
    return generator.run(prompt, 30, -1, {.temperature = 2.0, .seed = seed}, {});
  };
  CHECK(run(1) == run(1));
  CHECK(run(1) != run(2));
}

TEST_CASE("Draws follow the softmax of the scaled logits", "[generator]") {
  const std::vector<float> logits{0.0f, 1.0f, -1.0f};
  const double temperature = 0.5;
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit) / temperature);
  constexpr int kDraws = 20000;
  std::vector<double> share(3);
  for (int n = 0; n < kDraws; ++n)
    share[static_cast<std::size_t>(
        sample_token(logits, {.temperature = temperature}, static_cast<std::uint64_t>(n)))] += 1.0 / kDraws;
  for (std::size_t i = 0; i < logits.size(); ++i)
    CHECK(share[i] == Approx(std::exp(static_cast<double>(logits[i]) / temperature) / total).margin(0.01));
}

TEST_CASE("top_k and top_p restrict what is drawn", "[generator]") {
  // Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1; tokens 3, 1, 0, 2.
  const std::vector<float> logits{std::log(0.125f), std::log(0.25f), std::log(0.125f), std::log(0.5f)};
  const std::uint64_t draws = 400;
  CHECK(drawn(logits, {.temperature = 1}, draws).size() == 4);
  CHECK(drawn(logits, {.temperature = 1, .top_k = 1}, draws) == std::set<std::int32_t>{3});
  CHECK(drawn(logits, {.temperature = 1, .top_k = 2}, draws) == std::set<std::int32_t>{1, 3});
  CHECK(drawn(logits, {.temperature = 1, .top_k = 3}, draws) == std::set<std::int32_t>{0, 1, 3});  // ties: lower token
  CHECK(drawn(logits, {.temperature = 1, .top_k = 99}, draws).size() == 4);
  CHECK(drawn(logits, {.temperature = 1, .top_p = 0.1}, draws) == std::set<std::int32_t>{3});
  CHECK(drawn(logits, {.temperature = 1, .top_p = 0.7}, draws) == std::set<std::int32_t>{1, 3});
  // Over the two that top_k left, token 3 alone holds two thirds.
  CHECK(drawn(logits, {.temperature = 1, .top_k = 2, .top_p = 0.6}, draws) == std::set<std::int32_t>{3});
}

TEST_CASE("Errors of generation are clear", "[generator]") {
  const ModelWeights weights = small_weights();
  Generator generator(weights, 8);
  const std::vector<std::int32_t> prompt = sequence(5);
  CHECK_THROWS_WITH(generator.run({}, 1, -1, {}, {}), ContainsSubstring("the prompt is empty"));
  CHECK_THROWS_WITH(generator.run(prompt, 4, -1, {}, {}),
                    ContainsSubstring("a prompt of 5 tokens and 4 new ones exceed the cache of 8 positions"));
  CHECK_NOTHROW(generator.run(prompt, 3, -1, {}, {}));
  generator.reset();
  generator.feed(prompt);
  CHECK_THROWS_WITH(generator.feed(prompt), ContainsSubstring("5 tokens after 5 exceed the cache of 8"));
  generator.reset();
  CHECK_THROWS_WITH(generator.feed(std::vector<std::int32_t>{97}),
                    ContainsSubstring("token 97 is outside the model's vocabulary of 97"));
  CHECK_THROWS_WITH(generator.run(prompt, 1, -1, {.temperature = -1}, {}), ContainsSubstring("temperature: -1"));
  CHECK_THROWS_WITH(generator.run(prompt, 1, -1, {.top_p = 0}, {}), ContainsSubstring("top_p: 0"));
  const std::vector<float> broken{1.0f, std::numeric_limits<float>::quiet_NaN()};
  CHECK_THROWS_WITH(sample_token(broken, {.temperature = 0}, 0), ContainsSubstring("not finite"));
}
