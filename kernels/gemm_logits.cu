#include "kernels/gemm_hopper.h"
#include "kernels/gemm_hopper_launch.cuh"

namespace kiln::cuda {
namespace {

using namespace gemm;

template <bool kStore>
struct LogitsEpilogue {
  static constexpr Weights kWeights = Weights::k_major;
  struct Args {
    CUtensorMap e;
    const float* shift;
    const int* targets;
    float* partial_sums;
    float* target_logits;
    int m, v_true;
  };
  template <class C>
  struct Worker {
    const Args& args;
    const Group& group;
    Staging<C> staging;
    __device__ Worker(const Args& a, const Group& g, const TileWalk<C>&) : args(a), group(g), staging(g) {}

    /// Row of fragment f whose sums are at 4 i + 2 half + {0, 1} of the accumulators.
    __device__ int row(Place place, int f, int half) const {
      return place.m + f * 64 + group.warp() * 16 + group.lane() / 4 + half * 8;
    }

    /// The one thread that holds a row's target column writes its logit.
    __device__ void write_targets(const float (&sums)[C::kFrags][C::kN / 2], Place place) const {
      const int first = place.tile_n * C::kN, lane_column = 2 * (group.lane() % 4);
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = row(place, f, half);
          const int target = m < args.m ? args.targets[m] : -1;
          const int column = target - first;
          const bool here = target >= 0 && target < args.v_true && column >= 0 && column < C::kN;
          if (!here || (column & 6) != lane_column) continue;
          float logit = 0;
#pragma unroll
          for (int i = 0; i < C::kN / 8; ++i)
            logit = select(column / 8 == i,
                           select(column & 1, sums[f][4 * i + 2 * half + 1], sums[f][4 * i + 2 * half]), logit);
          args.target_logits[m] = logit;
        }
    }

    /// exp(logit - shift) of the accumulators 4 i .. 4 i + 3, packed, and their contribution to the two rows' sums.
    template <bool kEdge>
    __device__ void exponentiate(const float* s, const float (&shift)[2], int column, float (&total)[2],
                                 std::uint32_t* packed) const {
      constexpr float kLargest = kLargestExponent * kLog2e;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float low = exp2_approx(fminf(fmaf(s[2 * half], kLog2e, -shift[half]), kLargest));
        float high = exp2_approx(fminf(fmaf(s[2 * half + 1], kLog2e, -shift[half]), kLargest));
        if (kEdge && column >= args.v_true) low = 0;
        if (kEdge && column + 1 >= args.v_true) high = 0;
        packed[half] = pack_bf16(low, high);
        total[half] += low_bf16(packed[half]) + high_bf16(packed[half]);
      }
    }

    template <bool kEdge>
    __device__ void write_tile(const float (&sums)[C::kFrags][C::kN / 2], Place place,
                               const float (&shift)[C::kFrags][2], float (&total)[C::kFrags][2]) {
      const int lane_column = place.tile_n * C::kN + 2 * (group.lane() % 4);
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int part = 0; part < C::kN / 64; ++part) {
          const std::uint32_t buffer = kStore ? staging.buffer() : 0;
#pragma unroll
          for (int block = 0; block < 4; ++block) {
            std::uint32_t packed[4];
            const int i = part * 8 + block * 2;
            exponentiate<kEdge>(&sums[f][4 * i], shift[f], lane_column + 8 * i, total[f], packed);
            exponentiate<kEdge>(&sums[f][4 * i + 4], shift[f], lane_column + 8 * i + 8, total[f], packed + 2);
            if constexpr (kStore) stage_block(buffer, block, group.lane(), packed);
          }
          if constexpr (kStore) staging.store(args.e, place.tile_n * C::kN + part * 64, place.m + f * 64);
        }
    }

    __device__ void finish(float (&sums)[C::kFrags][C::kN / 2], Place place) {
      float shift[C::kFrags][2], total[C::kFrags][2] = {};
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int m = row(place, f, half);
          shift[f][half] = m < args.m ? args.shift[m] * kLog2e : 0;
        }
      write_targets(sums, place);
      if ((place.tile_n + 1) * C::kN <= args.v_true)
        write_tile<false>(sums, place, shift, total);
      else
        write_tile<true>(sums, place, shift, total);
#pragma unroll
      for (int f = 0; f < C::kFrags; ++f)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float t = total[f][half];
          t += __shfl_xor_sync(0xffffffffu, t, 1);
          t += __shfl_xor_sync(0xffffffffu, t, 2);
          const int m = row(place, f, half);
          if (group.lane() % 4 == 0 && m < args.m)
            args.partial_sums[static_cast<std::size_t>(place.tile_n) * args.m + m] = t;
        }
    }
  };
};

template <class C, bool kStore>
void run(const GemmLogits& args, cudaStream_t stream) {
  Params<LogitsEpilogue<kStore>> p{};
  p.a = matrix_map(args.x, args.m, args.c, args.c, C::kM);
  p.b[0] = matrix_map(args.w, args.v, args.c, args.c, C::kN / 2);
  if (kStore) p.epilogue.e = matrix_map(args.e, args.m, args.v, args.v, 16);
  p.epilogue.shift = args.shift, p.epilogue.targets = args.targets;
  p.epilogue.partial_sums = args.partial_sums, p.epilogue.target_logits = args.target_logits;
  p.epilogue.m = args.m, p.epilogue.v_true = args.v_true;
  launch<C>(p, args.m, args.v, args.c, args.order, stream);
}

template <class C>
void run(const GemmLogits& args, cudaStream_t stream) {
  args.e == nullptr ? run<C, false>(args, stream) : run<C, true>(args, stream);
}

}  // namespace

bool gemm_logits_supported(int m, int c, int v) { return m > 0 && c > 0 && v > 0 && c % 8 == 0 && v % 8 == 0; }

int gemm_logits_parts(int v, int tile) {
  const int width = tile == 0 ? TurnsPair::kN : WidePairLag::kN;
  return (v + width - 1) / width;
}

void gemm_logits_exp(const GemmLogits& args, cudaStream_t stream) {
  check_supported(gemm_logits_supported(args.m, args.c, args.v), "gemm_logits_exp", args.m, args.v, args.c);
  switch (args.tile >= 0 ? args.tile : 2) {
    case 0:
      return run<TurnsPair>(args, stream);
    case 1:
      return run<Wide>(args, stream);
    default:
      return run<WidePairLag>(args, stream);
  }
}

}  // namespace kiln::cuda
