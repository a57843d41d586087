#include "kernels/muon.h"

#include "graph/parameter.h"
#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/split_master.cuh"

namespace kiln::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;  // elements of a group
constexpr int kGroups = kMuonPiece / (kThreads * kEach);

struct Momentum {
  float mu;
  std::uint64_t seed;
};

/// The piece's eights that are this thread's: visit(i, first element, inside), i < kGroups. Of codes a thread past the
/// end goes along with its warp: it is not inside, and is given the first element.
template <typename State, typename F>
__device__ void each_group(const MuonMatrix& t, const MuonPiece& piece, F&& visit) {
  const std::int64_t first = static_cast<std::int64_t>(piece.index) * kMuonPiece + threadIdx.x * kEach;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const std::int64_t at = first + i * (kThreads * kEach);
    const bool inside = at < t.n;
    if (!StateAccess<State>::done(at, t.n)) visit(i, inside ? at : 0, inside);
  }
}

/// G and B of a piece on their way: what is far is loaded before anything waits for it.
template <typename G, typename State>
struct Loaded {
  Eight<G> gradient[kGroups];
  Eight<State> stored[kGroups];

  __device__ Loaded(const MuonMatrix& t, const MuonPiece& piece) {
    const StatePointer momentum = t.momentum;
    each_group<State>(t, piece, [&](int i, std::int64_t at, bool) {
      gradient[i].load(static_cast<const G*>(t.g) + at);
      stored[i] = StateAccess<State>::load(momentum, at);
    });
  }
  /// B of the next step in `b`; returns U.
  __device__ Float8 next(int i, const StateAccess<State>& access, float clip, float mu, Float8& b) const {
    const Float8 g = gradient[i].values();
    b = access.values(stored[i], StateValues::any);
    Float8 u;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float x = clip * g.v[k];
      b.v[k] = mu * b.v[k] + x;
      u.v[k] = x + mu * b.v[k];
    }
    return u;
  }
};

__device__ float clip_of(const double* scalars) {
  return static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
}

/// Blocks of squares_of on a multiprocessor, at least: f32 alone would take the registers of one of them.
template <typename G, typename State>
constexpr int kSquaresBlocks = sizeof(G) + sizeof(State) == 8 ? 4 : 1;

template <typename G, typename State>
__global__ void __launch_bounds__(kThreads, kSquaresBlocks<G, State>)
    squares_of(const MuonMatrix* matrices, const MuonPiece* pieces, const double* scalars, const CodeMaps* maps,
               Momentum c) {
  __shared__ double scratch[kThreads / 32];
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  if (skipped(scalars)) return;
  const StateAccess<State> access(maps, code_maps, kThreads);
  const MuonPiece piece = pieces[blockIdx.x];
  const MuonMatrix& t = matrices[piece.matrix];
  const float clip = clip_of(scalars);
  const Loaded<G, State> loaded(t, piece);
  double mine = 0;
  each_group<State>(t, piece, [&](int i, std::int64_t, bool inside) {
    if (!inside) return;
    Float8 b;
    const Float8 u = loaded.next(i, access, clip, c.mu, b);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) sum += u.v[k] * u.v[k];
    mine += static_cast<double>(sum);
  });
  const double total = block_sum(mine, scratch);
  if (threadIdx.x == 0) t.parts[piece.index] = total;
}

/// One block a matrix.
__global__ void __launch_bounds__(kThreads) finish_norm(const MuonMatrix* matrices, const double* scalars) {
  __shared__ double scratch[kThreads / 32];
  if (skipped(scalars)) return;
  const MuonMatrix& t = matrices[blockIdx.x];
  double mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < t.piece_count; i += kThreads) mine += t.parts[i];
  const double total = block_sum(mine, scratch);
  if (threadIdx.x == 0) *t.inverse = static_cast<float>(1.0 / (sqrt(total) + 1e-7));
}

template <typename G, typename State>
__global__ void __launch_bounds__(kThreads) momentum_of(const MuonMatrix* matrices, const MuonPiece* pieces,
                                                        const double* scalars, const CodeMaps* maps, Momentum c) {
  __shared__ float code_maps[StateAccess<State>::kSharedFloats];
  if (skipped(scalars)) return;
  const StateAccess<State> access(maps, code_maps, kThreads);
  const MuonPiece piece = pieces[blockIdx.x];
  const MuonMatrix& t = matrices[piece.matrix];
  const float clip = clip_of(scalars), inverse = *t.inverse;
  const std::uint64_t key = rounding_seed(c.seed, scalars[static_cast<int>(Scalar::step)]);
  const Loaded<G, State> loaded(t, piece);
  each_group<State>(t, piece, [&](int i, std::int64_t at, bool inside) {
    Float8 b, u = loaded.next(i, access, clip, c.mu, b);
#pragma unroll
    for (int k = 0; k < kEach; ++k) u.v[k] *= inverse;
    access.store(t.momentum, at, b, StateValues::any, key, inside);
    if (inside) *reinterpret_cast<uint4*>(t.start + at) = pack(u).bits;
  });
}

__global__ void __launch_bounds__(kThreads) apply_all(const MuonMatrix* matrices, const MuonPiece* pieces,
                                                      const double* scalars, double weight_decay, std::uint64_t seed) {
  if (skipped(scalars)) return;
  const MuonPiece piece = pieces[blockIdx.x];
  const MuonMatrix& t = matrices[piece.matrix];
  const double lr = scalars[static_cast<int>(Scalar::lr)];
  const float rate = static_cast<float>(lr * t.scale);
  const float keep = t.decay ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  const std::uint64_t key = rounding_seed(seed, scalars[static_cast<int>(Scalar::step)]), stream = t.stream;
  std::uint16_t *const w = t.w, *const low = t.low;
  uint4 step[kGroups], high[kGroups], rest[kGroups];
  each_group<float>(t, piece, [&](int i, std::int64_t at, bool) {
    step[i] = *reinterpret_cast<const uint4*>(t.result + at);
    high[i] = *reinterpret_cast<const uint4*>(w + at);
    rest[i] = low == nullptr ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4*>(low + at);
  });
  each_group<float>(t, piece, [&](int i, std::int64_t at, bool) {
    const Float8 x = unpack({step[i]});
    Master8 master(high[i], rest[i]);
#pragma unroll
    for (int k = 0; k < kEach; ++k) master.value.v[k] = keep * master.value.v[k] - rate * x.v[k];
    master.store(w, low, at, key, stream);
  });
}

template <typename G, typename State>
void launch_on_gradient(const MuonTable& t, bool norm) {
  launch({norm ? "muon_norm" : "muon_momentum", static_cast<unsigned>(t.count), kThreads, t.stream},
         norm ? squares_of<G, State> : momentum_of<G, State>, t.matrices, t.pieces, t.scalars, t.maps,
         Momentum{static_cast<float>(t.momentum), t.seed});
}
void launch_on_gradient(const MuonTable& t, bool norm) {
  auto launch_for = [&]<typename G>() {
    of_states(t.states, launch_on_gradient<G, float>, launch_on_gradient<G, bf16>, launch_on_gradient<G, std::uint8_t>)(
        t, norm);
  };
  t.half_gradient ? launch_for.operator()<bf16>() : launch_for.operator()<float>();
}

}  // namespace

void muon_norm(const MuonTable& table, int matrices) {
  launch_on_gradient(table, true);
  launch({"muon_norm", static_cast<unsigned>(matrices), kThreads, table.stream}, finish_norm, table.matrices,
         table.scalars);
}

void muon_momentum(const MuonTable& table) { launch_on_gradient(table, false); }

void muon_apply(const MuonTable& table) {
  launch({"muon_apply", static_cast<unsigned>(table.count), kThreads, table.stream}, apply_all, table.matrices,
         table.pieces, table.scalars, table.weight_decay, table.seed);
}

}  // namespace kiln::cuda
