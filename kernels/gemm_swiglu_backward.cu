#include "kernels/gemm_hopper.h"
#include "kernels/gemm_hopper_launch.cuh"

namespace kiln::cuda {
namespace {

using namespace gemm;

/// Works in place: each warp owns a ring of buffers that hold 16x64 of gate and, behind it, of up. The copy engine
/// fills a buffer while the products run, the warp turns it into the gradients, the copy engine stores it.
struct SwigluBackwardEpilogue {
  static constexpr Weights kWeights = Weights::n_major;
  static constexpr int kHalfBytes = 16 * 64 * 2, kBytes = 2 * kHalfBytes;
  struct Args {
    CUtensorMap gate, up, dgate, dup;
  };

  template <class C>
  struct Worker {
    static constexpr int kColumns = C::kN / 64, kParts = C::kFrags * kColumns;
    static constexpr int kCount = C::kSlots;
    static_assert(C::kSlotBytes == 4 * kBytes && kCount <= kParts && kCount >= 2);
    const Args& args;
    const Group& group;
    std::byte* buffers;
    std::uint64_t* filled;
    RingIndex<kCount> ring;
    // Lane 0 alone: the place, part and buffer that the next load is for.
    TileWalk<C> ahead;
    Place ahead_place;
    int ahead_part = 0, ahead_slot = 0;
    bool stored_before = false;

    __device__ Worker(const Args& a, const Group& g, const TileWalk<C>& walk)
        : args(a),
          group(g),
          buffers(g.slots + g.warp() * kCount * kBytes),
          filled(g.slot_barriers + g.warp() * kCount),
          ahead(walk),
          ahead_place(walk.place()) {
      if (group.lane() == 0)
        for (int s = 0; s < kCount; ++s) load_next();
    }

    __device__ int column(Place place, int part) const { return place.tile_n * C::kN + part % kColumns * 64; }
    __device__ int row(Place place, int part) const { return place.m + part / kColumns * 64 + group.warp() * 16; }

    __device__ void load_next() {
      if (ahead.done()) return;
      std::byte* to = buffers + ahead_slot * kBytes;
      const int x = column(ahead_place, ahead_part), y = row(ahead_place, ahead_part);
      barrier_expect(&filled[ahead_slot], kBytes);
      tensor_load(to, &args.gate, &filled[ahead_slot], x, y, 0);
      tensor_load(to + kHalfBytes, &args.up, &filled[ahead_slot], x, y, 0);
      ahead_slot = ahead_slot + 1 == kCount ? 0 : ahead_slot + 1;
      if (++ahead_part == kParts) {
        ahead_part = 0;
        ahead.next();
        ahead_place = ahead.place();
      }
    }

    /// Packed pairs of gate and up become their gradients.
    __device__ static void differentiate(std::uint32_t& gate, std::uint32_t& up, const float* da) {
      const float g0 = low_bf16(gate), g1 = high_bf16(gate), u0 = low_bf16(up), u1 = high_bf16(up);
      const float s0 = sigmoid_approx(g0), s1 = sigmoid_approx(g1);
      const float d0 = da[0] * s0, d1 = da[1] * s1;
      gate = pack_bf16(d0 * u0 * (1.f + g0 * (1.f - s0)), d1 * u1 * (1.f + g1 * (1.f - s1)));
      up = pack_bf16(d0 * g0, d1 * g1);
    }

    __device__ void finish(float (&sums)[C::kFrags][C::kN / 2], Place place) {
      const int lane = group.lane();
#pragma unroll
      for (int part = 0; part < kParts; ++part, ring.advance()) {
        std::byte* const buffer = buffers + ring.stage * kBytes;
        const std::uint32_t gates = shared_address(buffer), ups = gates + kHalfBytes;
        barrier_wait(&filled[ring.stage], ring.parity);
        std::uint32_t gate[4][4], up[4][4];  // all are read before the first is overwritten, by whichever lane
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          load_matrix_x4(gate[block], block_address(gates, block, lane));
          load_matrix_x4(up[block], block_address(ups, block, lane));
        }
        __syncwarp();
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const float* s = &sums[part / kColumns][part % kColumns * 32 + block * 8];
#pragma unroll
          for (int i = 0; i < 4; ++i) differentiate(gate[block][i], up[block][i], s + 2 * i);
          stage_block(gates, block, lane, gate[block]);
          stage_block(ups, block, lane, up[block]);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) store_part(buffer, column(place, part), row(place, part));
      }
    }

    /// Stores this part; then the buffer of the part before, read by now, takes the next load.
    __device__ void store_part(const std::byte* buffer, int x, int y) {
      tensor_store(&args.dgate, buffer, x, y, 0);
      tensor_store(&args.dup, buffer + kHalfBytes, x, y, 0);
      store_commit();
      if (stored_before) {
        store_wait_read<1>();
        load_next();
      }
      stored_before = true;
    }
  };
};

template <class C>
void run(const GemmSwigluBackward& args, cudaStream_t stream) {
  const int m = args.m, c = args.c, f = args.f;
  Params<SwigluBackwardEpilogue> p{};
  p.a = matrix_map(args.dy, m, c, c, C::kM);
  p.b[0] = matrix_map(args.w, c, f, f, kDepth);
  p.epilogue.gate = matrix_map(args.gate_up, m, f, 2 * f, 16);
  p.epilogue.up = matrix_map(args.gate_up + f, m, f, 2 * f, 16);
  p.epilogue.dgate = matrix_map(args.dgate_up, m, f, 2 * f, 16);
  p.epilogue.dup = matrix_map(args.dgate_up + f, m, f, 2 * f, 16);
  launch<C>(p, m, f, c, args.order, stream);
}

}  // namespace

bool gemm_swiglu_backward_supported(int m, int c, int f) { return gemm_swiglu_supported(m, c, f); }

void gemm_swiglu_backward(const GemmSwigluBackward& args, cudaStream_t stream) {
  check_supported(gemm_swiglu_backward_supported(args.m, args.c, args.f), "gemm_swiglu_backward", args.m, args.f,
                  args.c);
  // Measured on an H100: up to C = 1024 turns, which overlap loads and products better, are 12 % faster.
  const bool turns = args.c <= 1024 || wide_tiles_leave_gaps(args.m, args.f);
  switch (args.tile >= 0 ? args.tile : turns ? 0 : 2) {
    case 0:
      return run<Config<2, 128, Schedule::turns, 2, 4, 3>>(args, stream);
    case 1:
      return run<Config<2, 128, Schedule::turns, 1, 4, 3>>(args, stream);
    default:
      return run<Config<1, 256, Schedule::shared, 2, 3, 2, 0, 128>>(args, stream);
  }
}

}  // namespace kiln::cuda
