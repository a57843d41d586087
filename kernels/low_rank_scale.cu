#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/split_master.cuh"
#include "kernels/vector.cuh"

/// W <- keep (W - outside c phi clip G), one factor phi a vector: APOLLO's update.
namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements of a group
constexpr int kGroups = kScaleGroups / kThreads;

/// Groups [piece.row, piece.row + kScaleGroups) of eight elements. What is far is loaded before anything is stored.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2)
    scale_all(const LowRankMatrix* matrices, const LowRankPiece* pieces, const double* scalars, std::uint64_t seed) {
  if (skipped(scalars)) return;
  const LowRankPiece piece = pieces[blockIdx.x];
  const LowRankMatrix& t = matrices[piece.matrix];
  const float outside = t.factor[1], keep = t.factor[2];
  const int across = t.n / kEach, end = min(piece.row + kScaleGroups, t.m * across);
  const bool right = t.right;
  const T* g = static_cast<const T*>(t.g);
  std::uint16_t *const w = t.w, *const low = t.low;
  const float* phi = t.phi;
  const std::uint64_t stream = t.stream, key = rounding_seed(seed, scalars[static_cast<int>(Scalar::step)]);
  Eight<T> gradient[kGroups];
  uint4 high[kGroups], rest[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = piece.row + i * kThreads + static_cast<int>(threadIdx.x);
    if (group >= end) break;
    const std::int64_t at = static_cast<std::int64_t>(group) * kEach;
    gradient[i].load(g + at);
    high[i] = *reinterpret_cast<const uint4*>(w + at);
    rest[i] = low == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(low + at);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = piece.row + i * kThreads + static_cast<int>(threadIdx.x);
    if (group >= end) break;
    const int row = group / across, column = (group - row * across) * kEach;
    Float8 of_vector;
    if (right) {
      const float one = phi[row];
#pragma unroll
      for (int j = 0; j < kEach; ++j) of_vector.v[j] = one;
    } else {
      of_vector = load_state(phi + column);
    }
    const Float8 step = gradient[i].values();
    Master8 x(high[i], rest[i]);
#pragma unroll
    for (int j = 0; j < kEach; ++j) x.value.v[j] = keep * (x.value.v[j] - outside * of_vector.v[j] * step.v[j]);
    x.store(w, low, static_cast<std::int64_t>(group) * kEach, key, stream);
  }
}

}  // namespace

void low_rank_scale(const LowRankTable& table) {
  launch({"low_rank_scale", static_cast<unsigned>(table.count), kThreads, table.stream},
         table.half_gradient ? scale_all<bf16> : scale_all<float>, table.matrices, table.pieces, table.scalars,
         table.step.seed);
}

}  // namespace kiln::cuda
