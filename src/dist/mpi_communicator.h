#pragma once
#include <memory>

#include "dist/communicator.h"

namespace kiln {

/// MPI_COMM_WORLD; starts MPI and ends it with the object. Null when built without MPI.
std::unique_ptr<Communicator> make_mpi_communicator();

}  // namespace kiln
