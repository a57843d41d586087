#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/hopper.cuh"
#include "kernels/low_rank.cuh"

/// Matrix products of f32 or bf16 matrices of either order, fetched four elements at a time and rounded on the way:
/// those of a refresh, whose operands are used once.
namespace kiln::cuda {

inline constexpr int kTileThreads = 256, kTile = 128, kTileDepth = 32;
inline constexpr int kFetchesAStep = kTile * kTileDepth / 4 / kTileThreads;  // by one thread, of one operand and step

/// Where an operand's elements lie next to each other: along the depth that is summed over, or along its rows.
enum class Contiguous { depth, rows };

/// A 128 x 32 piece of one operand in shared memory, laid out so that ldmatrix has no bank conflicts.
template <Contiguous kOrder>
struct OperandTile {
  static constexpr bool kAlongDepth = kOrder == Contiguous::depth;
  static constexpr int kPitch = (kAlongDepth ? kTileDepth : kTile) + 8;
  static constexpr int kElements = (kAlongDepth ? kTile : kTileDepth) * kPitch;

  /// Row and depth of the first of the four elements that this thread's fetch `i` takes.
  __device__ static int row(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return kAlongDepth ? t / 8 + 32 * i : t % 32 * 4;
  }
  __device__ static int depth(int i) {
    const int t = static_cast<int>(threadIdx.x);
    return kAlongDepth ? t % 8 * 4 : t / 32 + 8 * i;
  }
  __device__ static bf16* at(bf16* tile, int row, int depth) {
    return tile + (kAlongDepth ? row * kPitch + depth : depth * kPitch + row);
  }
  /// Fragments of 16 rows x 16 depth as mma's A operand.
  __device__ static void load_a(std::uint32_t (&f)[4], bf16* tile, int row, int depth) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kAlongDepth)
      load(f, at(tile, row + lane % 16, depth + lane / 16 * 8));
    else
      load(f, at(tile, row + lane / 8 % 2 * 8, depth + lane % 8 + lane / 16 * 8));
  }
  /// The same as two neighbouring B operands of 8 columns.
  __device__ static void load_b(std::uint32_t (&f)[4], bf16* tile, int row, int depth) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kAlongDepth)
      load(f, at(tile, row + lane % 8 + lane / 16 * 8, depth + lane / 8 % 2 * 8));
    else
      load(f, at(tile, row + lane / 16 * 8, depth + lane % 16));
  }

 private:
  __device__ static void load(std::uint32_t (&f)[4], const bf16* p) {
    if constexpr (kAlongDepth)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                   : "r"(shared_address(p)));
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                   : "r"(shared_address(p)));
  }
};

__device__ inline void mma(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// A row-major matrix of f32 or bf16 as an operand: its columns are the operand's rows (kOrder rows), or its rows are,
/// read along the depth.
template <Contiguous kOrder, typename T = float>
struct MatrixFetch {
  const T* data;
  int outer, inner, first;  // sizes of the matrix; first row of the operand

  __device__ MatrixFetch(const T* matrix, int rows, int columns, int first_row)
      : data(matrix), outer(rows), inner(columns), first(first_row) {}
  __device__ float4 operator()(int row, int depth) const {
    const int major = kOrder == Contiguous::rows ? depth : first + row;
    const int minor = kOrder == Contiguous::rows ? first + row : depth;
    if (major >= outer || minor >= inner) return make_float4(0, 0, 0, 0);
    return load4(data + static_cast<std::int64_t>(major) * inner + minor);
  }
};

/// C [128, 128] = A [128, depth] B [128, depth]', by a block of 256 threads: eight warps of 32 x 64.
///
/// kSplit  every operand is the sum of two bf16, and three products give nearly the precision of f32; otherwise the
///         operands are rounded to bf16
template <Contiguous kOrderA, Contiguous kOrderB, bool kSplit>
struct TileProduct {
  using A = OperandTile<kOrderA>;
  using B = OperandTile<kOrderB>;
  static constexpr int kParts = kSplit ? 2 : 1;
  static constexpr int kStage = kParts * (A::kElements + B::kElements);  // elements
  static constexpr std::size_t kSharedBytes = 2 * kStage * sizeof(bf16);

  float sum[2][8][4] = {};

  /// Sums over [from, to) of the depth, `from` a multiple of kTileDepth and `to` too, or the end. `a` and `b` are
  /// called as (row, depth) and return four elements; they give zeros outside their matrix. Ends with a barrier, after
  /// which `shared` is free.
  template <typename FetchA, typename FetchB>
  __device__ void run(int from, int to, bf16* shared, const FetchA& a, const FetchB& b) {
    float4 from_a[kFetchesAStep], from_b[kFetchesAStep];
    auto fetch = [&](int first) {
#pragma unroll
      for (int i = 0; i < kFetchesAStep; ++i) {
        from_a[i] = a(A::row(i), first + A::depth(i));
        from_b[i] = b(B::row(i), first + B::depth(i));
      }
    };
    auto stage = [&](int which) { return shared + which * kStage; };
    auto put = [&](int which) {
      bf16* to = stage(which);
#pragma unroll
      for (int i = 0; i < kFetchesAStep; ++i) {
        store(A::at(to, A::row(i), A::depth(i)), A::kElements, from_a[i]);
        store(B::at(to + kParts * A::kElements, B::row(i), B::depth(i)), B::kElements, from_b[i]);
      }
    };
    if (from < to) {
      fetch(from);
      put(0);
    }
    __syncthreads();
    for (int first = from, which = 0; first < to; first += kTileDepth, which ^= 1) {
      const bool more = first + kTileDepth < to;
      if (more) fetch(first + kTileDepth);
      multiply(stage(which), stage(which) + kParts * A::kElements);
      if (more) put(which ^ 1);
      __syncthreads();
    }
  }

  /// Calls visit(row, column, value, value of the next column) for each pair of sums that this thread has.
  template <typename F>
  __device__ void visit(F&& f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = warp_row() + 16 * i + lane / 4, column = warp_column() + 8 * j + lane % 4 * 2;
        f(row, column, sum[i][j][0], sum[i][j][1]);
        f(row + 8, column, sum[i][j][2], sum[i][j][3]);
      }
  }

 private:
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / 64 * 32; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / 32 % 2 * 64; }

  __device__ static void store(bf16* to, int part, float4 x) {
    const uint2 high = make_uint2(pack2(x.x, x.y), pack2(x.z, x.w));
    *reinterpret_cast<uint2*>(to) = high;
    if constexpr (kSplit) {
      auto rest = [](float value, std::uint32_t bits) { return value - __uint_as_float(bits); };
      *reinterpret_cast<uint2*>(to + part) =
          make_uint2(pack2(rest(x.x, high.x << 16), rest(x.y, high.x & 0xffff0000u)),
                     pack2(rest(x.z, high.y << 16), rest(x.w, high.y & 0xffff0000u)));
    }
  }

  __device__ void multiply(bf16* a, bf16* b) {
#pragma unroll
    for (int depth = 0; depth < kTileDepth; depth += 16) {
      std::uint32_t high[2][4], low[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        A::load_a(high[i], a, warp_row() + 16 * i, depth);
        if constexpr (kSplit) A::load_a(low[i], a + A::kElements, warp_row() + 16 * i, depth);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t f[4];
        B::load_b(f, b, warp_column() + 16 * j, depth);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma(sum[i][2 * j], high[i], f[0], f[1]);
          mma(sum[i][2 * j + 1], high[i], f[2], f[3]);
          if constexpr (kSplit) {
            mma(sum[i][2 * j], low[i], f[0], f[1]);
            mma(sum[i][2 * j + 1], low[i], f[2], f[3]);
          }
        }
        if constexpr (kSplit) {
          B::load_b(f, b + B::kElements, warp_column() + 16 * j, depth);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma(sum[i][2 * j], high[i], f[0], f[1]);
            mma(sum[i][2 * j + 1], high[i], f[2], f[3]);
          }
        }
      }
    }
  }
};

}  // namespace kiln::cuda
