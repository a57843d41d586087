#pragma once
#include <cstddef>
#include <vector>

#include "kernels/context.h"
#include "kernels/low_rank_group.h"
#include "kernels/symmetric_eigen.h"

/// `optimizer.projector: svd` on the GPU: the option for who wants the reference's subspaces, and the oracle that
/// `power` is measured against.
///
/// The basis of a refresh is the top r eigenvectors of the f64 Gram matrix of the gradient's shorter side, each with
/// its component of largest magnitude positive, as optim/projector.h has it. Squaring the singular values costs half of
/// f64's digits: sigma_r is exact to about 1e-8 sigma_1, below the rounding of the f32 gradient itself, and only
/// vectors of singular values smaller than that mix with each other.
///
/// It waits for the device: once a step and group for the step's number, twice for each matrix that is due, and where
/// the solver does. A plan with such updates is therefore not recorded but enqueued anew at each step
/// (Backend::replay); `power` never waits.
namespace kiln::cuda {

/// Device memory of one matrix's refresh at a time.
struct ExactScratch {
  double* gram;    // [short, short]; then its eigenvectors, one after the other by ascending eigenvalue
  double* values;  // [short]
  double* trace;   // [1]
  int* status;     // [1], of the solver
};

/// gram = G' G where vectors are rows, G G' where they are columns, and its trace, which is finite where all of the
/// gradient is. Sums in f64 and in order.
/// floor  m n short FLOPs of f64
void low_rank_gram(const LowRankMatrix& t, bool half_gradient, const ExactScratch& scratch, cudaStream_t stream);
/// `basis` [short, r] f32 from the eigenvectors in scratch.gram.
void low_rank_leading(const LowRankMatrix& t, const ExactScratch& scratch, float* basis, cudaStream_t stream);

/// The refreshes of a group's matrices.
class ExactRefresh {
 public:
  /// Of one matrix at a time, with what a plan sets aside for the solver; where that asks for more on the device,
  /// SymmetricEigen has it.
  static std::size_t workspace_bytes(const LowRankGeometry& largest, bool rotate);

  explicit ExactRefresh(Context& context) : context_(context) {}
  void bind(std::byte* memory, const LowRankGeometry& largest, bool rotate, std::vector<LowRankMatrix> matrices);
  /// New bases of the matrices that are due at this step; with LowRankStep::rotate moments of a warm basis turn with
  /// it. Nothing at a step that is skipped; a gradient that is not finite leaves its basis. A resource Error where the
  /// solver does not converge.
  void run(const LowRankTable& table, std::int64_t every);

 private:
  void refresh(const LowRankTable& table, std::size_t index, std::int64_t step);

  Context& context_;
  std::vector<LowRankMatrix> matrices_;
  ExactScratch scratch_{};
  RefreshScratch turn_{};  // of a rotation
  void* solver_ = nullptr;
  std::size_t solver_bytes_ = 0;
};

}  // namespace kiln::cuda
