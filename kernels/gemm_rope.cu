#include "kernels/gemm_hopper.h"
#include "kernels/gemm_hopper_launch.cuh"

namespace kiln::cuda {
namespace {

using namespace gemm;

template <int kHeadSize>
struct RopeEpilogue {
  static constexpr Weights kWeights = Weights::k_major;
  struct Args {
    CUtensorMap qkv;
    const float* table;
    int tokens, rotated_columns;
  };
  template <class C>
  struct Worker {
    static_assert(C::kN % kHeadSize == 0, "a tile holds whole heads");
    const Args& args;
    Staging<C> staging;
    __device__ Worker(const Args& a, const Group& g, const TileWalk<C>&) : args(a), staging(g) {}

    /// Rotates the tile's first `heads` heads. In the accumulator layout both elements of a pair are in one thread.
    __device__ void rotate(float (&sums)[C::kFrags][C::kN / 2], int m, int heads) const {
      constexpr int kHalf = kHeadSize / 2;
      const int lane = staging.group.lane();
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = (m + f * 64 + staging.group.warp() * 16 + lane / 4 + half * 8) % args.tokens;
          const float* row = args.table + static_cast<std::size_t>(position) * kHeadSize + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < kHalf / 8; ++i) {
            const float2 cos = *reinterpret_cast<const float2*>(row + 8 * i);
            const float2 sin = *reinterpret_cast<const float2*>(row + kHalf + 8 * i);
#pragma unroll
            for (int head = 0; head < C::kN / kHeadSize; ++head) {
              float* a = &sums[f][(head * kHeadSize + 8 * i) / 2 + 2 * half];
              float* b = a + kHalf / 2;
              const float a0 = a[0], a1 = a[1], b0 = b[0], b1 = b[1];
              const bool on = head < heads;
              a[0] = on ? a0 * cos.x - b0 * sin.x : a0;
              a[1] = on ? a1 * cos.y - b1 * sin.y : a1;
              b[0] = on ? b0 * cos.x + a0 * sin.x : b0;
              b[1] = on ? b1 * cos.y + a1 * sin.y : b1;
            }
          }
        }
    }

    __device__ void finish(float (&sums)[C::kFrags][C::kN / 2], Place place) {
      const int column = place.tile_n * C::kN;
      const int heads = (args.rotated_columns - column) / kHeadSize;
      if (heads > 0) rotate(sums, place.m, heads);
      store_tile<C>(sums, staging, args.qkv, column, place.m);
    }
  };
};

template <class C, int kHeadSize>
void run(const GemmRope& args, cudaStream_t stream) {
  Params<RopeEpilogue<kHeadSize>> p{};
  p.a = matrix_map(args.x, args.m, args.c, args.c, C::kM);
  p.b[0] = matrix_map(args.w, args.n, args.c, args.c, C::kN / 2);
  p.epilogue.qkv = matrix_map(args.qkv, args.m, args.n, args.n, 16);
  p.epilogue.table = args.table;
  p.epilogue.tokens = args.tokens;
  p.epilogue.rotated_columns = args.rotated_heads * kHeadSize;
  launch<C>(p, args.m, args.n, args.c, args.order, stream);
}

template <class C>
void run(const GemmRope& args, cudaStream_t stream) {
  switch (args.head_size) {
    case 32:
      return run<C, 32>(args, stream);
    case 64:
      return run<C, 64>(args, stream);
    default:
      return run<C, 128>(args, stream);
  }
}

}  // namespace

bool gemm_rope_supported(int m, int n, int c, int head_size) {
  return m > 0 && n > 0 && c > 0 && c % 8 == 0 && (head_size == 32 || head_size == 64 || head_size == 128) &&
         n % head_size == 0;
}

void gemm_rope(const GemmRope& args, cudaStream_t stream) {
  const bool rows = args.tokens > 0 && args.rotated_heads >= 0 && args.rotated_heads * args.head_size <= args.n;
  check_supported(rows && gemm_rope_supported(args.m, args.n, args.c, args.head_size), "gemm_rope", args.m, args.n,
                  args.c);
  switch (args.tile >= 0 ? args.tile : wide_tiles_leave_gaps(args.m, args.n) ? 0 : 2) {
    case 0:
      return run<TurnsPair>(args, stream);
    case 1:
      return run<Wide>(args, stream);
    default:
      return run<WidePair>(args, stream);
  }
}

}  // namespace kiln::cuda
