#include "dist/device_communicator.h"

#ifdef KILN_WITH_NCCL
#include <nccl.h>

#include <exception>
#endif

namespace kiln {

#ifdef KILN_WITH_NCCL
namespace {

void check_nccl(ncclResult_t result, const char* call) {
  if (result != ncclSuccess)
    fail(ExitCode::resource, "NCCL: {} failed ({}); set NCCL_DEBUG=INFO for its log", call, ncclGetErrorString(result));
}

ncclDataType_t nccl_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return ncclFloat32;
    case DType::f64:
      return ncclFloat64;
    case DType::bf16:
      return ncclBfloat16;
    default:
      fail(ExitCode::usage, "all_reduce: dtype {}, expected f32, f64 or bf16", to_string(dtype));
  }
}

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(Communicator& host, const Backend& backend)
      : host_(host), stream_(static_cast<cudaStream_t>(backend.native_stream())) {
    ncclUniqueId id{};
    if (host.rank() == 0) check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId");
    host.broadcast(std::as_writable_bytes(std::span(&id, 1)));
    ncclComm_t handle = nullptr;
    check_nccl(ncclCommInitRank(&handle, host.size(), id, host.rank()), "ncclCommInitRank");
    handle_.reset(handle);
  }

  int rank() const override { return host_.rank(); }
  int size() const override { return host_.size(); }
  void all_reduce_sum(const Tensor& tensor, const Tensor&) override {
    check_nccl(ncclAllReduce(tensor.data, tensor.data, static_cast<std::size_t>(tensor.numel()),
                             nccl_type(tensor.dtype()), ncclSum, handle_.get(), stream_),
               "ncclAllReduce");
  }
  std::size_t scratch_bytes(const TensorSpec&) const override { return 0; }
  double sum(double value) override { return host_.sum(value); }
  double maximum(double value) override { return host_.maximum(value); }
  void broadcast(std::span<std::byte> bytes) override { host_.broadcast(bytes); }
  void barrier() override { host_.barrier(); }
  void abort(int code) override { host_.abort(code); }

 private:
  struct Destroy {
    /// Destroying waits for the other ranks; after an error they may never come.
    void operator()(ncclComm_t handle) const {
      if (std::uncaught_exceptions() > 0)
        ncclCommAbort(handle);
      else
        ncclCommDestroy(handle);
    }
  };
  Communicator& host_;
  cudaStream_t stream_;
  std::unique_ptr<ncclComm, Destroy> handle_;
};

}  // namespace
#endif

std::unique_ptr<Communicator> make_device_communicator(Communicator& host, const Backend& backend) {
  if (backend.is_host() || host.size() == 1) return nullptr;
#ifdef KILN_WITH_NCCL
  return std::make_unique<NcclCommunicator>(host, backend);
#else
  fail(ExitCode::usage, "{} ranks on {}: this program was built without NCCL; build with it, or use one rank",
       host.size(), backend.name());
#endif
}

std::string nccl_version() {
#ifdef KILN_WITH_NCCL
  int version = 0;
  if (ncclGetVersion(&version) == ncclSuccess)
    return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
#endif
  return "";
}

}  // namespace kiln
