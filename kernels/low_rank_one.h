#pragma once
#include "kernels/low_rank.h"

/// APOLLO-Mini on the GPU: rank 1, where products are dots and one factor serves the matrix. low_rank_limit and
/// low_rank_scale follow; LowRankMatrix::q is P [short], in the workspace.
namespace kiln::cuda {

/// P of this step (optim/apollo.h), which changes every `every` steps. Pieces: kOneRows elements, row is the first.
/// floor  4 bytes for each of short elements
inline constexpr int kOneRows = 128;
void low_rank_one_basis(const LowRankTable& table, int every);
/// R [long] and the squared norms of the vectors. Pieces: low_rank_one_vectors vectors, row is the first.
/// floor  reads G: 4 bytes a parameter, 2 in bf16
void low_rank_one_project(const LowRankTable& table);
constexpr int low_rank_one_vectors(bool right) { return right ? 32 : 64; }
/// Moments, one phi for all vectors and each one's share of the step's square; one block a matrix, `count` is the
/// number of matrices. Sums of a fixed order: f32 within eights, f64 across.
/// floor  32 bytes for each of long elements, 24 with moments in bf16, 20 in int8
void low_rank_one_moments(const LowRankTable& table);

}  // namespace kiln::cuda
