#include <array>
#include <chrono>
#include <cstring>
#include <vector>

#include "graph/backend.h"

namespace kiln {
namespace {

class CpuKernel final : public Kernel {
 public:
  explicit CpuKernel(OpPtr op) : op_(std::move(op)) {}
  void run(std::span<const KernelArgs> nodes) override { op_->run_cpu(nodes.front()); }

 private:
  OpPtr op_;
};

class DirectCopy final : public HostCopy {
 public:
  explicit DirectCopy(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    std::size_t bytes = 0;
    for (const Tensor& tensor : tensors_) bytes += tensor.bytes();
    bytes_.resize(bytes);
  }
  void start() override {
    std::byte* to = bytes_.data();
    for (const Tensor& tensor : tensors_) {
      std::memcpy(to, tensor.data, tensor.bytes());
      to += tensor.bytes();
    }
  }
  std::span<const std::byte> wait() override { return bytes_; }

 private:
  std::vector<Tensor> tensors_;
  std::vector<std::byte> bytes_;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend() {
    for (std::vector<std::byte>& slot : fetched_) slot.reserve(kFetchBytes);
  }
  std::string name() const override { return "cpu"; }
  bool is_host() const override { return true; }
  Buffer allocate(std::size_t bytes, std::string_view what) override { return Buffer(bytes, what); }
  std::size_t allocated_bytes() const override { return 0; }  // buffers of the host are not tracked
  void upload(const Tensor& to, const void* from) override { std::memcpy(to.data, from, to.bytes()); }
  void download(void* to, const Tensor& from) override { std::memcpy(to, from.data, from.bytes()); }
  std::size_t fetch(const Tensor& from) override {
    const std::size_t slot = next_fetch_++ % kFetches;
    const auto* bytes = static_cast<const std::byte*>(from.data);
    fetched_[slot].assign(bytes, bytes + from.bytes());
    return slot;
  }
  void collect(std::size_t fetch, void* to) override {
    std::memcpy(to, fetched_[fetch].data(), fetched_[fetch].size());
  }
  std::unique_ptr<HostCopy> host_copy(std::vector<Tensor> tensors) override {
    return std::make_unique<DirectCopy>(std::move(tensors));
  }
  void fill_bytes(const Tensor& tensor, std::uint8_t value) override {
    if (tensor.bytes() > 0) std::memset(tensor.data, value, tensor.bytes());  // an empty one has no address
  }
  void synchronize() override {}

  NodeGroup group(const Plan&, std::size_t first) const override { return {first, 1}; }
  std::size_t workspace_bytes(const Plan& plan, NodeGroup group) const override {
    const Node& node = plan.nodes()[group.first];
    return node.op->workspace_bytes(plan.input_specs(node));
  }
  void check_kernel(const Plan&, NodeGroup) const override {}
  std::unique_ptr<Kernel> kernel(const Plan& plan, NodeGroup group) override {
    return std::make_unique<CpuKernel>(plan.nodes()[group.first].op);
  }
  bool blocks_host(const Plan&) const override { return false; }
  std::unique_ptr<Replay> replay(const Plan&) override { return std::make_unique<DirectReplay>(); }

  std::size_t mark() override {
    marks_.push_back(std::chrono::steady_clock::now());
    return marks_.size() - 1;
  }
  double seconds_between(std::size_t first, std::size_t second) override {
    return std::chrono::duration<double>(marks_[second] - marks_[first]).count();
  }
  void forget_marks() override { marks_.clear(); }

 private:
  static constexpr std::size_t kFetchBytes = 256;  // small tensors are fetched without allocating
  std::vector<std::chrono::steady_clock::time_point> marks_;
  std::array<std::vector<std::byte>, kFetches> fetched_;
  std::size_t next_fetch_ = 0;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace kiln
