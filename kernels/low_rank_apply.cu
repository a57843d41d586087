#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

namespace kiln::cuda {
namespace {

constexpr int kPitch = kTile + 4;  // of the product in shared memory, in floats
constexpr std::size_t kProductBytes = kTile * kPitch * sizeof(float);

struct Apply {
  float inside;
  double back, outside, beta1, beta2, weight_decay;
  bool residual;
  std::uint64_t seed;
};

/// A = N - inside c phi R, [vector, r].
struct DirectionFetch {
  const LowRankMatrix& t;
  int first;
  float factor[kFetchesAStep];  // inside c phi of this thread's rows

  __device__ DirectionFetch(const LowRankMatrix& matrix, int first_vector, float scale)
      : t(matrix), first(first_vector) {
#pragma unroll
    for (int i = 0; i < kFetchesAStep; ++i) {
      const int vector = first + OperandTile<Contiguous::depth>::row(i);
      factor[i] = scale != 0 && vector < t.vectors() ? scale * t.phi[vector] : 0.0f;
    }
  }
  __device__ float4 operator()(int i, int row, int depth) const {
    if (first + row >= t.vectors() || depth >= t.rank) return make_float4(0, 0, 0, 0);
    const uint4 pairs =
        *reinterpret_cast<const uint4*>(t.projected + static_cast<std::int64_t>(first + row) * t.rank + depth);
    auto one = [&](std::uint32_t pair) {
      return __uint_as_float(pair << 16) - factor[i] * __uint_as_float(pair & 0xffff0000u);
    };
    return make_float4(one(pairs.x), one(pairs.y), one(pairs.z), one(pairs.w));
  }
};

/// W of one tile, from the product in shared memory; sixteen neighbours have one row.
__device__ void update_tile(const LowRankMatrix& t, const LowRankPiece& piece, const float* product, float back,
                            float outside, float keep, std::uint64_t seed) {
  const int thread = static_cast<int>(threadIdx.x), column = thread % 16 * 8;
  if (piece.column + column >= t.n) return;
  Float8 across;  // c phi outside of the columns, where they are the vectors
  if (outside != 0 && !t.right) {
#pragma unroll
    for (int j = 0; j < 8; ++j) across.v[j] = outside * t.phi[piece.column + column + j];
  }
  for (int row = thread / 16; row < kTile && piece.row + row < t.m; row += kTileThreads / 16) {
    const std::int64_t at = static_cast<std::int64_t>(piece.row + row) * t.n + piece.column + column;
    Master8 w(t.w, t.low, at);
    const float* sum = product + row * kPitch + column;
    Float8 change{};
    if (back != 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) change.v[j] = back * sum[j];
    }
    if (outside != 0) {
      const float factor = t.right ? outside * t.phi[piece.row + row] : 0;
      const float4 g0 = *reinterpret_cast<const float4*>(t.g + at), g1 = *reinterpret_cast<const float4*>(t.g + at + 4);
      const float g[8] = {g0.x, g0.y, g0.z, g0.w, g1.x, g1.y, g1.z, g1.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) change.v[j] += (t.right ? factor : across.v[j]) * g[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) w.value.v[j] = keep * (w.value.v[j] - change.v[j]);
    w.store(t.w, t.low, at, seed, t.stream);
  }
}

__global__ void __launch_bounds__(kTileThreads, 2)
    apply_all(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, Apply c) {
  extern __shared__ __align__(128) unsigned char memory[];
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const double step = scalars[static_cast<int>(Scalar::step)], lr = scalars[static_cast<int>(Scalar::lr)];
  const double rate = lr * sqrt(1.0 - pow(c.beta2, step)) / (1.0 - pow(c.beta1, step));
  const float factor = c.residual ? *t.factor : 0.0f;
  const float back = static_cast<float>(rate * c.back);
  const float outside = static_cast<float>(rate * c.outside * scalars[static_cast<int>(Scalar::clip_scale)]) * factor;
  float* product = reinterpret_cast<float*>(memory);
  if (back != 0) {
    TileProduct<Contiguous::depth, Contiguous::depth, false> tile;
    DirectionFetch a(t, t.right ? piece.row : piece.column, c.inside * factor);
    BasisFetch<Contiguous::depth> q(t.q, t.side(), t.rank, t.right ? piece.column : piece.row);
    if (t.right)
      tile.run(t.rank, reinterpret_cast<bf16*>(memory), a, q);
    else
      tile.run(t.rank, reinterpret_cast<bf16*>(memory), q, a);
    tile.visit([&](int row, int column, float x, float y) {
      *reinterpret_cast<float2*>(product + row * kPitch + column) = make_float2(x, y);
    });
    __syncthreads();
  }
  const float keep = t.decay ? static_cast<float>(1.0 - lr * c.weight_decay) : 1.0f;
  update_tile(t, piece, product, back, outside, keep, rounding_seed(c.seed, step));
}

}  // namespace

void low_rank_apply(const LowRankTable& table) {
  static_assert(TileProduct<Contiguous::depth, Contiguous::depth, false>::kSharedBytes <= kProductBytes);
  static const bool allowed [[maybe_unused]] = [] {
    check_cuda(cudaFuncSetAttribute(apply_all, cudaFuncAttributeMaxDynamicSharedMemorySize, kProductBytes),
               "cudaFuncSetAttribute");
    return true;
  }();
  const LowRankStep& s = table.step;
  const Apply c{.inside = static_cast<float>(s.inside),
                .back = s.back,
                .outside = s.outside,
                .beta1 = s.beta1,
                .beta2 = s.beta2,
                .weight_decay = s.weight_decay,
                .residual = s.residual,
                .seed = s.seed};
  launch({"low_rank_apply", static_cast<unsigned>(table.count), kTileThreads, table.stream, kProductBytes}, apply_all,
         table.matrices, table.pieces, table.scalars, c);
}

}  // namespace kiln::cuda
