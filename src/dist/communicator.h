#pragma once
#include <memory>
#include <span>
#include <string>

#include "core/tensor.h"

namespace kiln {

/// Collectives between the ranks of a data-parallel run. Every rank calls the same ones in the same order.
/// All block the calling thread until the local result is complete.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Sums f32 or f64 elements over ranks, in rank order (the result is bitwise the same on every rank and every run).
  /// `scratch` holds scratch_bytes(tensor) bytes. No allocation.
  virtual void all_reduce_sum(const Tensor& tensor, const Tensor& scratch) = 0;
  virtual std::size_t scratch_bytes(const TensorSpec& spec) const = 0;
  /// Small sums and maxima of host scalars.
  virtual double sum(double value) = 0;
  virtual double maximum(double value) = 0;
  /// Copies bytes of rank 0 to all.
  virtual void broadcast(std::span<std::byte> bytes) = 0;
  virtual void barrier() = 0;
  /// Ends every rank of the run with `code`; for errors that one rank alone has met.
  [[noreturn]] virtual void abort(int code) = 0;
};

/// The communicator of the launch: MPI's world under mpirun (or srun), else a single rank.
/// A usage Error when launched on several ranks by a program that was built without MPI.
std::unique_ptr<Communicator> make_communicator();
/// A single rank, without MPI.
std::unique_ptr<Communicator> make_local_communicator();

/// Ranks and rank that the launcher announced in the environment, before MPI starts; {1, 0} outside a launcher.
struct LaunchInfo {
  int size = 1, rank = 0, local_size = 1, local_rank = 0;
};
LaunchInfo launch_info();
/// "Open MPI 4.1.4", or "" when built without MPI.
std::string mpi_library();

}  // namespace kiln
