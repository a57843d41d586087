#include "kernels/gemm_hopper.h"
#include "kernels/gemm_hopper_launch.cuh"

namespace kiln::cuda {
namespace {

using namespace gemm;

/// A tile multiplies by kN / 2 gate rows and the matching up rows, so that one thread holds both of a pair.
struct SwigluEpilogue {
  static constexpr Weights kWeights = Weights::pair;
  struct Args {
    CUtensorMap gate, up, a;
  };

  __device__ static float silu_times(float gate, float up) { return gate * sigmoid_approx(gate) * up; }
  __device__ static std::uint32_t activate(std::uint32_t gate, std::uint32_t up) {
    return pack_bf16(silu_times(low_bf16(gate), low_bf16(up)), silu_times(high_bf16(gate), high_bf16(up)));
  }

  template <class C>
  struct Worker {
    const Args& args;
    Staging<C> staging;
    __device__ Worker(const Args& a, const Group& g, const TileWalk<C>&) : args(a), staging(g) {}

    /// Stages and stores a warp's 16 rows of 64 columns; `value(i)` gives packed pair i of 16.
    template <Reuse kReuse, class Value>
    __device__ void store_part(const CUtensorMap& map, int column, int row, Value value) {
      const std::uint32_t buffer = staging.buffer();
#pragma unroll
      for (int block = 0; block < 4; ++block)
        stage_block(buffer, block, staging.group.lane(),
                    {value(4 * block), value(4 * block + 1), value(4 * block + 2), value(4 * block + 3)});
      staging.template store<kReuse>(map, column, row);
    }

    __device__ void finish(float (&sums)[C::kFrags][C::kN / 2], Place place) {
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int part = 0; part < C::kN / 128; ++part) {
          std::uint32_t gate[16], up[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const float* g = &sums[f][part * 32 + 2 * i];
            const float* u = g + C::kN / 4;
            gate[i] = pack_bf16(g[0], g[1]);
            up[i] = pack_bf16(u[0], u[1]);
          }
          const int column = place.tile_n * (C::kN / 2) + part * 64, row = place.m + f * 64;
          // Backward reads gate and up; the next GEMM reads their product.
          store_part<Reuse::late>(args.gate, column, row, [&](int i) { return gate[i]; });
          store_part<Reuse::late>(args.up, column, row, [&](int i) { return up[i]; });
          store_part<Reuse::soon>(args.a, column, row, [&](int i) { return activate(gate[i], up[i]); });
        }
    }
  };
};

template <class C>
void run(const GemmSwiglu& args, cudaStream_t stream) {
  const int m = args.m, c = args.c, f = args.f;
  Params<SwigluEpilogue> p{};
  p.a = matrix_map(args.x, m, c, c, C::kM);
  p.b[0] = matrix_map(args.w, f, c, c, C::kN / 2);
  p.b[1] = matrix_map(args.w + static_cast<std::size_t>(f) * c, f, c, c, C::kN / 2);
  p.epilogue.gate = matrix_map(args.gate_up, m, f, 2 * f, 16);
  p.epilogue.up = matrix_map(args.gate_up + f, m, f, 2 * f, 16);
  p.epilogue.a = matrix_map(args.a, m, f, f, 16);
  launch<C>(p, m, (f + C::kN / 2 - 1) / (C::kN / 2) * C::kN, c, args.order, stream);
}

}  // namespace

bool gemm_swiglu_supported(int m, int c, int f) { return m > 0 && c > 0 && f > 0 && c % 8 == 0 && f % 8 == 0; }

void gemm_swiglu(const GemmSwiglu& args, cudaStream_t stream) {
  check_supported(gemm_swiglu_supported(args.m, args.c, args.f), "gemm_swiglu", args.m, args.f, args.c);
  // Measured on an H100: up to C = 768 the epilogue outweighs what wide tiles save.
  const bool turns = args.c <= 768 || wide_tiles_leave_gaps(args.m, 2 * args.f);
  switch (args.tile >= 0 ? args.tile : turns ? 0 : 2) {
    case 0:
      return run<TurnsPair>(args, stream);
    case 1:
      return run<Wide>(args, stream);
    default:
      return run<WidePairLag>(args, stream);
  }
}

}  // namespace kiln::cuda
