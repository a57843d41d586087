// Every CUDA op against the CPU's in fp64, over shapes drawn at random and those at the edges.
#include <algorithm>
#include <cmath>

#include "catch.h"
#include "graph/parameter.h"
#include "kernels/cuda_backend.h"
#include "kernels/device_case.h"
#include "ops/attention.h"
#include "ops/classifier.h"
#include "ops/embedding.h"
#include "ops/last_row.h"
#include "ops/linear.h"
#include "ops/loss_sum.h"
#include "ops/rms_norm.h"
#include "ops/rms_scale.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

using Inputs = std::vector<HostTensor>;
using Ids = std::vector<ValueId>;

constexpr std::int64_t kDraws = 8;

std::int64_t any_width(Draw& draw) { return draw.pick({8, 72, 128, 136, 352, 512, 768, 1024, 1376, 2048}); }

void set_scalar(Inputs& in, std::size_t index, Scalar which, double value) { scalar(in[index].view(), which) = value; }

TEST_CASE("linear and its gradients on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  struct Sizes {
    std::int64_t n, m, k;
  };
  std::vector<Sizes> list{{1, 8, 8}, {1, 32000, 136}, {77, 2048, 5504}, {129, 4096, 4096}, {1000, 136, 352}};
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(seed));
    list.push_back({draw.between(1, 700), any_width(draw), any_width(draw)});
  }
  for (const Sizes& s : list) {
    const std::string at = fmt::format(" N {} M {} K {}", s.n, s.m, s.k);
    check_case({.name = "linear" + at,
                .inputs = {bf16({s.n, s.k}), bf16({s.m, s.k})},
                .record =
                    [](Plan& plan, const Ids& in) {
                      return std::vector<Compared>{{plan.add1(std::make_shared<Linear>(), in, "y"), kOneRounding}};
                    }},
               *gpu);
    check_case({.name = "linear_dx" + at,
                .inputs = {bf16({s.n, s.m}), bf16({s.m, s.k})},
                .record =
                    [](Plan& plan, const Ids& in) {
                      const ValueId dx = plan.add1(std::make_shared<LinearInputGradient>(), in, "dx");
                      return std::vector<Compared>{{dx, kOneRounding}};
                    }},
               *gpu);
    // Over two micro-batches, then added to what another use of the weight left.
    check_case({.name = "linear_dw" + at,
                .inputs = {bf16({s.n, s.m}), bf16({s.n, s.k}), {bf16({s.m, s.k}).spec, Role::parameter}},
                .record =
                    [](Plan& plan, const Ids& in) {
                      const Ids out = add_parameter_gradient(plan, std::make_shared<LinearWeightGradient>(false),
                                                             {in[0], in[1]}, in[2], 0);
                      return std::vector<Compared>{{out[0], kFloat}};
                    },
                .micro_batches = 2},
               *gpu);
    check_case({.name = "linear_dw in bf16" + at,
                .inputs = {bf16({s.n, s.m}), bf16({s.n, s.k})},
                .record =
                    [](Plan& plan, const Ids& in) {
                      const auto op = std::make_shared<LinearWeightGradient>(false, DType::bf16);
                      return std::vector<Compared>{{plan.add1(op, in, "dw"), kOneRounding}};
                    }},
               *gpu);
    check_case({.name = "linear_dw, added" + at,
                .inputs = {bf16({s.n, s.m}), bf16({s.n, s.k}), f32({s.m, s.k})},
                .record =
                    [](Plan& plan, const Ids& in) {
                      plan.add(std::make_shared<LinearWeightGradient>(true), in, "dw");
                      return std::vector<Compared>{{in[2], kFloat}};
                    }},
               *gpu);
  }
}

/// Frequent and rare tokens, as text has them; every seventh is the first of the vocabulary.
void fill_tokens(const HostTensor& tensor, std::int64_t vocab, std::uint64_t seed) {
  const Philox random(seed, stream_of("tokens"));
  const std::span<std::int32_t> tokens = tensor.span<std::int32_t>();
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const double u = random.uniform(i);
    tokens[i] = i % 7 == 3 ? 0 : static_cast<std::int32_t>(u * u * u * static_cast<double>(vocab));
  }
}

TEST_CASE("embedding and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  struct Sizes {
    std::int64_t n, vocab, width;
    bool same;  // one token throughout
  };
  std::vector<Sizes> list{{1, 1000, 136, false}, {33, 1000, 8, true},       {2500, 1000, 512, true},
                          {64, 2, 128, false},   {4099, 32000, 136, false}, {100, 1000, 4096, false}};
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(100 + seed));
    list.push_back({draw.between(1, 3000), draw.pick({1000, 4096}), any_width(draw), false});
  }
  for (const Sizes& s : list) {
    const std::string at = fmt::format(" N {} V {} C {}{}", s.n, s.vocab, s.width, s.same ? ", one token" : "");
    const auto fill = [s](Inputs& in) {
      fill_tokens(in[0], s.vocab, 5);
      if (s.same) std::ranges::fill(in[0].span<std::int32_t>(), static_cast<std::int32_t>(s.vocab - 1));
    };
    check_case({.name = "embedding" + at,
                .inputs = {i32(s.n), bf16({s.vocab, s.width})},
                .record =
                    [](Plan& plan, const Ids& in) {
                      return std::vector<Compared>{{plan.add1(std::make_shared<Embedding>(), in, "y"), 0.0}};
                    },
                .prepare = fill},
               *gpu);
    check_case(
        {.name = "embedding_dw" + at,
         .inputs = {i32(s.n), bf16({s.n, s.width}), {bf16({s.vocab, s.width}).spec, Role::parameter}},
         .record =
             [s](Plan& plan, const Ids& in) {
               const auto op = std::make_shared<EmbeddingGradient>(s.vocab, false);
               return std::vector<Compared>{{add_parameter_gradient(plan, op, {in[0], in[1]}, in[2], 0)[0], kFloat}};
             },
         .prepare = fill,
         .micro_batches = 2},
        *gpu);
    check_case({.name = "embedding_dw, added" + at,
                .inputs = {i32(s.n), bf16({s.n, s.width}), f32({s.vocab, s.width})},
                .record =
                    [s](Plan& plan, const Ids& in) {
                      plan.add(std::make_shared<EmbeddingGradient>(s.vocab, true), in, "dw");
                      return std::vector<Compared>{{in[2], kFloat}};
                    },
                .prepare = fill},
               *gpu);
  }
}

/// Forward, and backward from its own rstd.
DeviceCase norm_case(std::int64_t n, std::int64_t width, bool residual, bool arriving) {
  DeviceCase c{.name = fmt::format("rms_norm N {} C {}{}{}", n, width, residual ? ", residual" : "",
                                   arriving ? ", a gradient arrives" : ""),
               .inputs = {bf16({n, width}),
                          {bf16({width}).spec, Role::parameter},
                          bf16({n, width}),
                          bf16({n, width}),
                          bf16({n, width})},
               .record = {},
               .micro_batches = 2};
  c.record = [=](Plan& plan, const Ids& in) {
    const auto op = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = 1e-5, .residual = residual});
    const Ids out = plan.add(op, residual ? Ids{in[0], in[1], in[2]} : Ids{in[0], in[1]}, "norm");
    Ids inputs{residual ? out[2] : in[0], in[1], out[1], in[3]};
    if (arriving) inputs.push_back(in[4]);
    const Ids gradients = add_parameter_gradient(plan, std::make_shared<RmsNormGradient>(), inputs, in[1], 1);
    // With a residual y, rstd and the gradients follow from a sum that was rounded before.
    std::vector<Compared> list{{out[0], residual ? kTwoRoundings : kOneRounding},
                               {out[1], residual ? 0x1p-9 : kFloat},
                               {gradients[0], residual ? kTwoRoundings : kOneRounding},
                               {gradients[1], residual ? kTwoRoundings : kFloat}};
    if (residual) list.push_back({out[2], kOneRounding});
    return list;
  };
  return c;
}

TEST_CASE("RMS norm and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const bool residual : {false, true})
    for (const bool arriving : {false, true}) {
      check_case(norm_case(1, 8, residual, arriving), *gpu);
      for (const std::int64_t width : {4096, 4104, 6656, 8192})
        check_case(norm_case(65, width, residual, arriving), *gpu);
      for (std::int64_t seed = 0; seed < kDraws; ++seed) {
        Draw draw(static_cast<std::uint64_t>(200 + seed));
        check_case(norm_case(draw.between(1, 2000), any_width(draw), residual, arriving), *gpu);
      }
    }
}

/// What recomputation makes again of a norm's output.
DeviceCase scale_case(std::int64_t n, std::int64_t width) {
  return {.name = fmt::format("rms_scale N {} C {}", n, width),
          .inputs = {bf16({n, width}), bf16({width}), f32({n})},
          .record = [](Plan& plan, const Ids& in) {
            return std::vector<Compared>{{plan.add1(std::make_shared<RmsScale>(), in, "y"), kOneRounding}};
          }};
}

TEST_CASE("a norm's output made again on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(250 + seed));
    check_case(scale_case(draw.between(1, 2000), any_width(draw)), *gpu);
  }
}

AttentionShape draw_heads(Draw& draw) {
  AttentionShape shape;
  shape.head_dim = draw.pick({32, 64, 128});
  shape.kv_heads = draw.pick({1, 2, 3});
  shape.heads = shape.kv_heads * draw.pick({1, 2, 4});
  shape.seq_len = draw.pick({1, 2, 17, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300, 515});
  return shape;
}

std::string text(const AttentionShape& s) {
  return fmt::format("T {} D {} heads {}/{}", s.seq_len, s.head_dim, s.heads, s.kv_heads);
}

TEST_CASE("RoPE and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(300 + seed));
    const AttentionShape shape = draw_heads(draw);
    const std::int64_t first = draw.pick({0, 1, 77}), n = draw.between(1, 3) * shape.seq_len;
    for (const Rope::Direction direction : {Rope::Direction::forward, Rope::Direction::inverse})
      check_case({.name = fmt::format("rope {} from {}", text(shape), first),
                  .inputs = {bf16({n, shape.columns()}), f32({shape.seq_len + first, shape.head_dim}), i32(1)},
                  .record =
                      [=](Plan& plan, const Ids& in) {
                        plan.add(std::make_shared<Rope>(shape, direction), in, "rope");
                        return std::vector<Compared>{{in[0], kOneRounding, {shape.value_column(0)}}};
                      },
                  .prepare =
                      [=](Inputs& in) {
                        fill_rope_table(in[1].view(), 10000);
                        in[2].span<std::int32_t>()[0] = static_cast<std::int32_t>(first);
                      }},
                 *gpu);
  }
}

DeviceCase swiglu_case(std::int64_t n, std::int64_t width) {
  return {.name = fmt::format("swiglu N {} F {}", n, width),
          .inputs = {bf16({n, 2 * width}), bf16({n, width})},
          .record =
              [](Plan& plan, const Ids& in) {
                const ValueId y = plan.add1(std::make_shared<SwiGlu>(), {in[0]}, "y");
                const ValueId dx = plan.add1(std::make_shared<SwiGluGradient>(), in, "dx");
                return std::vector<Compared>{{y, kOneRounding}, {dx, kOneRounding}};
              },
          .prepare =
              [](Inputs& in) {
                for (double& x : in[0].span<double>()) x *= 6;
              }};
}

TEST_CASE("SwiGLU and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(400 + seed));
    const std::int64_t n = draw.between(1, 400);
    check_case(swiglu_case(n, draw.pick({8, 352, 1376, 2736, 5504})), *gpu);
  }
}

/// Forward, and backward from its own o and lse. Queries and keys are large enough that softmax is far from uniform.
DeviceCase attention_case(const AttentionShape& shape, std::int64_t sequences) {
  const std::int64_t n = sequences * shape.seq_len;
  return {.name = fmt::format("attention {} x {}", sequences, text(shape)),
          .inputs = {bf16({n, shape.columns()}), bf16({n, shape.heads * shape.head_dim})},
          .record =
              [=](Plan& plan, const Ids& in) {
                const Ids out = plan.add(std::make_shared<Attention>(shape), {in[0]}, "o");
                const ValueId dqkv =
                    plan.add1(std::make_shared<AttentionGradient>(shape), {in[0], out[0], out[1], in[1]}, "dqkv");
                std::vector<Compared> list{{out[0], kTwoRoundings}, {out[1], 1e-3}, {dqkv, kThreeRoundings}};
                // One token sees itself alone: dq and dk are 0, and rounding has nothing to be measured against.
                if (shape.seq_len > 1) list.back().columns = {shape.key_column(0), shape.value_column(0)};
                return list;
              },
          .prepare =
              [=](Inputs& in) {
                const std::span<double> x = in[0].span<double>();
                for (std::size_t i = 0; i < x.size(); ++i)
                  if (static_cast<std::int64_t>(i) % shape.columns() < shape.value_column(0)) x[i] *= 2;
              }};
}

TEST_CASE("attention and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const std::int64_t dim : {32, 64, 128})
    for (const std::int64_t tokens : {1, 65, 128, 321})
      check_case(attention_case({.heads = 4, .kv_heads = 2, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
  check_case(attention_case({.heads = 8, .kv_heads = 1, .head_dim = 64, .seq_len = 1000}, 1), *gpu);
  check_case(attention_case({.heads = 2, .kv_heads = 2, .head_dim = 128, .seq_len = 1100}, 1), *gpu);
  check_case(attention_case({.heads = 8, .kv_heads = 8, .head_dim = 64, .seq_len = 256}, 20), *gpu);
  for (const std::int64_t dim : {32, 64})  // short sequences without groups have a kernel of their own
    for (const std::int64_t tokens : {1, 65, 200, 256})
      check_case(attention_case({.heads = 3, .kv_heads = 3, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
  for (std::int64_t seed = 0; seed < 2 * kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(500 + seed));
    const AttentionShape shape = draw_heads(draw);
    check_case(attention_case(shape, draw.between(1, 5)), *gpu);
  }
}

TEST_CASE("no op on the GPU depends on the order in which it takes the rows", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  // Rows of the norm go by eights, in its gradient by parts of 10 of 5003; vectors of the others by 256.
  for (const std::int64_t n : {1, 65, 1001, 5003})
    for (const std::int64_t width : {8, 136, 768, 1376, 4104})
      for (const bool residual : {false, true}) check_row_order(norm_case(n, width, residual, !residual), *gpu);
  for (const std::int64_t width : {8, 136, 1376}) {
    check_row_order(scale_case(77, width), *gpu);
    check_row_order(swiglu_case(77, width), *gpu);
  }
  for (const std::int64_t tokens : {65, 200, 300}) {
    for (const std::int64_t dim : {32, 64, 128})
      check_row_order(attention_case({.heads = 4, .kv_heads = 2, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
    for (const std::int64_t dim : {32, 64})  // in the kernel of short sequences, where they are
      check_row_order(attention_case({.heads = 3, .kv_heads = 3, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
  }
}

TEST_CASE("attention over a cache, and the last row, on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(600 + seed));
    AttentionShape shape = draw_heads(draw);
    shape.seq_len = draw.pick({1, 1, 7, 128});
    const std::int64_t first = draw.pick({0, 1, 33, 130}), positions = first + shape.seq_len + draw.pick({0, 50});
    const std::int64_t width = shape.kv_heads * shape.head_dim;
    check_case(
        {.name = fmt::format("cached attention {} after {} of {}", text(shape), first, positions),
         .inputs = {bf16({shape.seq_len, shape.columns()}), bf16({positions, width}), bf16({positions, width}), i32(1)},
         .record =
             [=](Plan& plan, const Ids& in) {
               const ValueId out = plan.add1(std::make_shared<CachedAttention>(shape), in, "o");
               const ValueId row = plan.add1(std::make_shared<LastRow>(), {in[0]}, "row");
               return std::vector<Compared>{{out, kOneRounding}, {in[1], 0.0}, {in[2], 0.0}, {row, 0.0}};
             },
         .prepare = [=](Inputs& in) { in[3].span<std::int32_t>()[0] = static_cast<std::int32_t>(first); }},
        *gpu);
  }
}

struct ClassifierSizes {
  std::int64_t n, vocab, width;
  double spread = 1;         // of logits, about
  std::int64_t padding = 0;  // rows of w after the classes
};

/// With its gradient over two micro-batches, or the loss alone. On the CPU there is no padding.
DeviceCase classifier_case(const ClassifierSizes& s, bool gradient, bool padded) {
  const std::int64_t rows = s.vocab + (padded ? s.padding : 0);
  DeviceCase c{.name = fmt::format("classifier N {} V {} C {} spread {}{}", s.n, rows, s.width, s.spread,
                                   gradient ? ", with its gradient" : ""),
               .inputs = {bf16({s.n, s.width}), {bf16({rows, s.width}).spec, Role::parameter}, i32(s.n), scalars()},
               .record = {},
               .micro_batches = gradient ? 2 : 1};
  c.record = [=](Plan& plan, const Ids& in) {
    const auto op = std::make_shared<Classifier>(
        Classifier::Options{.gradient = gradient, .valid_vocab = padded && s.padding > 0 ? s.vocab : 0});
    if (!gradient) return std::vector<Compared>{{plan.add1(op, in, "losses"), 1e-3}};
    const Ids out = add_parameter_gradient(plan, op, in, in[1], 2);
    return std::vector<Compared>{{out[0], 1e-3}, {out[1], 2.5 * 0x1p-9}, {out[2], kTwoRoundings}};
  };
  c.prepare = [=](Inputs& in) {
    const double scale = s.spread * 3 / std::sqrt(static_cast<double>(s.width));
    for (double& x : in[1].span<double>()) x *= scale;
    const std::span<std::int32_t> targets = in[2].span<std::int32_t>();
    for (std::size_t i = 0; i < targets.size(); ++i)
      targets[i] = i % 5 == 2 ? Classifier::kIgnoredTarget
                              : static_cast<std::int32_t>(static_cast<std::int64_t>(i * i + 3) % s.vocab);
    set_scalar(in, 3, Scalar::loss_scale, 0.37);
  };
  return c;
}

TEST_CASE("the classifier and its gradient on the GPU", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  std::vector<ClassifierSizes> list{{.n = 1, .vocab = 1000, .width = 136},
                                    {.n = 300, .vocab = 32000, .width = 512},
                                    {.n = 33, .vocab = 4096, .width = 4096},
                                    {.n = 8500, .vocab = 32000, .width = 24},  // several chunks
                                    {.n = 200, .vocab = 1000, .width = 512, .spread = 8},
                                    {.n = 200, .vocab = 1000, .width = 128, .padding = 24},
                                    {.n = 100, .vocab = 997, .width = 128, .padding = 27}};
  for (std::int64_t seed = 0; seed < kDraws; ++seed) {
    Draw draw(static_cast<std::uint64_t>(700 + seed));
    list.push_back({.n = draw.between(1, 600), .vocab = draw.pick({1000, 4096}), .width = any_width(draw)});
  }
  for (const ClassifierSizes& s : list)
    for (const bool gradient : {false, true}) {
      DeviceRun found = run_case(classifier_case(s, gradient, true), *gpu);
      if (gradient) {
        // Padding gets no gradient.
        std::vector<double>& dw = found.results[2].values;
        const std::ptrdiff_t kept = s.vocab * s.width;
        CHECK(std::all_of(dw.begin() + kept, dw.end(), [](double x) { return x == 0; }));
        dw.resize(static_cast<std::size_t>(kept));
      }
      check_close(classifier_case(s, gradient, true).name, found,
                  run_case(classifier_case(s, gradient, false), cpu_backend()));
    }
}

TEST_CASE("the sum of losses on the GPU adds up over micro-batches", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const std::int64_t n : {1, 31, 1024, 5003})
    check_case({.name = fmt::format("loss_sum N {}", n),
                .inputs = {f32({n}), scalars()},
                .record =
                    [](Plan& plan, const Ids& in) {
                      plan.add(std::make_shared<LossSum>(), in, "loss");
                      return std::vector<Compared>{{in[1], 1e-12}};
                    },
                .prepare =
                    [](Inputs& in) {
                      for (double& x : in[0].span<double>()) x += 2;
                      set_scalar(in, 1, Scalar::loss, 1e9);  // of the step before
                    },
                .micro_batches = 2},
               *gpu);
}

TEST_CASE("a wrong result is noticed", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  const DeviceCase right = norm_case(70, 512, false, false);
  DeviceCase wrong = right;
  wrong.prepare = [](Inputs& in) { in[0].span<double>()[5] += 40; };
  const DeviceRun found = run_case(right, *gpu), expected = run_case(wrong, cpu_backend());
  for (std::size_t i = 0; i < found.results.size(); ++i)
    CHECK(relative_error(found.results[i].values, expected.results[i].values) > found.results[i].compared.limit);
}

}  // namespace
}  // namespace kiln::test
