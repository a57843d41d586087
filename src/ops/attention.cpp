#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/parallel.h"
#include "ops/checks.h"
#include "ops/gemm.h"
#include "ops/simd.h"

namespace kiln {
namespace {

constexpr std::int64_t kQueryTile = 64;

void check_qkv(std::string_view op, const AttentionShape& shape, const TensorSpec& qkv) {
  expect_rank(op, "qkv", qkv, 2);
  expect_shape(op, "qkv", qkv, {qkv.shape[0], shape.columns()});
  check(shape.heads % shape.kv_heads == 0, "{}: {} query heads, expected a multiple of the {} key heads", op,
        shape.heads, shape.kv_heads);
  check(qkv.shape[0] % shape.seq_len == 0, "{}: {} rows, expected a multiple of the sequence length {}", op,
        qkv.shape[0], shape.seq_len);
}

/// Query-key pairs under the causal mask over all heads: T (T + 1) / 2 each.
double causal_pairs(const AttentionShape& shape, const TensorSpec& qkv) {
  const double t = static_cast<double>(shape.seq_len);
  return static_cast<double>(qkv.shape[0] / shape.seq_len * shape.heads) * t * (t + 1) / 2;
}

/// One tile of scores per thread.
std::size_t tile_bytes(std::int64_t keys, DType dtype) {
  return static_cast<std::size_t>(kQueryTile * keys) * size_of(dtype);
}

/// s <- e^(scale s - shift) over n scores; returns the sum.
template <typename T>
T exp_row(T* s, std::int64_t n, T scale, T shift) {
  simd::Vector<T> sum{};
  std::int64_t j = 0;
  for (; j + simd::kLanes<T> <= n; j += simd::kLanes<T>) {
    const simd::Vector<T> e = simd::exp<T>(simd::load(s + j) * scale - shift);
    simd::store<T>(s + j, e);
    sum += e;
  }
  T total = simd::reduce_sum<T>(sum);
  if (j < n) {
    const simd::Vector<T> e = simd::exp<T>(simd::load_partial(s + j, n - j, T(0)) * scale - shift);
    simd::store_partial<T>(s + j, n - j, e);
    for (std::int64_t i = 0; i < n - j; ++i) total += e[i];
  }
  return total;
}

template <typename T>
T row_max(const T* s, std::int64_t n) {
  simd::Vector<T> most = simd::broadcast(s[0]);
  std::int64_t j = 0;
  for (; j + simd::kLanes<T> <= n; j += simd::kLanes<T>) most = simd::max<T>(most, simd::load(s + j));
  T total = simd::reduce_max<T>(most);
  for (; j < n; ++j) total = std::max(total, s[j]);
  return total;
}

template <typename T>
T dot(const T* a, const T* b, std::int64_t n) {
  simd::Vector<T> sum{};
  std::int64_t j = 0;
  for (; j + simd::kLanes<T> <= n; j += simd::kLanes<T>) sum += simd::load(a + j) * simd::load(b + j);
  T total = simd::reduce_sum<T>(sum);
  for (; j < n; ++j) total += a[j] * b[j];
  return total;
}

/// One head of one sequence: queries, keys and values with their row strides.
template <typename T>
struct HeadView {
  const T *q, *k, *v;
  std::int64_t q_stride, kv_stride, dim;
  T scale;
};

/// Softmax rows of queries [first, first + rows) over keys [0, first + i], normalised, zero past the diagonal; `scores`
/// is [rows, keys]. Writes the log-sum-exp of each row with stride `lse_stride`, when asked.
template <typename T>
void attend_tile(const HeadView<T>& head, std::int64_t row0, std::int64_t first, std::int64_t rows, T* scores, T* out,
                 std::int64_t out_stride, T* lse, std::int64_t lse_stride) {
  const std::int64_t keys = first + rows;
  gemm_single<T>({.trans_b = Trans::yes,
                  .m = rows,
                  .n = keys,
                  .k = head.dim,
                  .a = head.q + row0 * head.q_stride,
                  .lda = head.q_stride,
                  .b = head.k,
                  .ldb = head.kv_stride,
                  .c = scores,
                  .ldc = keys});
  for (std::int64_t i = 0; i < rows; ++i) {
    T* s = scores + i * keys;
    const std::int64_t visible = first + i + 1;
    const T most = row_max(s, visible) * head.scale;
    const T sum = exp_row(s, visible, head.scale, most);
    const T inverse = T(1) / sum;
    for (std::int64_t j = 0; j < visible; ++j) s[j] *= inverse;
    std::fill(s + visible, s + keys, T(0));
    if (lse != nullptr) lse[i * lse_stride] = most + std::log(sum);
  }
  gemm_single<T>({.m = rows,
                  .n = head.dim,
                  .k = keys,
                  .a = scores,
                  .lda = keys,
                  .b = head.v,
                  .ldb = head.kv_stride,
                  .c = out,
                  .ldc = out_stride});
}

template <typename T>
T attention_scale(const AttentionShape& shape) {
  return static_cast<T>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
}

}  // namespace

std::vector<TensorSpec> Attention::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 1);
  expect_same_real(name(), in);
  check_qkv(name(), shape_, in[0]);
  const std::int64_t n = in[0].shape[0];
  return {{{n, shape_.heads * shape_.head_dim}, in[0].dtype}, {{n, shape_.heads}, accumulator_of(in[0].dtype)}};
}

void Attention::gradient(GradientContext& context) const {
  const std::vector<ValueId> inputs{context.in(0), context.out(0), context.out(1), context.grad_out(0)};
  context.set_grad_in(0, context.add(std::make_shared<AttentionGradient>(shape_), inputs, "attention.dx")[0]);
}

std::size_t Attention::workspace_bytes(std::span<const TensorSpec> in) const {
  return static_cast<std::size_t>(thread_count()) * tile_bytes(shape_.seq_len, in[0].dtype);
}

Cost Attention::cost(std::span<const TensorSpec> in) const {
  return {4.0 * static_cast<double>(shape_.head_dim) * causal_pairs(shape_, in[0]),
          2.0 * static_cast<double>(in[0].bytes())};
}

void Attention::run_cpu(const KernelArgs& args) const {
  const AttentionShape s = shape_;
  const std::int64_t sequences = args.in[0].shape()[0] / s.seq_len, stride = s.columns(), width = s.heads * s.head_dim;
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* qkv = args.in[0].as<T>();
    T* out = args.out[0].as<T>();
    T* lse = args.out[1].as<T>();
    const std::int64_t jobs = sequences * s.heads;
    // A range is one thread's share; its scratch is the slot of its first job.
    const std::int64_t slots = std::min<std::int64_t>(thread_count(), jobs);
    parallel_for(slots, 1, [&](std::int64_t first_slot, std::int64_t last_slot) {
      T* scores = static_cast<T*>(args.workspace.data) + first_slot * kQueryTile * s.seq_len;
      for (std::int64_t job = jobs * first_slot / slots; job < jobs * last_slot / slots; ++job) {
        const std::int64_t row = job / s.heads * s.seq_len, h = job % s.heads, kv = h / (s.heads / s.kv_heads);
        const T* base = qkv + row * stride;
        const HeadView<T> head{
            base + s.query_column(h), base + s.key_column(kv), base + s.value_column(kv), stride, stride, s.head_dim,
            attention_scale<T>(s)};
        for (std::int64_t q = 0; q < s.seq_len; q += kQueryTile)
          attend_tile(head, q, q, std::min(kQueryTile, s.seq_len - q), scores, out + (row + q) * width + h * s.head_dim,
                      width, lse + (row + q) * s.heads + h, s.heads);
      }
    });
  });
}

std::vector<TensorSpec> AttentionGradient::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 4);
  expect_same_real(name(), in.first(2));
  check_qkv(name(), shape_, in[0]);
  expect_shape(name(), "do", in[3], in[1].shape);
  return {in[0]};
}

std::size_t AttentionGradient::workspace_bytes(std::span<const TensorSpec> in) const {
  return 2 * static_cast<std::size_t>(thread_count()) * tile_bytes(shape_.seq_len, in[0].dtype);
}

Cost AttentionGradient::cost(std::span<const TensorSpec> in) const {
  // Five products against the forward's two: scores again, dP, dV, dQ, dK.
  return {10.0 * static_cast<double>(shape_.head_dim) * causal_pairs(shape_, in[0]),
          4.0 * static_cast<double>(in[0].bytes())};
}

namespace {

/// Gradients of one query tile of one head. `p` and `dp` are [rows, keys]. dq is written; dk and dv are added to, or
/// written for keys that no earlier tile has touched (the caller zeroes them).
template <typename T>
struct TileGradient {
  const HeadView<T>& head;
  std::int64_t first, rows;  // queries [first, first + rows)
  const T *out, *dout;       // of the tile's first row
  std::int64_t out_stride;
  const T* lse;
  std::int64_t lse_stride;
  T *dq, *dk, *dv;  // with the strides of q, k and v
  T *p, *dp;

  void run() const {
    const std::int64_t keys = first + rows, dim = head.dim;
    const T* q = head.q + first * head.q_stride;
    const GemmArgs<T> scores{.trans_b = Trans::yes,
                             .m = rows,
                             .n = keys,
                             .k = dim,
                             .a = q,
                             .lda = head.q_stride,
                             .b = head.k,
                             .ldb = head.kv_stride,
                             .c = p,
                             .ldc = keys};
    gemm_single<T>(scores);
    GemmArgs<T> upstream = scores;
    upstream.a = dout;
    upstream.lda = out_stride;
    upstream.b = head.v;
    upstream.c = dp;
    gemm_single<T>(upstream);
    for (std::int64_t i = 0; i < rows; ++i) softmax_gradient_row(i, keys);
    // dV += P' dO, dQ = dS K, dK += dS' Q
    gemm_single<T>({.trans_a = Trans::yes,
                    .m = keys,
                    .n = dim,
                    .k = rows,
                    .a = p,
                    .lda = keys,
                    .b = dout,
                    .ldb = out_stride,
                    .c = dv,
                    .ldc = head.kv_stride,
                    .beta = 1});
    gemm_single<T>({.m = rows,
                    .n = dim,
                    .k = keys,
                    .a = dp,
                    .lda = keys,
                    .b = head.k,
                    .ldb = head.kv_stride,
                    .c = dq,
                    .ldc = head.q_stride});
    gemm_single<T>({.trans_a = Trans::yes,
                    .m = keys,
                    .n = dim,
                    .k = rows,
                    .a = dp,
                    .lda = keys,
                    .b = q,
                    .ldb = head.q_stride,
                    .c = dk,
                    .ldc = head.kv_stride,
                    .beta = 1});
  }

  /// p <- softmax row, dp <- scale * p * (dp - <o, do>), both zero past the diagonal.
  void softmax_gradient_row(std::int64_t i, std::int64_t keys) const {
    const std::int64_t visible = first + i + 1;
    T *prow = p + i * keys, *drow = dp + i * keys;
    exp_row(prow, visible, head.scale, lse[i * lse_stride]);
    const T delta = dot(out + i * out_stride, dout + i * out_stride, head.dim), scale = head.scale;
    for (std::int64_t j = 0; j < visible; ++j) drow[j] = scale * prow[j] * (drow[j] - delta);
    std::fill(prow + visible, prow + keys, T(0));
    std::fill(drow + visible, drow + keys, T(0));
  }
};

}  // namespace

void AttentionGradient::run_cpu(const KernelArgs& args) const {
  const AttentionShape s = shape_;
  const std::int64_t sequences = args.in[0].shape()[0] / s.seq_len, stride = s.columns(), width = s.heads * s.head_dim;
  const std::int64_t group = s.heads / s.kv_heads;
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* qkv = args.in[0].as<T>();
    const T* out = args.in[1].as<T>();
    const T* lse = args.in[2].as<T>();
    const T* dout = args.in[3].as<T>();
    T* dqkv = args.out[0].as<T>();
    const std::int64_t jobs = sequences * s.kv_heads;
    const std::int64_t slots = std::min<std::int64_t>(thread_count(), jobs);
    parallel_for(slots, 1, [&](std::int64_t first_slot, std::int64_t last_slot) {
      T* scratch = static_cast<T*>(args.workspace.data) + 2 * first_slot * kQueryTile * s.seq_len;
      for (std::int64_t job = jobs * first_slot / slots; job < jobs * last_slot / slots; ++job) {
        const std::int64_t row = job / s.kv_heads * s.seq_len, kv = job % s.kv_heads;
        const T* base = qkv + row * stride;
        T* dbase = dqkv + row * stride;
        for (std::int64_t t = 0; t < s.seq_len; ++t) {
          std::fill_n(dbase + t * stride + s.key_column(kv), s.head_dim, T(0));
          std::fill_n(dbase + t * stride + s.value_column(kv), s.head_dim, T(0));
        }
        for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
          const HeadView<T> head{
              base + s.query_column(h), base + s.key_column(kv), base + s.value_column(kv), stride, stride, s.head_dim,
              attention_scale<T>(s)};
          for (std::int64_t q = 0; q < s.seq_len; q += kQueryTile) {
            const std::int64_t at = (row + q) * width + h * s.head_dim;
            TileGradient<T>{.head = head,
                            .first = q,
                            .rows = std::min(kQueryTile, s.seq_len - q),
                            .out = out + at,
                            .dout = dout + at,
                            .out_stride = width,
                            .lse = lse + (row + q) * s.heads + h,
                            .lse_stride = s.heads,
                            .dq = dbase + q * stride + s.query_column(h),
                            .dk = dbase + s.key_column(kv),
                            .dv = dbase + s.value_column(kv),
                            .p = scratch,
                            .dp = scratch + kQueryTile * s.seq_len}
                .run();
          }
        }
      }
    });
  });
}

std::vector<TensorSpec> CachedAttention::infer(std::span<const TensorSpec> in) const {
  expect_inputs(name(), in, 4);
  expect_same_real(name(), in.first(3));
  check_qkv(name(), shape_, in[0]);
  expect_shape(name(), "keys", in[1], {in[1].shape[0], shape_.kv_heads * shape_.head_dim});
  expect_shape(name(), "values", in[2], in[1].shape);
  expect_dtype(name(), "first", in[3], DType::i32);
  return {{{in[0].shape[0], shape_.heads * shape_.head_dim}, in[0].dtype}};
}

std::size_t CachedAttention::workspace_bytes(std::span<const TensorSpec> in) const {
  return static_cast<std::size_t>(thread_count()) * tile_bytes(in[1].shape[0], in[0].dtype);
}

void CachedAttention::run_cpu(const KernelArgs& args) const {
  const AttentionShape s = shape_;
  const std::int64_t n = args.in[0].shape()[0], first = *args.in[3].as<std::int32_t>();
  const std::int64_t capacity = args.in[1].shape()[0], stride = s.columns();
  const std::int64_t kv_width = s.kv_heads * s.head_dim, width = s.heads * s.head_dim;
  visit_real(args.in[0].dtype(), [&]<typename T>() {
    const T* qkv = args.in[0].as<T>();
    T* keys = args.in[1].as<T>();
    T* values = args.in[2].as<T>();
    for (std::int64_t i = 0; i < n; ++i) {
      std::copy_n(qkv + i * stride + s.key_column(0), kv_width, keys + (first + i) * kv_width);
      std::copy_n(qkv + i * stride + s.value_column(0), kv_width, values + (first + i) * kv_width);
    }
    const std::int64_t slots = std::min<std::int64_t>(thread_count(), s.heads);
    parallel_for(slots, 1, [&](std::int64_t first_slot, std::int64_t last_slot) {
      T* scores = static_cast<T*>(args.workspace.data) + first_slot * kQueryTile * capacity;
      for (std::int64_t h = s.heads * first_slot / slots; h < s.heads * last_slot / slots; ++h) {
        const std::int64_t kv = h / (s.heads / s.kv_heads);
        const HeadView<T> head{
            qkv + s.query_column(h), keys + kv * s.head_dim, values + kv * s.head_dim, stride, kv_width, s.head_dim,
            attention_scale<T>(s)};
        for (std::int64_t q = 0; q < n; q += kQueryTile)
          attend_tile<T>(head, q, first + q, std::min(kQueryTile, n - q), scores,
                         args.out[0].as<T>() + q * width + h * s.head_dim, width, nullptr, 0);
      }
    });
  });
}

}  // namespace kiln
