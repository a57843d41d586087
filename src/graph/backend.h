#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "graph/plan.h"

namespace kiln {

/// Neighbouring nodes of a plan that one kernel runs: [first, first + count), all of one phase.
struct NodeGroup {
  std::size_t first = 0, count = 1;
};

/// What runs a group, bound to memory.
class Kernel {
 public:
  virtual ~Kernel() = default;
  /// Called when memory was bound anew, before run(); may allocate and copy.
  virtual void bind(std::span<const KernelArgs>) {}
  /// Enqueues the work of the group's nodes (of the CPU: does it). Allocates nothing after the first call.
  virtual void run(std::span<const KernelArgs> nodes) = 0;
};

/// Work that is the same at every call: the second call records it, later ones replay the record.
class Replay {
 public:
  virtual ~Replay() = default;
  virtual void run(const std::function<void()>& body) = 0;
};
/// Runs it anew at every call.
class DirectReplay final : public Replay {
 public:
  void run(const std::function<void()>& body) override { body(); }
};

/// A large copy of device memory to the host, which goes on while the device works. One at a time: start() only after
/// wait(), and with one wait() for each.
class HostCopy {
 public:
  virtual ~HostCopy() = default;
  /// Takes the tensors as the work enqueued so far leaves them; what is enqueued later may overwrite them. Returns at
  /// once, on a device: in its stream stands a copy from device to device (2 bytes moved a byte, at the memory's
  /// bandwidth), and behind it, in a stream of its own, the way over PCIe, which holds nothing up.
  virtual void start() = 0;
  /// Waits until the bytes have come; on any thread. They are the tensors', one after the other, until the next
  /// start().
  virtual std::span<const std::byte> wait() = 0;
};

/// A device: its memory, and a kernel for every op. Work is enqueued in order on one stream; only the calls that say so
/// wait for it. Not thread-safe.
class Backend {
 public:
  virtual ~Backend() = default;
  /// "cpu", or the device's name.
  virtual std::string name() const = 0;
  /// The host reads and writes its memory directly.
  virtual bool is_host() const = 0;
  /// Zeroed memory, aligned to 256 bytes; a resource Error names `what` and the size.
  virtual Buffer allocate(std::size_t bytes, std::string_view what) = 0;
  /// Bytes handed out and not yet freed.
  virtual std::size_t allocated_bytes() const = 0;
  /// All memory of the device, used or not; 0 when unknown, and on the CPU.
  virtual std::size_t memory_bytes() const { return 0; }
  /// What it allocates for itself to upload through; part of allocated_bytes().
  virtual std::size_t staging_bytes() const { return 0; }
  /// Copies host memory to the device in stream order; `from` may be reused when the call returns.
  virtual void upload(const Tensor& to, const void* from) = 0;
  /// Copies device memory to the host; waits for all work before it.
  virtual void download(void* to, const Tensor& from) = 0;
  /// Starts a copy of a small tensor to the host, in stream order; collect() waits for that copy alone. At most
  /// kFetches may be under way.
  static constexpr std::size_t kFetches = 4;
  virtual std::size_t fetch(const Tensor& from) = 0;
  virtual void collect(std::size_t fetch, void* to) = 0;
  /// Allocates a HostCopy of `tensors`: their bytes once more on the device, and on the host (page-locked).
  virtual std::unique_ptr<HostCopy> host_copy(std::vector<Tensor> tensors) = 0;
  virtual void fill_bytes(const Tensor& tensor, std::uint8_t value) = 0;
  /// Waits until everything enqueued is done.
  virtual void synchronize() = 0;

  /// The group that starts at node `first`: how many neighbours the device takes in one kernel.
  virtual NodeGroup group(const Plan& plan, std::size_t first) const = 0;
  /// Scratch of one run of a group; known without a device, so that a plan can be packed anywhere.
  virtual std::size_t workspace_bytes(const Plan& plan, NodeGroup group) const = 0;
  /// A usage Error names the op when kernel() has none for it, for its shapes or for an optimizer's settings; known
  /// without a device.
  virtual void check_kernel(const Plan& plan, NodeGroup group) const = 0;
  /// A usage Error names the op when the device has no kernel for it, or none for its shapes.
  virtual std::unique_ptr<Kernel> kernel(const Plan& plan, NodeGroup group) = 0;
  /// Whether a kernel of the plan waits for the device, so that the plan cannot be recorded; known without a device.
  virtual bool blocks_host(const Plan& plan) const = 0;
  /// Of work that runs `plan`: records it, unless that blocks the host.
  virtual std::unique_ptr<Replay> replay(const Plan& plan) = 0;

  /// The device's stream as its own libraries know it; null on the CPU.
  virtual void* native_stream() const { return nullptr; }
  /// Marks the stream; seconds(a, b) between two marks, valid after synchronize().
  virtual std::size_t mark() = 0;
  virtual double seconds_between(std::size_t first, std::size_t second) = 0;
  virtual void forget_marks() = 0;
};

/// The host's processors.
std::unique_ptr<Backend> make_cpu_backend();
/// One that the whole process shares, for plans that only ever run there.
Backend& cpu_backend();

}  // namespace kiln
