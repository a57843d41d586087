#include "kernels/cuda_backend.h"

#include <array>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "base/files.h"
#include "base/log.h"
#include "kernels/context.h"
#include "kernels/handles.h"
#include "kernels/launch.cuh"

namespace kiln::cuda {
namespace {

constexpr int kCapability = 9;  // Hopper

/// Page-locked host memory, which copies asynchronously.
Buffer make_pinned(std::size_t bytes) {
  void* data = nullptr;
  check_cuda(cudaMallocHost(&data, bytes), "cudaMallocHost");
  return Buffer(static_cast<std::byte*>(data), bytes, [](std::byte* p) noexcept { cudaFreeHost(p); });
}

/// Uploads go through this many pieces of staging of this size, allocated with the backend.
constexpr std::size_t kSlots = 4, kSlotBytes = std::size_t{4} << 20;

/// Device allocations of the process, each with its size before the bytes that are handed out, so that freeing needs no
/// table. One device a process.
std::size_t& allocated() {
  static std::size_t bytes = 0;
  return bytes;
}

/// What packing asks, answered without a device.
class Planning : public Backend {
 public:
  std::string name() const override { return "cuda (planning)"; }
  bool is_host() const override { return false; }
  NodeGroup group(const Plan& plan, std::size_t first) const override {
    NodeGroup group;
    find_entry(plan, first, group);
    return group;
  }
  std::size_t workspace_bytes(const Plan& plan, NodeGroup group) const override {
    const Node& node = plan.nodes()[group.first];
    const OpEntry* entry = find_entry(plan, group.first, group);
    if (entry == nullptr) return node.op->any_device() ? node.op->workspace_bytes(plan.input_specs(node)) : 0;
    return entry->workspace_bytes == nullptr ? 0 : entry->workspace_bytes({plan, group});
  }
  void check_kernel(const Plan& plan, NodeGroup group) const override {
    const OpEntry* entry = find_entry(plan, group.first, group);
    const Op& op = *plan.nodes()[group.first].op;
    require(entry != nullptr || op.any_device(), "no kernel for {}; train on the CPU with run.device=cpu", op.name());
    if (entry != nullptr && entry->check != nullptr) entry->check({plan, group});
  }
  bool blocks_host(const Plan& plan) const override {
    for (std::size_t n = 0; n < plan.nodes().size();) {
      NodeGroup group;
      const OpEntry* entry = find_entry(plan, n, group);
      if (entry != nullptr && entry->blocks_host != nullptr && entry->blocks_host({plan, group})) return true;
      n += group.count;
    }
    return false;
  }
  std::size_t staging_bytes() const override { return kSlots * kSlotBytes; }

  Buffer allocate(std::size_t, std::string_view) override { refuse(); }
  std::size_t allocated_bytes() const override { return 0; }
  void upload(const Tensor&, const void*) override { refuse(); }
  void download(void*, const Tensor&) override { refuse(); }
  std::size_t fetch(const Tensor&) override { refuse(); }
  void collect(std::size_t, void*) override { refuse(); }
  std::unique_ptr<HostCopy> host_copy(std::vector<Tensor>) override { refuse(); }
  void fill_bytes(const Tensor&, std::uint8_t) override { refuse(); }
  void synchronize() override { refuse(); }
  std::unique_ptr<Kernel> kernel(const Plan&, NodeGroup) override { refuse(); }
  std::unique_ptr<Replay> replay(const Plan&) override { refuse(); }
  std::size_t mark() override { refuse(); }
  double seconds_between(std::size_t, std::size_t) override { refuse(); }
  void forget_marks() override { refuse(); }

 private:
  [[noreturn]] static void refuse() { fail(ExitCode::usage, "cuda: this backend plans only; it has no device"); }
};

/// The first call runs eagerly (kernels load, GEMMs are timed), the second is captured, all later ones replay.
class GraphReplay final : public Replay {
 public:
  explicit GraphReplay(cudaStream_t stream) : stream_(stream) {}
  void run(const std::function<void()>& body) override {
    if (calls_++ == 0) return body();
    if (!graph_) capture(body);
    check_cuda(cudaGraphLaunch(graph_.get(), stream_), "cudaGraphLaunch");
  }

 private:
  void capture(const std::function<void()>& body) {
    check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      body();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);  // leaves the stream usable for the error's report
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check_cuda(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    check_cuda(made, "cudaGraphInstantiate");
    graph_.reset(executable);
  }

  cudaStream_t stream_;
  Graph graph_;
  int calls_ = 0;
};

/// Device to device in the backend's stream, which is soon over, and from there to page-locked memory in a stream of
/// its own: in that of the uploads, the next batch would have to wait behind it. The two directions of PCIe do not
/// meet.
class StagedCopy final : public HostCopy {
 public:
  StagedCopy(int device, cudaStream_t work, std::vector<Tensor> tensors, Buffer staging)
      : device_(device),
        work_(work),
        tensors_(std::move(tensors)),
        staging_(std::move(staging)),
        host_(make_pinned(staging_.size())),
        stream_(make_stream()),
        staged_(make_event(cudaEventDisableTiming)),
        arrived_(make_event(cudaEventDisableTiming | cudaEventBlockingSync)) {}
  ~StagedCopy() override { cudaStreamSynchronize(stream_.get()); }

  void start() override {
    std::byte* to = staging_.data();
    for (const Tensor& tensor : tensors_) {
      check_cuda(cudaMemcpyAsync(to, tensor.data, tensor.bytes(), cudaMemcpyDeviceToDevice, work_), "cudaMemcpyAsync");
      to += tensor.bytes();
    }
    check_cuda(cudaEventRecord(staged_.get(), work_), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(stream_.get(), staged_.get()), "cudaStreamWaitEvent");
    check_cuda(cudaMemcpyAsync(host_.data(), staging_.data(), staging_.size(), cudaMemcpyDeviceToHost, stream_.get()),
               "cudaMemcpyAsync");
    check_cuda(cudaEventRecord(arrived_.get(), stream_.get()), "cudaEventRecord");
  }
  std::span<const std::byte> wait() override {
    check_cuda(cudaSetDevice(device_), "cudaSetDevice");  // a new thread would open the first device
    check_cuda(cudaEventSynchronize(arrived_.get()), "a copy of the device's memory");
    return {host_.data(), host_.size()};
  }

 private:
  int device_;
  cudaStream_t work_;
  std::vector<Tensor> tensors_;
  Buffer staging_, host_;
  Stream stream_;
  Event staged_, arrived_;
};

class CudaBackend final : public Planning {
 public:
  CudaBackend(int device, int rank) : device_(device) {
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    name_ = properties.name;
    memory_bytes_ = properties.totalGlobalMem;
    check(properties.major == kCapability,
          "{}: compute capability {}.{}, but this program's kernels are built for 9.0 (Hopper); use run.device: cpu",
          name_, properties.major, properties.minor);
    stream_ = make_stream();
    copies_ = make_stream();
    gemms_ = std::make_unique<GemmPlans>(stream_.get());
    cache_ = cache_file(fmt::format("gemm-{}-rank{}.json", name_, rank));
    if (!cache_.empty()) gemms_->load(cache_);
    context_ = {.stream = stream_.get(),
                .multiprocessors = properties.multiProcessorCount,
                .gemms = gemms_.get(),
                .allocate = [this](std::size_t bytes, std::string_view what) { return allocate(bytes, what); },
                .eigen = [this]() -> SymmetricEigen& {
                  if (!eigen_) eigen_ = std::make_unique<SymmetricEigen>(stream_.get(), context_.allocate);
                  return *eigen_;
                }};
    for (Fetch& fetch : fetches_) fetch.done = make_event(cudaEventDisableTiming | cudaEventBlockingSync);
    for (Slot& slot : slots_)
      slot = {make_pinned(kSlotBytes), allocate(kSlotBytes, "upload staging"), make_event(cudaEventDisableTiming)};
    arrived_ = make_event(cudaEventDisableTiming);
  }
  ~CudaBackend() override {
    cudaStreamSynchronize(stream_.get());
    save_plans();
  }

  std::string name() const override { return name_; }
  std::size_t memory_bytes() const override { return memory_bytes_; }
  void* native_stream() const override { return stream_.get(); }

  Buffer allocate(std::size_t bytes, std::string_view what) override {
    if (bytes == 0) return {};
    void* data = nullptr;
    const std::size_t whole = bytes + kHeader;
    if (cudaMalloc(&data, whole) != cudaSuccess) {
      cudaGetLastError();  // clears it: the error is reported here
      std::size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      fail(ExitCode::resource,
           "{}: out of memory: {} of {} bytes, {} of {} are free; use a smaller micro-batch or memory.recompute", name_,
           what, bytes, free, total);
    }
    check_cuda(cudaMemsetAsync(data, 0, whole, stream_.get()), "cudaMemsetAsync");
    check_cuda(cudaMemcpyAsync(data, &whole, sizeof(whole), cudaMemcpyHostToDevice, stream_.get()), "cudaMemcpyAsync");
    check_cuda(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
    allocated() += whole;
    return Buffer(static_cast<std::byte*>(data) + kHeader, bytes, release);
  }
  std::size_t allocated_bytes() const override { return allocated(); }

  /// Through page-locked memory and a second stream, so that the copy overlaps the work under way; the last hop, from
  /// device to device, takes its turn in the stream.
  void upload(const Tensor& to, const void* from) override {
    const auto* source = static_cast<const std::byte*>(from);
    for (std::size_t done = 0; done < to.bytes(); done += kSlotBytes) {
      const std::size_t bytes = std::min(kSlotBytes, to.bytes() - done);
      Slot& slot = slots_[next_slot_++ % slots_.size()];
      check_cuda(cudaEventSynchronize(slot.free.get()), "cudaEventSynchronize");
      std::memcpy(slot.host.data(), source + done, bytes);
      check_cuda(cudaMemcpyAsync(slot.device.data(), slot.host.data(), bytes, cudaMemcpyHostToDevice, copies_.get()),
                 "cudaMemcpyAsync");
      check_cuda(cudaEventRecord(arrived_.get(), copies_.get()), "cudaEventRecord");
      check_cuda(cudaStreamWaitEvent(stream_.get(), arrived_.get()), "cudaStreamWaitEvent");
      check_cuda(cudaMemcpyAsync(static_cast<std::byte*>(to.data) + done, slot.device.data(), bytes,
                                 cudaMemcpyDeviceToDevice, stream_.get()),
                 "cudaMemcpyAsync");
      check_cuda(cudaEventRecord(slot.free.get(), stream_.get()), "cudaEventRecord");
    }
  }
  void download(void* to, const Tensor& from) override {
    check_cuda(cudaMemcpyAsync(to, from.data, from.bytes(), cudaMemcpyDeviceToHost, stream_.get()), "cudaMemcpyAsync");
    synchronize();
  }
  std::size_t fetch(const Tensor& from) override {
    const std::size_t index = next_fetch_++ % kFetches;
    Fetch& fetch = fetches_[index];
    if (fetch.host.size() < from.bytes()) fetch.host = make_pinned(from.bytes());
    fetch.bytes = from.bytes();
    check_cuda(cudaMemcpyAsync(fetch.host.data(), from.data, from.bytes(), cudaMemcpyDeviceToHost, stream_.get()),
               "cudaMemcpyAsync");
    check_cuda(cudaEventRecord(fetch.done.get(), stream_.get()), "cudaEventRecord");
    return index;
  }
  void collect(std::size_t fetch, void* to) override {
    check_cuda(cudaEventSynchronize(fetches_[fetch].done.get()), "a step on the device");
    std::memcpy(to, fetches_[fetch].host.data(), fetches_[fetch].bytes);
    if (gemms_->changed()) save_plans();
  }
  std::unique_ptr<HostCopy> host_copy(std::vector<Tensor> tensors) override {
    std::size_t bytes = 0;
    for (const Tensor& tensor : tensors) bytes += tensor.bytes();
    return std::make_unique<StagedCopy>(device_, stream_.get(), std::move(tensors),
                                        allocate(bytes, "staging of weights"));
  }
  void fill_bytes(const Tensor& tensor, std::uint8_t value) override {
    check_cuda(cudaMemsetAsync(tensor.data, value, tensor.bytes(), stream_.get()), "cudaMemsetAsync");
  }
  void synchronize() override { check_cuda(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize"); }

  std::unique_ptr<Kernel> kernel(const Plan& plan, NodeGroup group) override {
    check_kernel(plan, group);
    const OpEntry* entry = find_entry(plan, group.first, group);
    if (entry != nullptr) return entry->make({plan, group}, context_);
    const OpPtr op = plan.nodes()[group.first].op;
    return simple_kernel([op](const KernelArgs& args) { op->run_cpu(args); });
  }
  std::unique_ptr<Replay> replay(const Plan& plan) override {
    if (blocks_host(plan)) return std::make_unique<DirectReplay>();
    return std::make_unique<GraphReplay>(stream_.get());
  }

  std::size_t mark() override {
    if (marked_ == marks_.size()) marks_.push_back(make_event(cudaEventDefault));
    check_cuda(cudaEventRecord(marks_[marked_].get(), stream_.get()), "cudaEventRecord");
    return marked_++;
  }
  double seconds_between(std::size_t first, std::size_t second) override {
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, marks_[first].get(), marks_[second].get()), "cudaEventElapsedTime");
    return 1e-3 * static_cast<double>(ms);
  }
  void forget_marks() override { marked_ = 0; }

 private:
  static constexpr std::size_t kHeader = 256;
  /// A piece of an upload on its way.
  struct Slot {
    Buffer host, device;
    Event free;  // the stream has taken it
  };
  struct Fetch {
    Buffer host;
    std::size_t bytes = 0;
    Event done;
  };

  static void release(std::byte* p) noexcept {
    std::size_t whole = 0;
    cudaMemcpy(&whole, p - kHeader, sizeof(whole), cudaMemcpyDeviceToHost);
    cudaFree(p - kHeader);
    allocated() -= whole;
  }
  void save_plans() noexcept {
    if (!gemms_->changed()) return;
    if (cache_.empty()) {
      if (!std::exchange(warned_, true))
        log_warning(
            "no cache directory (set KILN_CACHE_DIR): GEMM plans are not kept, the next run may round differently");
      return;
    }
    try {
      gemms_->save(cache_);
    } catch (const std::exception& e) {
      log_warning("GEMM plans were not kept ({}); the next run times them again and may round differently", e.what());
      cache_.clear();
    }
  }

  int device_;
  std::string name_;
  std::size_t memory_bytes_ = 0;
  Stream stream_, copies_;
  Event arrived_;
  std::unique_ptr<GemmPlans> gemms_;
  std::unique_ptr<SymmetricEigen> eigen_;
  std::filesystem::path cache_;
  bool warned_ = false;  // that there is no cache
  Context context_;
  std::array<Slot, kSlots> slots_;
  std::size_t next_slot_ = 0, next_fetch_ = 0, marked_ = 0;
  std::array<Fetch, kFetches> fetches_;
  std::vector<Event> marks_;
};

}  // namespace

void copy_to_device(const Buffer& to, const void* from, cudaStream_t stream) {
  check_cuda(cudaMemcpyAsync(to.data(), from, to.size(), cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // clears it: why_no_device() says what it was
    return 0;
  }
  for (int device = 0; device < count; ++device) {
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    if (major != kCapability) return device;
  }
  return count;
}

std::vector<std::string> device_names() {
  std::vector<std::string> names;
  for (int device = 0; device < device_count(); ++device) {
    cudaDeviceProp properties{};
    check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    names.emplace_back(properties.name);
  }
  return names;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (result != cudaSuccess) return cudaGetErrorString(result);
  return count == 0 ? "none is visible" : "the first one is not a Hopper GPU, which the kernels are built for";
}

std::unique_ptr<Backend> make_backend(int device, int rank) { return std::make_unique<CudaBackend>(device, rank); }
std::unique_ptr<Backend> make_planning_backend() { return std::make_unique<Planning>(); }

std::string runtime_version() {
  int version = 0;
  if (cudaRuntimeGetVersion(&version) != cudaSuccess) return "unknown";
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

std::string cublaslt_version() { return GemmPlans::library_version(); }
std::string cusolver_version() { return SymmetricEigen::library_version(); }

}  // namespace kiln::cuda
