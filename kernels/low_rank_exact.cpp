#include "kernels/low_rank_exact.h"

#include <cmath>
#include <type_traits>
#include <utility>

#include "graph/parameter.h"
#include "kernels/aligned.h"
#include "kernels/launch.cuh"
#include "optim/projector.h"

namespace kiln::cuda {
namespace {

/// What a plan sets aside for the solver, which tells its need only on a device: 2 n^2 + 6 n + 1 numbers is LAPACK's
/// for this method (dsyevd), and half as much again is left for blocks.
std::size_t planned_solver_bytes(std::size_t side) {
  return aligned(3 * side * side * sizeof(double) + (std::size_t{1} << 20));
}

/// Calls visit(pointer, bytes) for each array.
template <typename F>
void visit_scratch(ExactScratch& s, std::size_t side, F&& visit) {
  visit(s.gram, side * side * sizeof(double));
  visit(s.values, side * sizeof(double));
  visit(s.trace, sizeof(double));
  visit(s.status, sizeof(int));
}

/// Waits for all work before it.
template <typename T>
void read(T& to, const void* from, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(&to, from, sizeof(T), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

}  // namespace

std::size_t ExactRefresh::workspace_bytes(const LowRankGeometry& largest, bool rotate) {
  const auto side = static_cast<std::size_t>(largest.side());
  ExactScratch s{};
  std::size_t total = planned_solver_bytes(side);
  visit_scratch(s, side, [&](auto&, std::size_t bytes) { total += aligned(bytes); });
  return total + (rotate ? refresh_scratch_bytes(largest.vectors(), largest.side(), largest.rank) : 0);
}

void ExactRefresh::bind(std::byte* memory, const LowRankGeometry& largest, bool rotate,
                        std::vector<LowRankMatrix> matrices) {
  const auto side = static_cast<std::size_t>(largest.side());
  matrices_ = std::move(matrices);
  visit_scratch(scratch_, side, [&](auto& array, std::size_t bytes) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(memory);
    memory += aligned(bytes);
  });
  solver_ = memory;
  solver_bytes_ = planned_solver_bytes(side);
  if (rotate) turn_ = cut_refresh_scratch(memory + solver_bytes_, largest.vectors(), largest.side(), largest.rank);
  for (const LowRankMatrix& t : matrices_)
    context_.eigen().prepare(t.side(), scratch_.gram, scratch_.values, solver_bytes_);
}

void ExactRefresh::run(const LowRankTable& table, std::int64_t every) {
  StepScalars scalars{};
  read(scalars, table.scalars, table.stream);
  if (!std::isfinite(scalar(scalars, Scalar::grad_norm))) return;
  const auto step = static_cast<std::int64_t>(scalar(scalars, Scalar::step));
  for (std::size_t i = 0; i < matrices_.size(); ++i)
    if (refresh_due({.interval = every, .offset = matrices_[i].refresh_offset}, step)) refresh(table, i, step);
}

void ExactRefresh::refresh(const LowRankTable& table, std::size_t index, std::int64_t step) {
  const LowRankMatrix& t = matrices_[index];
  low_rank_gram(t, table.half_gradient, scratch_, table.stream);
  double trace = 0;
  read(trace, scratch_.trace, table.stream);
  if (!std::isfinite(trace)) return;
  context_.eigen().solve(t.side(), scratch_.gram, scratch_.values, scratch_.status, solver_, solver_bytes_);
  int status = 0;
  read(status, scratch_.status, table.stream);
  if (status != 0)
    fail(ExitCode::resource,
         "cuSOLVER: syevd of the Gram matrix of a gradient [{},{}] at step {} ended with status {}, expected 0; use "
         "optimizer.projector: power",
         t.m, t.n, step, status);
  const bool turns = table.step.rotate && step > 1;
  float* basis = turns ? turn_.basis : t.q;
  if (turns) low_rank_load_basis(table, static_cast<int>(index));
  low_rank_leading(t, scratch_, basis, table.stream);
  low_rank_store_basis(table, static_cast<int>(index), basis);
  if (turns) low_rank_turn(table, turn_, static_cast<int>(index), static_cast<double>(step - 1));
}

}  // namespace kiln::cuda
