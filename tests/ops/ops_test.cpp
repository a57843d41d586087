#include <cmath>

#include "catch.h"
#include "core/parallel.h"
#include "graph/parameter.h"
#include "ops/attention.h"
#include "ops/classifier.h"
#include "ops/embedding.h"
#include "ops/last_row.h"
#include "ops/linear.h"
#include "ops/op_case.h"
#include "ops/rms_norm.h"
#include "ops/rms_scale.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

using Doubles = std::vector<double>;
using Inputs = std::vector<HostTensor>;

TensorSpec real(std::initializer_list<std::int64_t> sizes) { return {Shape(sizes), DType::f64}; }
TensorSpec ints(std::int64_t count) { return {{count}, DType::i32}; }
double at(const HostTensor& t, std::int64_t i) { return t.view().as<double>()[i]; }
std::int32_t token(const HostTensor& t, std::int64_t i) { return t.view().as<std::int32_t>()[i]; }

OpCase linear_case(std::int64_t n, std::int64_t m, std::int64_t k) {
  return {.name = "linear",
          .op = std::make_shared<Linear>(),
          .inputs = {real({n, k}), real({m, k})},
          .gradients = {0, 1},
          .reference = [=](const Inputs& in) {
            Doubles y(static_cast<std::size_t>(n * m));
            for (std::int64_t i = 0; i < n; ++i)
              for (std::int64_t j = 0; j < m; ++j)
                for (std::int64_t l = 0; l < k; ++l)
                  y[static_cast<std::size_t>(i * m + j)] += at(in[0], i * k + l) * at(in[1], j * k + l);
            return y;
          }};
}

OpCase embedding_case(std::int64_t n, std::int64_t vocab, std::int64_t width) {
  return {.name = "embedding",
          .op = std::make_shared<Embedding>(),
          .inputs = {ints(n), real({vocab, width})},
          .gradients = {1},
          .prepare =
              [=](Inputs& in) {
                for (std::int64_t i = 0; i < n; ++i)
                  in[0].view().as<std::int32_t>()[i] = static_cast<std::int32_t>((i * i + 1) % vocab);
              },
          .reference =
              [=](const Inputs& in) {
                Doubles y;
                for (std::int64_t i = 0; i < n; ++i)
                  for (std::int64_t c = 0; c < width; ++c) y.push_back(at(in[1], token(in[0], i) * width + c));
                return y;
              }};
}

OpCase norm_case(std::int64_t n, std::int64_t width, bool residual) {
  OpCase c{.name = residual ? "add_rms_norm" : "rms_norm",
           .op = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = 1e-3, .residual = residual}),
           .inputs = {real({n, width}), real({width})},
           .gradients = {0, 1}};
  if (residual) {
    c.inputs.push_back(real({n, width}));
    c.gradients.push_back(2);
  }
  c.reference = [=](const Inputs& in) {
    Doubles y;
    for (std::int64_t i = 0; i < n; ++i) {
      double square = 0;
      auto r = [&](std::int64_t j) { return at(in[0], i * width + j) + (residual ? at(in[2], i * width + j) : 0.0); };
      for (std::int64_t j = 0; j < width; ++j) square += r(j) * r(j);
      const double rstd = 1 / std::sqrt(square / static_cast<double>(width) + 1e-3);
      for (std::int64_t j = 0; j < width; ++j) y.push_back(r(j) * rstd * at(in[1], j));
    }
    return y;
  };
  return c;
}

OpCase rope_case(AttentionShape shape, std::int64_t sequences, std::int32_t first, double base) {
  const std::int64_t n = sequences * shape.seq_len, d = shape.head_dim, positions = shape.seq_len + first;
  return {.name = "rope",
          .op = std::make_shared<Rope>(shape, Rope::Direction::forward),
          .inputs = {real({n, shape.columns()}), real({positions, d}), ints(1)},
          .gradients = {0},
          .prepare =
              [=](Inputs& in) {
                fill_rope_table(in[1].view(), base);
                in[2].view().as<std::int32_t>()[0] = first;
              },
          .reference =
              [=](const Inputs& in) {
                Doubles y(in[0].view().span<double>().begin(), in[0].view().span<double>().end());
                for (std::int64_t i = 0; i < n; ++i)
                  for (std::int64_t h = 0; h < shape.heads + shape.kv_heads; ++h)
                    for (std::int64_t j = 0; j < d / 2; ++j) {
                      const double angle = static_cast<double>(first + i % shape.seq_len) *
                                           std::pow(base, -2.0 * static_cast<double>(j) / static_cast<double>(d));
                      const auto a = static_cast<std::size_t>(i * shape.columns() + h * d + j);
                      const std::size_t b = a + static_cast<std::size_t>(d / 2);
                      const double x = y[a], z = y[b];
                      y[a] = x * std::cos(angle) - z * std::sin(angle);
                      y[b] = z * std::cos(angle) + x * std::sin(angle);
                    }
                return y;
              }};
}

/// Attention row by row, without tiles.
Doubles attend(const AttentionShape& s, std::int64_t n, const HostTensor& qkv) {
  Doubles out;
  const std::int64_t columns = s.columns(), group = s.heads / s.kv_heads;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t begin = i / s.seq_len * s.seq_len, kv = h / group;
      Doubles p;
      double sum = 0;
      for (std::int64_t j = begin; j <= i; ++j) {
        double dot = 0;
        for (std::int64_t d = 0; d < s.head_dim; ++d)
          dot += at(qkv, i * columns + s.query_column(h) + d) * at(qkv, j * columns + s.key_column(kv) + d);
        p.push_back(std::exp(dot / std::sqrt(static_cast<double>(s.head_dim))));
        sum += p.back();
      }
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        double o = 0;
        for (std::int64_t j = begin; j <= i; ++j)
          o += p[static_cast<std::size_t>(j - begin)] / sum * at(qkv, j * columns + s.value_column(kv) + d);
        out.push_back(o);
      }
    }
  return out;
}

OpCase attention_case(AttentionShape shape, std::int64_t sequences) {
  const std::int64_t n = sequences * shape.seq_len;
  return {.name = fmt::format("attention T {} D {} heads {}/{}", shape.seq_len, shape.head_dim, shape.heads,
                              shape.kv_heads),
          .op = std::make_shared<Attention>(shape),
          .inputs = {real({n, shape.columns()})},
          .gradients = {0},
          .reference = [=](const Inputs& in) { return attend(shape, n, in[0]); }};
}

OpCase swiglu_case(std::int64_t n, std::int64_t width) {
  return {.name = "swiglu",
          .op = std::make_shared<SwiGlu>(),
          .inputs = {real({n, 2 * width})},
          .gradients = {0},
          .reference = [=](const Inputs& in) {
            Doubles y;
            for (std::int64_t i = 0; i < n; ++i)
              for (std::int64_t c = 0; c < width; ++c) {
                const double gate = at(in[0], i * 2 * width + c);
                y.push_back(gate / (1 + std::exp(-gate)) * at(in[0], i * 2 * width + width + c));
              }
            return y;
          }};
}

OpCase classifier_case(std::int64_t n, std::int64_t vocab, std::int64_t width, std::int64_t chunk) {
  return {.name = "classifier",
          .op = std::make_shared<Classifier>(Classifier::Options{.gradient = true, .chunk_tokens = chunk}),
          .inputs = {real({n, width}), real({vocab, width}), ints(n), scalars_spec()},
          .gradients = {0, 1},
          .loss = true,
          .prepare =
              [=](Inputs& in) {
                for (std::int64_t i = 0; i < n; ++i)
                  in[2].view().as<std::int32_t>()[i] =
                      i % 3 == 1 ? Classifier::kIgnoredTarget : static_cast<std::int32_t>((7 * i + 2) % vocab);
                scalar(in[3].view(), Scalar::loss_scale) = 0.37;
              },
          .reference =
              [=](const Inputs& in) {
                Doubles losses;
                for (std::int64_t i = 0; i < n; ++i) {
                  const std::int32_t target = token(in[2], i);
                  double sum = 0, chosen = 0;
                  for (std::int64_t v = 0; v < vocab; ++v) {
                    double logit = 0;
                    for (std::int64_t c = 0; c < width; ++c)
                      logit += at(in[0], i * width + c) * at(in[1], v * width + c);
                    sum += std::exp(logit);
                    if (v == target) chosen = logit;
                  }
                  losses.push_back(target < 0 ? 0.0 : std::log(sum) - chosen);
                }
                return losses;
              }};
}

/// Every differentiable op at odd sizes.
std::vector<OpCase> cases() {
  return {linear_case(5, 7, 3),
          linear_case(33, 65, 130),
          embedding_case(11, 6, 5),
          norm_case(3, 7, false),
          norm_case(70, 33, true),
          rope_case({.heads = 2, .kv_heads = 1, .head_dim = 6, .seq_len = 5}, 2, 0, 10000),
          rope_case({.heads = 1, .kv_heads = 1, .head_dim = 4, .seq_len = 3}, 1, 9, 500000),
          attention_case({.heads = 2, .kv_heads = 2, .head_dim = 8, .seq_len = 5}, 2),
          attention_case({.heads = 4, .kv_heads = 2, .head_dim = 8, .seq_len = 64}, 1),
          attention_case({.heads = 4, .kv_heads = 1, .head_dim = 6, .seq_len = 65}, 1),
          attention_case({.heads = 2, .kv_heads = 1, .head_dim = 32, .seq_len = 130}, 1),
          swiglu_case(3, 5),
          swiglu_case(9, 37),
          classifier_case(9, 23, 6, 4),
          classifier_case(7, 40, 5, 384),
          classifier_case(10, 420, 50, 7),  // several blocks of the vocabulary, several groups of columns
          classifier_case(5, 30, 400, 5)};  // more columns than one pass over k
}

TEST_CASE("every op equals its plain fp64 reference") {
  for (const OpCase& c : cases()) check_forward(c);
}

TEST_CASE("every gradient rule equals central differences in fp64") {
  for (const OpCase& c : cases()) check_gradients(c);
}

struct ClassifierRun {
  std::vector<double> losses, dx, dw;
};

/// 50 tokens in chunks of 24, 1000 words; logits reach +-30 and every row's maximum grows along the vocabulary.
template <typename T>
ClassifierRun run_classifier(int threads) {
  const std::int64_t n = 50, vocab = 1000, width = 70;
  const DType dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  HostTensor x({{n, width}, dtype}), w({{vocab, width}, dtype}), targets(ints(n)), scalars(scalars_spec());
  const Doubles vx = random_values(n * width, 3), vw = random_values(vocab * width, 4);
  for (std::size_t i = 0; i < vx.size(); ++i) x.span<T>()[i] = static_cast<T>(static_cast<float>(vx[i]));
  for (std::size_t i = 0; i < vw.size(); ++i)
    w.span<T>()[i] = static_cast<T>(static_cast<float>(vw[i] * static_cast<double>(i) / 300.0));
  for (std::size_t i = 0; i < 50; ++i)
    targets.span<std::int32_t>()[i] = i % 7 == 3 ? Classifier::kIgnoredTarget : static_cast<std::int32_t>(19 * i);
  scalar(scalars.view(), Scalar::loss_scale) = 0.37;
  const Classifier op({.gradient = true, .chunk_tokens = 24});
  const std::vector<Tensor> in{x.view(), w.view(), targets.view(), scalars.view()};
  std::vector<TensorSpec> specs;
  for (const Tensor& tensor : in) specs.push_back(tensor.spec);
  HostTensor losses({{n}, dtype}), dx({{n, width}, dtype}), dw({{vocab, width}, dtype});
  const int before = thread_count();
  set_thread_count(threads);
  HostTensor workspace({{static_cast<std::int64_t>(op.workspace_bytes(specs))}, DType::u8});
  op.run_cpu(
      {.in = in, .out = std::vector<Tensor>{losses.view(), dx.view(), dw.view()}, .workspace = workspace.view()});
  set_thread_count(before);
  auto values = [](const HostTensor& tensor) { return Doubles(tensor.span<T>().begin(), tensor.span<T>().end()); };
  return {values(losses), values(dx), values(dw)};
}

TEST_CASE("the classifier in f32 follows f64 across blocks and chunks") {
  const ClassifierRun expected = run_classifier<double>(1), found = run_classifier<float>(2);
  auto error = [](const Doubles& a, const Doubles& b) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      difference += (a[i] - b[i]) * (a[i] - b[i]);
      norm += b[i] * b[i];
    }
    return std::sqrt(difference / norm);
  };
  // Logits near 30 are rounded to 2e-6, and so is their exponential.
  CHECK(error(found.losses, expected.losses) <= 2e-5);
  CHECK(error(found.dx, expected.dx) <= 2e-5);
  CHECK(error(found.dw, expected.dw) <= 2e-5);
}

TEST_CASE("the classifier gives the same bits for any number of threads") {
  const ClassifierRun one = run_classifier<float>(1);
  for (const int threads : {2, 3, 5}) {
    const ClassifierRun several = run_classifier<float>(threads);
    CHECK(several.losses == one.losses);
    CHECK(several.dx == one.dx);
    CHECK(several.dw == one.dw);
  }
}

TEST_CASE("a wrong gradient is noticed") {
  // The inverse rotation stands in for a gradient rule with a wrong sign.
  OpCase wrong = rope_case({.heads = 1, .kv_heads = 1, .head_dim = 4, .seq_len = 3}, 1, 2, 100);
  wrong.op = std::make_shared<Rope>(AttentionShape{1, 1, 4, 3}, Rope::Direction::inverse);
  std::vector<HostTensor> inputs;
  for (const TensorSpec& spec : wrong.inputs) inputs.emplace_back(spec);
  wrong.prepare(inputs);
  const auto x = random_values(inputs[0].view().numel(), 1);
  std::copy(x.begin(), x.end(), inputs[0].span<double>().begin());
  const Doubles expected = wrong.reference(inputs);
  wrong.op->run_cpu(
      {.in = std::vector<Tensor>{inputs[0].view(), inputs[1].view(), inputs[2].view()}, .out = {}, .workspace = {}});
  double difference = 0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    difference = std::max(difference, std::abs(expected[i] - inputs[0].span<double>()[i]));
  CHECK(difference > 1e-3);
}

TEST_CASE("bad shapes are refused with the shapes in the message") {
  auto message = [](const Op& op, std::vector<TensorSpec> in) {
    try {
      op.infer(in);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  CHECK_THAT(message(Linear(), {real({2, 3}), real({5, 4})}), ContainsSubstring("inner sizes 3 and 4"));
  CHECK_THAT(message(SwiGlu(), {real({2, 3})}), ContainsSubstring("3 columns"));
  CHECK_THAT(message(RmsNorm({}), {real({2, 3}), real({4})}), ContainsSubstring("[4], expected [3]"));
  CHECK_THAT(message(Attention({.heads = 3, .kv_heads = 2, .head_dim = 2, .seq_len = 2}), {real({2, 14})}),
             ContainsSubstring("multiple of the 2 key heads"));
  CHECK_THAT(message(Attention({.heads = 1, .kv_heads = 1, .head_dim = 2, .seq_len = 4}), {real({6, 6})}),
             ContainsSubstring("multiple of the sequence length 4"));
  CHECK_THAT(message(Embedding(), {real({2}), real({4, 2})}), ContainsSubstring("expected i32"));
  CHECK_THAT(message(Classifier({}), {real({2, 3}), real({9, 4}), ints(2), scalars_spec()}),
             ContainsSubstring("inner sizes"));
}

TEST_CASE("a weight used twice gets the sum of both gradients") {
  Plan plan;
  const ValueId x = plan.external("x", real({3, 4}), Role::input),
                w = plan.external("w", real({4, 4}), Role::parameter);
  const auto linear = std::make_shared<Linear>();
  const ValueId y = plan.add1(linear, {plan.add1(linear, {x, w}, "a"), w}, "b");
  const ValueId targets = plan.external("targets", ints(3), Role::input);
  const ValueId scalars = plan.external("scalars", scalars_spec(), Role::input);
  const ValueId head = plan.external("head", real({5, 4}), Role::input);
  const ValueId loss = plan.add(std::make_shared<Classifier>(Classifier::Options{.gradient = true}),
                                {y, head, targets, scalars}, "loss")[0];
  plan.keep(loss);
  plan.backward(loss);
  plan.keep(plan.gradient(w));
  Executor executor(plan, 1);
  HostTensor mx(real({3, 4})), mw(real({4, 4})), mh(real({5, 4})), mt(ints(3)), ms(scalars_spec());
  std::uint64_t seed = 1;
  for (HostTensor* t : {&mx, &mw, &mh}) {
    const Doubles values = random_values(t->view().numel(), seed++);
    std::copy(values.begin(), values.end(), t->span<double>().begin());
  }
  scalar(ms.view(), Scalar::loss_scale) = 1;
  executor.bind(x, mx.view());
  executor.bind(w, mw.view());
  executor.bind(head, mh.view());
  executor.bind(targets, mt.view());
  executor.bind(scalars, ms.view());
  auto value = [&] {
    executor.run(Phase::micro, false);
    double total = 0;
    for (const double l : executor.tensor(loss).span<double>()) total += l;
    return total;
  };
  value();
  const Doubles analytic(executor.tensor(plan.gradient(w)).span<double>().begin(),
                         executor.tensor(plan.gradient(w)).span<double>().end());
  for (std::size_t i = 0; i < analytic.size(); ++i) {
    const double kept = mw.span<double>()[i], h = 1e-5;
    mw.span<double>()[i] = kept + h;
    const double above = value();
    mw.span<double>()[i] = kept - h;
    const double below = value();
    mw.span<double>()[i] = kept;
    CHECK(analytic[i] == Approx((above - below) / (2 * h)).epsilon(1e-6).margin(1e-8));
  }
}

TEST_CASE("attention over a cache, in pieces, equals attention at once") {
  const std::int64_t tokens = 70;
  AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 8, .seq_len = tokens};
  HostTensor qkv(real({tokens, shape.columns()}));
  const Doubles values = random_values(qkv.view().numel(), 3);
  std::copy(values.begin(), values.end(), qkv.span<double>().begin());
  const Doubles expected = attend(shape, tokens, qkv);
  HostTensor keys(real({80, 16})), cache(real({80, 16}));
  Doubles found;
  std::int64_t first = 0;
  for (const std::int64_t count : {std::int64_t{66}, std::int64_t{1}, std::int64_t{3}}) {
    shape.seq_len = count;
    Plan plan;
    const ValueId q = plan.external("qkv", real({count, shape.columns()}), Role::input);
    const ValueId k = plan.external("keys", real({80, 16}), Role::state),
                  v = plan.external("values", real({80, 16}), Role::state);
    const ValueId position = plan.external("first", ints(1), Role::input);
    const ValueId out = plan.add1(std::make_shared<CachedAttention>(shape), {q, k, v, position}, "o");
    plan.keep(out);
    Executor executor(plan, 1);
    HostTensor at_position(ints(1));
    at_position.span<std::int32_t>()[0] = static_cast<std::int32_t>(first);
    executor.bind(q, qkv.view().rows(first, count));
    executor.bind(k, keys.view());
    executor.bind(v, cache.view());
    executor.bind(position, at_position.view());
    executor.run(Phase::micro, false);
    const auto o = executor.tensor(out).span<double>();
    found.insert(found.end(), o.begin(), o.end());
    first += count;
  }
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == Approx(expected[i]).epsilon(1e-10).margin(1e-12));
}

TEST_CASE("rms_scale gives the bits of the norm's output again") {
  const std::int64_t n = 37, width = 29;
  HostTensor x({{n, width}, DType::f32}), w({{width}, DType::f32}), y(x.view().spec), again(x.view().spec);
  HostTensor rstd({{n}, DType::f32});
  std::ranges::copy(random_values(n * width, 1), x.span<float>().begin());
  std::ranges::copy(random_values(width, 2), w.span<float>().begin());
  const std::vector<Tensor> in{x.view(), w.view()}, out{y.view(), rstd.view()};
  RmsNorm({}).run_cpu({.in = in, .out = out});
  const std::vector<Tensor> kept{x.view(), w.view(), rstd.view()}, copy{again.view()};
  CHECK(RmsScale().infer(std::vector<TensorSpec>{x.view().spec, w.view().spec, rstd.view().spec}).front() ==
        y.view().spec);
  RmsScale().run_cpu({.in = kept, .out = copy});
  CHECK(std::ranges::equal(y.span<float>(), again.span<float>()));
  CHECK_THROWS_WITH(RmsScale().infer(std::vector<TensorSpec>{x.view().spec, rstd.view().spec, rstd.view().spec}),
                    ContainsSubstring("rms_scale"));
}

TEST_CASE("the last row is the last row") {
  HostTensor x(real({3, 2})), y(real({1, 2}));
  for (std::size_t i = 0; i < 6; ++i) x.span<double>()[i] = static_cast<double>(i);
  const std::vector<Tensor> in{x.view()}, out{y.view()};
  LastRow().run_cpu({.in = in, .out = out, .workspace = {}});
  CHECK(y.span<double>()[0] == 4);
  CHECK(y.span<double>()[1] == 5);
}

}  // namespace
}  // namespace kiln::test
