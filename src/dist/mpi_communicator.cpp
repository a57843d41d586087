#include "dist/mpi_communicator.h"

#ifdef KILN_WITH_MPI
#include <mpi.h>

#include <algorithm>
#include <cstdlib>

#include "core/parallel.h"

namespace kiln {
namespace {

constexpr std::int64_t kCountLimit = std::int64_t{1} << 28;  // elements a call; MPI counts are ints

/// Sum by chunks: rank r collects chunk r of every rank, adds them in rank order, and hands the sum to all. The same
/// bytes travel as in a ring all-reduce (2 (R-1)/R of the tensor a rank), and the order of the sum is fixed.
class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator() {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
  }
  ~MpiCommunicator() override { MPI_Finalize(); }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::size_t scratch_bytes(const TensorSpec& spec) const override {
    const auto ranks = static_cast<std::int64_t>(size_);
    return static_cast<std::size_t>(ranks * chunk(spec.shape.numel())) * size_of(spec.dtype);
  }

  void all_reduce_sum(const Tensor& tensor, const Tensor& scratch) override {
    visit_real(tensor.dtype(), [&]<typename T>() {
      for (std::int64_t done = 0; done < tensor.numel(); done += kCountLimit)
        reduce(tensor.as<T>() + done, std::min(kCountLimit, tensor.numel() - done), static_cast<T*>(scratch.data));
    });
  }

  double sum(double value) override { return all_reduce(value, MPI_SUM); }
  double maximum(double value) override { return all_reduce(value, MPI_MAX); }

  void broadcast(std::span<std::byte> bytes) override {
    while (!bytes.empty()) {
      const std::size_t n = std::min<std::size_t>(bytes.size(), std::size_t{1} << 30);
      MPI_Bcast(bytes.data(), static_cast<int>(n), MPI_BYTE, 0, MPI_COMM_WORLD);
      bytes = bytes.subspan(n);
    }
  }

  void barrier() override { MPI_Barrier(MPI_COMM_WORLD); }

  void abort(int code) override {
    MPI_Abort(MPI_COMM_WORLD, code);
    std::_Exit(code);
  }

 private:
  std::int64_t chunk(std::int64_t count) const {
    count = std::min(count, kCountLimit);
    return (count + size_ - 1) / size_;
  }

  static double all_reduce(double value, MPI_Op op) {
    double result = 0;
    MPI_Allreduce(&value, &result, 1, MPI_DOUBLE, op, MPI_COMM_WORLD);
    return result;
  }

  template <typename T>
  void reduce(T* data, std::int64_t count, T* scratch) {
    const MPI_Datatype type = std::is_same_v<T, float> ? MPI_FLOAT : MPI_DOUBLE;
    const std::int64_t step = chunk(count);
    auto begin = [&](int r) { return std::min<std::int64_t>(count, r * step); };
    auto length = [&](int r) { return static_cast<int>(begin(r + 1) - begin(r)); };
    constexpr int kTag = 1;
    const int own = length(rank_);
    for (int shift = 1; shift < size_; ++shift) {
      const int to = (rank_ + shift) % size_, from = (rank_ - shift + size_) % size_;
      MPI_Sendrecv(data + begin(to), length(to), type, to, kTag, scratch + from * step, own, type, from, kTag,
                   MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    }
    T* const mine = data + begin(rank_);
    parallel_for(own, 1 << 14, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) {
        T total = rank_ == 0 ? mine[i] : scratch[i];
        for (int r = 1; r < size_; ++r) total += r == rank_ ? mine[i] : scratch[r * step + i];
        mine[i] = total;
      }
    });
    for (int shift = 1; shift < size_; ++shift) {
      const int to = (rank_ + shift) % size_, from = (rank_ - shift + size_) % size_;
      MPI_Sendrecv(mine, own, type, to, kTag, data + begin(from), length(from), type, from, kTag, MPI_COMM_WORLD,
                   MPI_STATUS_IGNORE);
    }
  }

  int rank_ = 0, size_ = 1;
};

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator() { return std::make_unique<MpiCommunicator>(); }

std::string mpi_library() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string full(text, static_cast<std::size_t>(length));
  return full.substr(0, full.find_first_of(",\n"));
}

}  // namespace kiln

#else
namespace kiln {
std::unique_ptr<Communicator> make_mpi_communicator() { return nullptr; }
std::string mpi_library() { return ""; }
}  // namespace kiln
#endif
