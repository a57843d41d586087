// Pairs of ops that the GPU runs as one group: against the CPU in fp64, and against their two nodes run apart.
#include "catch.h"
#include "kernels/cuda_backend.h"
#include "kernels/device_case.h"
#include "ops/attention.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/swiglu.h"

namespace kiln::test {
namespace {

using Inputs = std::vector<HostTensor>;
using Ids = std::vector<ValueId>;

/// A pair as recorded with neighbours, and with a node between them; `nodes` of the first form one group less.
struct Pair {
  DeviceCase fused, apart;
  std::size_t groups;  // of the fused plan
};

void check_pair(const Pair& pair, Backend& gpu) {
  INFO(pair.fused.name);
  const DeviceRun fused = run_case(pair.fused, gpu), apart = run_case(pair.apart, gpu);
  const DeviceRun expected = run_case(pair.fused, cpu_backend());
  CHECK(fused.groups == pair.groups);
  CHECK(apart.groups == pair.groups + 2);
  check_close(pair.fused.name + ", fused", fused, expected);
  check_close(pair.fused.name + ", apart", apart, expected);
  check_close(pair.fused.name + ", apart against fused", apart, fused);  // of the limits of the two that round more
}

/// `record(plan, inputs, apart)` records both forms.
Pair make_pair(DeviceCase shared, std::size_t groups,
               const std::function<std::vector<Compared>(Plan&, const Ids&, bool)>& record) {
  Pair pair{shared, std::move(shared), groups};
  pair.fused.record = [record](Plan& plan, const Ids& in) { return record(plan, in, false); };
  pair.apart.record = [record](Plan& plan, const Ids& in) { return record(plan, in, true); };
  return pair;
}

Pair rope_pair(const AttentionShape& shape, std::int64_t sequences, std::int64_t width) {
  return make_pair({.name = fmt::format("linear + rope T {} D {} heads {}/{} C {}", shape.seq_len, shape.head_dim,
                                        shape.heads, shape.kv_heads, width),
                    .inputs = {bf16({sequences * shape.seq_len, width}), bf16({shape.columns(), width}),
                               f32({shape.seq_len, shape.head_dim}), i32(1)},
                    .record = {},
                    .prepare =
                        [](Inputs& in) {
                          fill_rope_table(in[2].view(), 10000);
                          in[3].span<std::int32_t>()[0] = 0;
                        }},
                   1, [=](Plan& plan, const Ids& in, bool apart) {
                     const ValueId qkv = plan.add1(std::make_shared<Linear>(), {in[0], in[1]}, "qkv");
                     if (apart) separate(plan, qkv);
                     plan.add(std::make_shared<Rope>(shape, Rope::Direction::forward), {qkv, in[2], in[3]}, "rope");
                     return std::vector<Compared>{{qkv, kTwoRoundings, {shape.key_column(0), shape.value_column(0)}}};
                   });
}

Pair swiglu_pair(std::int64_t n, std::int64_t width, std::int64_t ffn) {
  return make_pair({.name = fmt::format("linear + swiglu N {} C {} F {}", n, width, ffn),
                    .inputs = {bf16({n, width}), bf16({2 * ffn, width})},
                    .record = {}},
                   1, [=](Plan& plan, const Ids& in, bool apart) {
                     const ValueId gate_up = plan.add1(std::make_shared<Linear>(), in, "gate_up");
                     if (apart) separate(plan, gate_up);
                     const ValueId a = plan.add1(std::make_shared<SwiGlu>(), {gate_up}, "a");
                     return std::vector<Compared>{{gate_up, kOneRounding, {ffn}}, {a, kThreeRoundings}};
                   });
}

Pair swiglu_gradient_pair(std::int64_t n, std::int64_t width, std::int64_t ffn) {
  return make_pair({.name = fmt::format("linear_dx + swiglu_dx N {} C {} F {}", n, width, ffn),
                    .inputs = {bf16({n, width}), bf16({width, ffn}), bf16({n, 2 * ffn})},
                    .record = {},
                    .prepare =
                        [](Inputs& in) {
                          for (double& x : in[2].span<double>()) x *= 4;
                        }},
                   1, [=](Plan& plan, const Ids& in, bool apart) {
                     const ValueId da = plan.add1(std::make_shared<LinearInputGradient>(), {in[0], in[1]}, "da");
                     if (apart) separate(plan, da);
                     const ValueId dx = plan.add1(std::make_shared<SwiGluGradient>(), {in[2], da}, "dx");
                     return std::vector<Compared>{{dx, kTwoRoundings, {ffn}}};
                   });
}

Pair attention_pair(const AttentionShape& shape, std::int64_t sequences) {
  const std::int64_t n = sequences * shape.seq_len;
  return make_pair({.name = fmt::format("attention_dx + rope_dx T {} D {} heads {}/{}", shape.seq_len, shape.head_dim,
                                        shape.heads, shape.kv_heads),
                    .inputs = {bf16({n, shape.columns()}), bf16({n, shape.heads * shape.head_dim}),
                               f32({shape.seq_len, shape.head_dim}), i32(1)},
                    .record = {},
                    .prepare =
                        [](Inputs& in) {
                          for (double& x : in[0].span<double>()) x *= 2;
                          fill_rope_table(in[2].view(), 10000);
                          in[3].span<std::int32_t>()[0] = 0;
                        }},
                   2, [=](Plan& plan, const Ids& in, bool apart) {
                     const Ids out = plan.add(std::make_shared<Attention>(shape), {in[0]}, "o");
                     const ValueId dqkv =
                         plan.add1(std::make_shared<AttentionGradient>(shape), {in[0], out[0], out[1], in[1]}, "dqkv");
                     if (apart) separate(plan, dqkv);
                     plan.add(std::make_shared<Rope>(shape, Rope::Direction::inverse), {dqkv, in[2], in[3]}, "rope");
                     return std::vector<Compared>{{dqkv, 3.5 * 0x1p-9, {shape.key_column(0), shape.value_column(0)}}};
                   });
}

Pair add_norm_pair(std::int64_t n, std::int64_t width, std::int64_t inner) {
  return make_pair(
      {.name = fmt::format("linear + add_rms_norm N {} C {} of {}", n, width, inner),
       .inputs = {bf16({n, inner}), bf16({width, inner}), bf16({n, width}), {bf16({width}).spec, Role::parameter}},
       .record = {}},
      1, [=](Plan& plan, const Ids& in, bool apart) {
        const ValueId delta = plan.add1(std::make_shared<Linear>(), {in[0], in[1]}, "delta");
        if (apart) separate(plan, delta);
        const auto norm = std::make_shared<RmsNorm>(RmsNorm::Options{.eps = 1e-5, .residual = true});
        const Ids out = plan.add(norm, {in[2], in[3], delta}, "norm");
        return std::vector<Compared>{
            {out[0], kTwoRoundings}, {out[1], 0x1p-9}, {out[2], apart ? kTwoRoundings : kOneRounding}};
      });
}

TEST_CASE("a projection added to the residual stream and normalised, with one pass less over the activations",
          "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  check_pair(add_norm_pair(1, 64, 64), *gpu);
  check_pair(add_norm_pair(300, 512, 1376), *gpu);
  check_pair(add_norm_pair(515, 136, 256), *gpu);
  check_pair(add_norm_pair(64, 2048, 5504), *gpu);
  check_pair(add_norm_pair(77, 5120, 264), *gpu);
}

TEST_CASE("a projection with RoPE in one kernel", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  check_pair(rope_pair({.heads = 8, .kv_heads = 8, .head_dim = 64, .seq_len = 256}, 2, 512), *gpu);
  check_pair(rope_pair({.heads = 4, .kv_heads = 2, .head_dim = 32, .seq_len = 77}, 5, 136), *gpu);
  check_pair(rope_pair({.heads = 6, .kv_heads = 3, .head_dim = 128, .seq_len = 65}, 1, 768), *gpu);
  check_pair(rope_pair({.heads = 1, .kv_heads = 1, .head_dim = 64, .seq_len = 3}, 43, 2048), *gpu);
  check_pair(rope_pair({.heads = 16, .kv_heads = 4, .head_dim = 64, .seq_len = 300}, 7, 1024), *gpu);
}

TEST_CASE("a projection with SwiGLU in one kernel, and backward", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  struct Sizes {
    std::int64_t n, width, ffn;
  };
  for (const Sizes& s : {Sizes{1, 128, 8}, Sizes{129, 128, 352}, Sizes{300, 512, 1376}, Sizes{515, 136, 256},
                         Sizes{64, 2048, 5504}, Sizes{1000, 768, 2048}, Sizes{77, 1024, 2736}}) {
    check_pair(swiglu_pair(s.n, s.width, s.ffn), *gpu);
    check_pair(swiglu_gradient_pair(s.n, s.width, s.ffn), *gpu);
  }
}

TEST_CASE("attention's gradient with the inverse rotation in one kernel", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const std::int64_t dim : {32, 64, 128})
    for (const std::int64_t tokens : {65, 128, 300})
      check_pair(attention_pair({.heads = 4, .kv_heads = 2, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
  check_pair(attention_pair({.heads = 8, .kv_heads = 8, .head_dim = 64, .seq_len = 256}, 4), *gpu);
  for (const std::int64_t dim : {32, 64})
    for (const std::int64_t tokens : {65, 200})
      check_pair(attention_pair({.heads = 3, .kv_heads = 3, .head_dim = dim, .seq_len = tokens}, 3), *gpu);
}

TEST_CASE("no fused kernel depends on the order in which it takes the rows", "[gpu]") {
  const auto gpu = cuda::make_backend(0);
  for (const std::int64_t n : {1, 129, 515, 1000}) {  // tiles and pairs of them have 128 or 256 rows
    check_row_order(swiglu_pair(n, 136, 256).fused, *gpu);
    check_row_order(swiglu_pair(n, 512, 1376).fused, *gpu);
    check_row_order(swiglu_gradient_pair(n, 136, 256).fused, *gpu);
    check_row_order(swiglu_gradient_pair(n, 512, 1376).fused, *gpu);
  }
  check_row_order(rope_pair({.heads = 4, .kv_heads = 2, .head_dim = 32, .seq_len = 77}, 5, 136).fused, *gpu);
  check_row_order(rope_pair({.heads = 16, .kv_heads = 4, .head_dim = 64, .seq_len = 300}, 7, 1024).fused, *gpu);
  check_row_order(rope_pair({.heads = 6, .kv_heads = 3, .head_dim = 128, .seq_len = 65}, 1, 768).fused, *gpu);
  for (const std::int64_t dim : {32, 64, 128})
    check_row_order(attention_pair({.heads = 4, .kv_heads = 2, .head_dim = dim, .seq_len = 300}, 3).fused, *gpu);
  for (const std::int64_t dim : {32, 64})
    check_row_order(attention_pair({.heads = 3, .kv_heads = 3, .head_dim = dim, .seq_len = 200}, 3).fused, *gpu);
}

}  // namespace
}  // namespace kiln::test
