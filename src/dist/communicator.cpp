#include "dist/communicator.h"

#include <cstdlib>

#include "dist/mpi_communicator.h"

namespace kiln {
namespace {

class LocalCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void all_reduce_sum(const Tensor&, const Tensor&) override {}
  std::size_t scratch_bytes(const TensorSpec&) const override { return 0; }
  double sum(double value) override { return value; }
  double maximum(double value) override { return value; }
  void broadcast(std::span<std::byte>) override {}
  void barrier() override {}
  void abort(int code) override { std::_Exit(code); }
};

int environment_int(std::initializer_list<const char*> names, int otherwise) {
  for (const char* name : names)
    if (const char* text = std::getenv(name)) return std::atoi(text);
  return otherwise;
}

}  // namespace

LaunchInfo launch_info() {
  return {.size = environment_int({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE"}, 1),
          .rank = environment_int({"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"}, 0),
          .local_size = environment_int({"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"}, 1),
          .local_rank = environment_int({"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"}, 0)};
}

std::unique_ptr<Communicator> make_local_communicator() { return std::make_unique<LocalCommunicator>(); }

std::unique_ptr<Communicator> make_communicator() {
  const LaunchInfo launch = launch_info();
  if (launch.size == 1) return make_local_communicator();
  std::unique_ptr<Communicator> mpi = make_mpi_communicator();
  check(mpi != nullptr, "launched on {} ranks, but this kiln was built without MPI; install libopenmpi-dev and rebuild",
        launch.size);
  return mpi;
}

}  // namespace kiln
