#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "kernels/state_pointer.h"

/// GaLore, Fira, Fira+ and APOLLO on the GPU (APOLLO-Mini: low_rank_one.h): all matrices of a plan in a handful of
/// launches, whatever their number.
///
/// The long side of W [m,n] counts vectors (rows where m >= n, else columns), the short side is projected: with the
/// basis Q [short, r], R = clip G Q for every vector, N = m / (sqrt(v) + eps) and phi = ||N|| / (||R|| + 1e-8), one
/// step is W <- keep (W - back (N - inside c phi R) Q' - outside c phi clip G), c the norm-growth limiter's factor.
/// optim/low_rank_adam.h has the members; here they differ in these coefficients:
///              back        inside   outside           k of ||S||^2
///   GaLore     lr_t alpha  0        0
///   Fira       lr_t alpha  1        lr_t alpha (paper) or lr_t (reference)   1 or alpha
///   APOLLO     0           0        lr_t sqrt(alpha)                         0
namespace kiln::cuda {

/// One matrix. Tensors are row-major; `g`, `w` and `low` have n columns, moments and what the workspace holds r.
struct LowRankMatrix {
  CUtensorMap gradient;    // of g: low_rank_gradient_map
  std::uint16_t* w;        // bf16 [m,n]
  std::uint16_t* low;      // lower halves of the f32 masters; null: stochastic rounding
  const void* g;           // [m,n] f32 or bf16: LowRankTable::half_gradient
  StatePointer projector;  // Q [short, r] as stored: LowRankStates::basis; of APOLLO none
  float* q;                // Q in f32: the stored one, else decoded over `projected`; of rank 1 P, in the workspace
  StatePointer moment, square;  // [long, r]: LowRankStates::moments
  float* limiter;               // [1]
  std::int32_t m, n, rank;
  std::int32_t refresh_offset;  // of (step - 1) mod refresh
  std::uint64_t stream;         // of random numbers
  bool right;                   // vectors are rows
  bool decay;
  // workspace
  float* projected;                  // [long, r]: R, later N and R as pairs of bf16
  float *squares, *phi, *share;      // [long]: ||G_i||^2, phi_i, phi_i^2 times the residual's square
  float* factor;                     // [3]: c; c outside clip and keep, for low_rank_scale
  std::uint16_t *basis, *direction;  // Q and N - inside c phi R in bf16, as panels: low_rank_panels.cuh

  __host__ __device__ std::int32_t vectors() const { return right ? m : n; }
  __host__ __device__ std::int32_t side() const { return right ? n : m; }
};

/// What is the same for all matrices of a launch.
struct LowRankStep {
  double beta1, beta2, eps, weight_decay;
  double back, outside;  // factors of lr_t
  double inside;         // 1: the part of the residual inside the subspace is taken out through R
  double inside_square;  // 2k - k^2: what it takes from the residual's square
  double gamma;
  bool residual;               // S exists
  bool rotate;                 // moments follow a new basis
  std::int64_t rotation_step;  // added to the step where a rotation draws random bits
  std::uint64_t seed;
};

/// Part of one matrix, a unit of a kernel's work.
struct LowRankPiece {
  std::int32_t matrix, row, column;
};

/// How states are stored (optim/state_codec.h): moments in bf16 are rounded stochastically, a basis to nearest.
struct LowRankStates {
  StatePrecision moments = StatePrecision::fp32, basis = StatePrecision::fp32;
  const CodeMaps* maps = nullptr;  // in device memory, where one is int8
};

/// A launch's tables in device memory. Addresses are multiples of 64, for the tensor maps.
struct LowRankTable {
  const LowRankMatrix* matrices;
  const LowRankPiece* pieces;
  int count;  // of pieces
  int rank;   // the largest
  int multiprocessors;
  bool half_gradient;  // G of all matrices is bf16, else f32
  LowRankStates states;
  const double* scalars;
  LowRankStep step;
  cudaStream_t stream;
};

/// How the copy engine reads the gradient of `matrix`, which is bf16 (`half`) or f32. On the host.
CUtensorMap low_rank_gradient_map(const LowRankMatrix& matrix, bool half);
/// Of a bf16 copy of [rows, columns] as panels.
std::size_t low_rank_panel_bytes(int rows, int columns);

/// Q as panels. Pieces: 128 rows of Q each, row is the first.
/// floor  6 bytes for each of short * r elements
void low_rank_basis(const LowRankTable& table);
/// The same of APOLLO's random projection (optim/apollo.h), which is stored nowhere else; `every` steps it changes.
void low_rank_random_basis(const LowRankTable& table, int every);
/// R and the squared norms of the vectors. Pieces: 128 vectors x low_rank_project_width(rank) of the rank; row is the
/// first vector, column the first of the rank.
/// floor  reads G: 4 bytes a parameter, 2 in bf16; 2 m n r FLOPs
void low_rank_project(const LowRankTable& table);
constexpr int low_rank_project_width(int largest_rank) { return largest_rank > 128 ? 256 : 128; }
/// Moments, N, phi and the residual's share by vector; leaves N and R as bf16 pairs where LowRankStep::back is not 0.
/// Pieces: row is the first vector, column their count: low_rank_moment_vectors, that of a last piece at most.
/// floor  24 bytes for each of long * r elements, 16 with moments in bf16, 12 in int8
inline constexpr int kMomentsGroups = 512;  // of eight elements, in a piece
void low_rank_moments(const LowRankTable& table);
/// Vectors of a piece: kMomentsGroups groups or fewer, but codes need whole blocks that share a scale.
constexpr int low_rank_moment_vectors(int rank, StatePrecision moments) {
  const int block = static_cast<int>(kStateBlock);
  const int unit = moments == StatePrecision::int8 ? block / std::gcd(block, rank) : 1;
  return std::max(1, 8 * kMomentsGroups / rank / unit) * unit;
}
/// The limiter's factor and its norm, one block a matrix; `count` is the number of matrices.
void low_rank_limit(const LowRankTable& table);
/// N - inside c phi R as panels. Pieces: 128 vectors each, row is the first.
/// floor  6 bytes for each of long * r elements
void low_rank_direction(const LowRankTable& table);
/// W. Pieces: tiles of 128 x 128; those of the same vectors follow each other.
/// floor  reads G, W, low and writes W, low: 12 bytes a parameter, 10 where G is bf16; 2 m n r FLOPs
void low_rank_apply(const LowRankTable& table);
/// W where back is 0: without a product. Pieces: kScaleGroups groups of eight elements, row is the first.
/// floor  12 bytes a parameter, 10 where G is bf16
inline constexpr int kScaleGroups = 1024;
void low_rank_scale(const LowRankTable& table);

/// Scratch of a refresh, of one matrix at a time.
struct RefreshScratch {
  float* inner;                     // [long, r]: G Q
  float *outer, *other;             // [short, r]: G' G Q on its way to orthonormal columns
  float* basis;                     // [short, r]: the basis between passes
  float* parts;                     // sums of parts of a product's depth
  double* gram_parts;               // the same of the Gram matrix
  double *gram, *inverse, *square;  // [r, r], upper; [r, r], lower: of its factor's transpose; [r]: its diagonal
  float* triangle;                  // [r, r]: what the columns are multiplied by, transposed
  std::uint32_t* barrier;           // [1], zero
  std::uint32_t *lost, *large;      // [1]: a column was lost; an angle is not small
};
struct RefreshPasses {
  int passes;       // of Q <- orth(G' (G Q)) at a refresh
  int cold_passes;  // at the first step, from random numbers
  int every;        // steps
};
/// Ranks up to this.
inline constexpr int kLargestRefreshRank = 1536;
std::size_t refresh_scratch_bytes(int vectors, int side, int rank);
RefreshScratch cut_refresh_scratch(void* memory, int vectors, int side, int rank);
/// New bases of the matrices that are due at this step, one after another, each by all multiprocessors: block power
/// iteration, and CholeskyQR in f64. One launch, which ends at once when none is due. `count` is the number of
/// matrices. A gradient that has no subspace of this rank leaves its basis. With LowRankStep::rotate the moments turn
/// with a basis that was warm.
void low_rank_refresh(const LowRankTable& table, const RefreshScratch& scratch, const RefreshPasses& options);
/// The basis of matrix `index` as it is stored, in f32 in LowRankMatrix::q; nothing where it is stored so.
void low_rank_load_basis(const LowRankTable& table, int index);
/// Stores `basis` [short, r] as that of matrix `index`, and leaves in it what later steps will see; nothing in f32.
void low_rank_store_basis(const LowRankTable& table, int index, float* basis);
/// The moments of matrix `index` turn from its basis to the one in scratch.basis, which takes its place; they hold
/// `done` steps. One launch, by all multiprocessors.
void low_rank_turn(const LowRankTable& table, const RefreshScratch& scratch, int index, double done);

}  // namespace kiln::cuda
