#include "kernels/gemm_hopper.h"
#include "kernels/gemm_hopper_launch.cuh"

namespace kiln::cuda {
namespace {

using namespace gemm;

struct PlainEpilogue {
  static constexpr Weights kWeights = Weights::k_major;
  struct Args {
    CUtensorMap y;
  };
  template <class C>
  struct Worker {
    const Args& args;
    Staging<C> staging;
    __device__ Worker(const Args& a, const Group& g, const TileWalk<C>&) : args(a), staging(g) {}

    __device__ void finish(float (&sums)[C::kFrags][C::kN / 2], Place place) {
      store_tile<C>(sums, staging, args.y, place.tile_n * C::kN, place.m);
    }
  };
};

template <class C>
void run(const GemmPlain& args, cudaStream_t stream) {
  Params<PlainEpilogue> p{};
  p.a = matrix_map(args.x, args.m, args.k, args.k, C::kM);
  p.b[0] = matrix_map(args.w, args.n, args.k, args.k, C::kN / 2);
  p.epilogue.y = matrix_map(args.y, args.m, args.n, args.n, 16);
  launch<C>(p, args.m, args.n, args.k, stream);
}

}  // namespace

bool gemm_plain_supported(int m, int n, int k) { return m > 0 && n > 0 && k > 0 && n % 8 == 0 && k % 8 == 0; }

void gemm_plain(const GemmPlain& args, cudaStream_t stream) {
  check_supported(gemm_plain_supported(args.m, args.n, args.k), "gemm_plain", args.m, args.n, args.k);
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
