#include <algorithm>
#include <type_traits>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/low_rank.cuh"
#include "kernels/low_rank_panels.cuh"

/// R = clip G Q, G in f32 or bf16. The copy engine fills a ring with boxes of G and another with parts of Q's panels;
/// two warpgroups turn their rows of G into bf16 fragments, sum the squares on the way, and multiply from registers: G
/// is rounded nowhere but there, and read as often as there are tiles along the rank (256 wide). A stage of G is free
/// once it is fragments, one of Q only after its products: hence two rings.
///
/// At m n = 1.2e9 and r = 512 the products are 2.1 ms at 600 TFLOP/s, G is 1.6 ms of device memory, in bf16 0.8 ms, and
/// 16 bytes a parameter pass from L2 to the multiprocessors, in bf16 12: 3.5 ms, or 2.6 ms, at 5.5 TB/s.
namespace kiln::cuda {
namespace {

constexpr int kThreads = 384, kGroups = 2, kVectors = 64 * kGroups, kDepth = 64;
constexpr int kPartBytes = kDepth * kPanelColumns * 2;  // 64 of the depth, 64 of the rank
/// Columns of a box of G, whose elements are of type T: 128 bytes, by the vectors or the depth of a stage.
template <typename T>
constexpr int kBoxColumns = 128 / static_cast<int>(sizeof(T));

template <int kWidthValue, typename T>
struct Config {
  using Element = T;  // of G
  static constexpr int kWidth = kWidthValue;
  static constexpr int kLoads = kWidth / kPanelColumns, kBasisBytes = kLoads * kPartBytes;
  static constexpr int kGradientBytes = kVectors * kDepth * static_cast<int>(sizeof(T));
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBasisStages = kWidth == 256 ? (kHalf ? 4 : 3) : (kHalf ? 6 : 4);
  static constexpr int kGradientStages = (224 * 1024 - kBasisStages * kBasisBytes) / kGradientBytes;
  static constexpr int kBasis = kGradientStages * kGradientBytes, kBarriers = kBasis + kBasisStages * kBasisBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * (kGradientStages + kBasisStages) * 8;
};

/// Two rings in shared memory.
template <class C>
struct Rings {
  std::byte* memory;
  std::uint64_t *full_g, *empty_g, *full_q, *empty_q;
  RingIndex<C::kGradientStages> g;
  RingIndex<C::kBasisStages> q;

  __device__ explicit Rings(std::byte* shared) : memory(shared) {
    full_g = reinterpret_cast<std::uint64_t*>(memory + C::kBarriers);
    empty_g = full_g + C::kGradientStages;
    full_q = empty_g + C::kGradientStages;
    empty_q = full_q + C::kBasisStages;
  }
  __device__ void init() const {
    for (int i = 0; i < C::kGradientStages; ++i) barrier_init(&full_g[i], 1), barrier_init(&empty_g[i], 4 * kGroups);
    for (int i = 0; i < C::kBasisStages; ++i) barrier_init(&full_q[i], 1), barrier_init(&empty_q[i], 4 * kGroups);
    fence_barrier_init();
  }
  __device__ std::byte* gradient() const { return memory + g.stage * C::kGradientBytes; }
  __device__ std::byte* basis() const { return memory + C::kBasis + q.stage * C::kBasisBytes; }
};

__device__ int steps_of(const LowRankMatrix& t) { return (t.side() + kDepth - 1) / kDepth; }

/// A box is 128 bytes wide: 32 or 64 of the depth by 128 vectors, or so many vectors by 64 of the depth. The map counts
/// in units of 16 bits.
template <class C>
__device__ void load_gradient(const CUtensorMap* map, bool right, std::byte* stage, std::uint64_t* full, int vector,
                              int depth) {
  using T = typename C::Element;
  constexpr int kUnits = static_cast<int>(sizeof(T)) / 2, kColumns = kBoxColumns<T>;
  if (right) {
#pragma unroll
    for (int i = 0; i < kDepth / kColumns; ++i)
      tensor_load(stage + i * kVectors * 128, map, full, kUnits * (depth + kColumns * i), vector, 0);
  } else {
#pragma unroll
    for (int i = 0; i < kVectors / kColumns; ++i)
      tensor_load(stage + i * kDepth * 128, map, full, kUnits * (vector + kColumns * i), depth, 0);
  }
}

/// What a tile needs of the table is read once: in the loop each read would cost a trip to L2 under load.
template <class C>
__device__ void produce(const LowRankMatrix* matrices, const LowRankPiece* pieces, int count, Rings<C>& ring) {
  ring.g.parity = ring.q.parity = 1;
  for (int tile = static_cast<int>(blockIdx.x); tile < count; tile += static_cast<int>(gridDim.x)) {
    const LowRankPiece piece = pieces[tile];
    const LowRankMatrix& t = matrices[piece.matrix];
    const std::uint16_t* basis = t.basis;
    const int rank = t.rank, steps = steps_of(t), first_part = piece.column / kPanelColumns,
              parts = min(C::kLoads, panel_parts(rank) - first_part);
    const bool right = t.right;
    for (int step = 0; step < steps; ++step, ring.g.advance(), ring.q.advance()) {
      std::uint64_t *full_g = &ring.full_g[ring.g.stage], *full_q = &ring.full_q[ring.q.stage];
      barrier_wait(&ring.empty_g[ring.g.stage], ring.g.parity);
      barrier_expect(full_g, C::kGradientBytes);
      load_gradient<C>(&t.gradient, right, ring.gradient(), full_g, piece.row, step * kDepth);
      barrier_wait(&ring.empty_q[ring.q.stage], ring.q.parity);
      barrier_expect(full_q, static_cast<std::uint32_t>(parts * kPartBytes));
      for (int part = 0; part < parts; ++part)
        bulk_load(ring.basis() + part * kPartBytes, panel_part(basis, rank, step * kDepth, first_part + part),
                  kPartBytes, full_q);
    }
  }
}

/// This thread's part of a stage of G as A operands of four products of depth 16: rows row and row + 8, whose squares
/// it adds up. The depth of the right side is permuted as Q's rows are, so that a thread has eight of 32 that lie
/// together.
template <typename T, bool kRight>
__device__ void take_fragments(const std::byte* stage, int row, int lane, std::uint32_t (&f)[4][4],
                               float (&squares)[2]) requires std::is_same_v<T, float> {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 low, high;
      if constexpr (kRight) {
        const int v = row + 8 * h, chunk = (2 * (lane % 4) + k % 2) ^ (v & 7);
        const float4 x = *reinterpret_cast<const float4*>(stage + k / 2 * (kVectors * 128) + v * 128 + chunk * 16);
        low = make_float2(x.x, x.y);
        high = make_float2(x.z, x.w);
      } else {
        const int v = row + 8 * h;
        auto at = [&](int depth) {
          return *reinterpret_cast<const float*>(stage + v / 32 * (kDepth * 128) + depth * 128 +
                                                 ((v % 32 / 4) ^ (depth & 7)) * 16 + v % 4 * 4);
        };
        const int depth = 16 * k + 2 * (lane % 4);
        low = make_float2(at(depth), at(depth + 1));
        high = make_float2(at(depth + 8), at(depth + 9));
      }
      squares[h] += low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y;
      f[k][h] = pack2(low.x, low.y);
      f[k][2 + h] = pack2(high.x, high.y);
    }
}

/// The same of bf16. On the right side a thread reads its eights of both halves of the depth; rows of odd number read
/// them in the other order, without which neighbouring rows would meet in the same banks. On the left side ldmatrix
/// transposes.
template <typename T, bool kRight>
__device__ void take_fragments(const std::byte* stage, int row, int lane, std::uint32_t (&f)[4][4],
                               float (&squares)[2]) requires std::is_same_v<T, bf16> {
  if constexpr (kRight) {
    const int odd = row & 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int v = row + 8 * h;
      auto at = [&](int half) {
        return *reinterpret_cast<const uint4*>(stage + v * 128 + ((4 * half + lane % 4) ^ (v & 7)) * 16);
      };
      const uint4 first = at(odd), second = at(odd ^ 1), x = odd ? second : first, y = odd ? first : second;
      f[0][h] = x.x, f[0][2 + h] = x.y, f[1][h] = x.z, f[1][2 + h] = x.w;
      f[2][h] = y.x, f[2][2 + h] = y.y, f[3][h] = y.z, f[3][2 + h] = y.w;
    }
  } else {
    const int v = (row & ~15) + lane / 8 % 2 * 8, depth = lane % 8 + lane / 16 * 8;
    const std::uint32_t from =
        shared_address(stage) + v / 64 * (kDepth * 128) + depth * 128 + ((v % 64 / 8) ^ (depth & 7)) * 16;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f[k][0]), "=r"(f[k][1]), "=r"(f[k][2]), "=r"(f[k][3])
                   : "r"(from + 16 * k * 128)
                   : "memory");
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __uint_as_float(f[k][i] << 16), high = __uint_as_float(f[k][i] & 0xffff0000u);
      squares[i % 2] += low * low + high * high;
    }
}

/// Sums of one tile. Fragments of a stage are made while the products of the stage before run.
template <class C, bool kRight>
__device__ void sum_tile(int steps, Rings<C>& ring, int row, int lane, float (&sums)[C::kWidth / 2],
                         float (&squares)[2]) {
  int previous = -1;
  auto step = [&](std::uint32_t(&f)[4][4], bool first) {
    barrier_wait(&ring.full_g[ring.g.stage], ring.g.parity);
    take_fragments<typename C::Element, kRight>(ring.gradient(), row, lane, f, squares);
    __syncwarp();
    if (lane == 0) barrier_arrive(&ring.empty_g[ring.g.stage]);
    ring.g.advance();
    barrier_wait(&ring.full_q[ring.q.stage], ring.q.parity);
    wgmma_fence();
    fence_registers(f);
    const std::uint32_t b = shared_address(ring.basis());
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<C::kWidth, Major::mn>(sums, f[k], operand_descriptor<128>(b + k * 16 * 128, kPartBytes), !first || k > 0);
    wgmma_commit();
    if (previous >= 0) {
      wgmma_wait<1>();
      if (lane == 0) barrier_arrive(&ring.empty_q[previous]);
    }
    previous = ring.q.stage;
    ring.q.advance();
  };
  std::uint32_t even[4][4], odd[4][4];
  for (int s = 0; s < steps; s += 2) {
    step(even, s == 0);
    fence_registers(odd);
    if (s + 1 < steps) {
      step(odd, false);
      fence_registers(even);
    }
  }
  wgmma_wait<0>();
  fence_registers(even);
  fence_registers(odd);
  fence_registers(sums);
  if (lane == 0) barrier_arrive(&ring.empty_q[previous]);
}

template <int kWidth>
__device__ void store_tile(const LowRankMatrix& t, const LowRankPiece& piece, int row, int lane, float clip,
                           const float (&sums)[kWidth / 2], float (&squares)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 1);
    squares[h] += __shfl_xor_sync(0xffffffffu, squares[h], 2);
    const int vector = piece.row + row + 8 * h;
    if (vector >= t.vectors()) continue;
    if (piece.column == 0 && lane % 4 == 0) t.squares[vector] = clip * clip * squares[h];
    float* to = t.projected + static_cast<std::int64_t>(vector) * t.rank;
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
      const int column = piece.column + 8 * i + 2 * (lane % 4);
      if (column < t.rank)
        *reinterpret_cast<float2*>(to + column) =
            make_float2(clip * sums[4 * i + 2 * h], clip * sums[4 * i + 2 * h + 1]);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    project_all(const LowRankMatrix* matrices, const LowRankPiece* pieces, int count, const double* scalars) {
  extern __shared__ __align__(1024) std::byte memory[];
  if (skipped(scalars)) return;
  Rings<C> ring(memory);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x) / 128;
  if (group == kGroups) {
    registers_decrease<24>();
    if (threadIdx.x == 128 * kGroups) produce(matrices, pieces, count, ring);
  } else {
    registers_increase<240>();
    const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
    const float clip = static_cast<float>(scalars[static_cast<int>(Scalar::clip_scale)]);
    for (int tile = static_cast<int>(blockIdx.x); tile < count; tile += static_cast<int>(gridDim.x)) {
      const LowRankPiece piece = pieces[tile];
      const LowRankMatrix& t = matrices[piece.matrix];
      float sums[C::kWidth / 2], squares[2] = {0, 0};
      if (t.right)
        sum_tile<C, true>(steps_of(t), ring, row, lane, sums, squares);
      else
        sum_tile<C, false>(steps_of(t), ring, row, lane, sums, squares);
      store_tile<C::kWidth>(t, piece, row, lane, clip, sums, squares);
    }
  }
}

template <class C>
void launch_project(const LowRankTable& table) {
  static const bool allowed [[maybe_unused]] = [] {
    check_cuda(cudaFuncSetAttribute(project_all<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes),
               "cudaFuncSetAttribute");
    return true;
  }();
  launch({"low_rank_project", static_cast<unsigned>(std::min(table.count, table.multiprocessors)), kThreads,
          table.stream, C::kSharedBytes},
         project_all<C>, table.matrices, table.pieces, table.count, table.scalars);
}

}  // namespace

CUtensorMap low_rank_gradient_map(const LowRankMatrix& matrix, bool half) {
  const unsigned units = half ? 1 : 2;  // of 16 bits an element, which are copied as they are
  TensorMapSpec spec;
  spec.base = matrix.g;
  spec.sizes[0] = units * static_cast<std::uint64_t>(matrix.n);
  spec.sizes[1] = static_cast<std::uint64_t>(matrix.m);
  spec.stride_bytes[0] = 2 * spec.sizes[0];
  spec.stride_bytes[1] = spec.stride_bytes[0] * spec.sizes[1];
  spec.box[0] = 64;  // 128 bytes
  spec.box[1] = matrix.right ? kVectors : kDepth;
  return make_tensor_map(spec);
}

void low_rank_project(const LowRankTable& table) {
  const bool narrow = low_rank_project_width(table.rank) == 128;
  if (table.half_gradient)
    narrow ? launch_project<Config<128, bf16>>(table) : launch_project<Config<256, bf16>>(table);
  else
    narrow ? launch_project<Config<128, float>>(table) : launch_project<Config<256, float>>(table);
}

}  // namespace kiln::cuda
