#pragma once
#include <span>
#include <vector>

#include "graph/executor.h"
#include "model/llama.h"
#include "train/train_plan.h"

namespace kiln {

/// A tensor in a backend's memory, zeroed.
class DeviceTensor {
 public:
  DeviceTensor() = default;
  DeviceTensor(Backend& backend, TensorSpec spec, std::string_view what)
      : buffer_(backend.allocate(spec.bytes(), what)), spec_(spec) {}
  Tensor view() const { return {buffer_.data(), spec_}; }

 private:
  Buffer buffer_;
  TensorSpec spec_;
};

/// The weights of a model where a plan reads them. On the host with an f32 layout these are the model's own tensors;
/// elsewhere copies in the layout of the device, brought up to date by push() and pull(). The host's weights must
/// outlive it.
class DeviceWeights {
 public:
  /// `masters`: bf16 storages are the upper halves of f32 masters, whose lower halves low() holds. Ends with push().
  DeviceWeights(const ModelWeights& host, const StorageLayout& layout, bool masters, Backend& backend);
  /// Starts from initialise(host, seed). A copy takes one storage after the other, so that the host's weights hold no
  /// memory before they are pulled.
  DeviceWeights(const ModelWeights& host, const StorageLayout& layout, bool masters, Backend& backend,
                std::uint64_t seed);
  /// f32 on the host itself.
  explicit DeviceWeights(const ModelWeights& host) : DeviceWeights(host, DType::f32, false, cpu_backend()) {}

  const LlamaConfig& config() const { return host_.config(); }
  const ModelWeights& host() const { return host_; }
  const StorageLayout& layout() const { return layout_; }
  Backend& backend() const { return backend_; }
  std::size_t count() const { return table_.storages.size(); }
  /// Gives a recorded model its storages.
  void bind(Executor& executor, const LlamaValues& values) const;
  Tensor storage(std::size_t index) const { return shared_ ? host_.storage(index) : high_[index].view(); }
  Tensor low(std::size_t index) const { return low_[index].view(); }

  /// Host to device; bf16 without masters rounds to nearest even.
  void push() const;
  /// Device to host; waits for the device.
  void pull() const;

  /// Plans read the host's own tensors.
  bool shared() const { return shared_; }
  /// What a HostCopy takes where they are not shared, and its bytes as f32 weights, by parameter of the model.
  std::vector<Tensor> parts() const;
  void unpack(std::span<const std::byte> parts, const ModelWeights& to) const;
  /// Calls f() while plans read `other`, a model of the same configuration, and puts back what they read, bit for bit.
  /// `other` may be written meanwhile but is left as it was; waits for the device.
  template <typename F>
  void with(const ModelWeights& other, F&& f) const {
    show(other);
    f();
    restore(other);
  }

 private:
  struct Unfilled {};  // what its storages hold is left open
  DeviceWeights(Unfilled, const ModelWeights& host, const StorageLayout& layout, bool masters, Backend& backend);
  /// Calls visit(rows of `host`, first element in the padded storage, padded row length) for each parameter of a
  /// storage.
  template <typename F>
  void for_rows(const ModelWeights& host, std::size_t storage, F&& visit) const;
  void push(const ModelWeights& from) const;
  void push(const ModelWeights& from, std::size_t storage) const;
  /// The f32 rows of a storage; `low` is null without masters.
  void join(std::size_t storage, const std::uint16_t* high, const std::uint16_t* low, const ModelWeights& to) const;
  void exchange(const ModelWeights& other) const;
  void show(const ModelWeights& other) const;
  void restore(const ModelWeights& other) const;

  const ModelWeights& host_;
  StorageLayout layout_;
  ParameterTable table_;  // padded
  Backend& backend_;
  bool shared_;  // the host's own tensors
  std::vector<DeviceTensor> high_, low_;
};

/// What a recorded model reads besides its weights, in a backend's memory.
struct ModelInputs {
  /// Room for `tokens` tokens and targets; the RoPE table is filled.
  ModelInputs(Backend& backend, const LlamaConfig& config, const StorageLayout& layout, std::int64_t tokens,
              std::int64_t positions);
  /// Binds everything the values name; tokens and targets from their first row, as many as the plan takes.
  void bind(Executor& executor, const LlamaValues& values, std::int64_t first_token = 0) const;
  void set_scalars(Backend& backend, const StepScalars& values) const { backend.upload(scalars.view(), values.data()); }

  DeviceTensor tokens, targets, first, rope_table, scalars;
};

/// The optimizer states of a plan where it updates them; on the host, the host's own tensors. Padded states keep zeros
/// outside the host's shapes.
class DeviceStates {
 public:
  DeviceStates(const TrainPlan& plan, const OptimizerStates& host, Backend& backend);
  Tensor tensor(std::size_t parameter, std::size_t state) const;
  void push() const;
  void pull() const;

 private:
  const OptimizerStates& host_;
  Backend& backend_;
  std::vector<std::vector<DeviceTensor>> states_;  // by parameter; empty on the host
};

/// Gives a training plan its weights, their masters' low halves, and its states.
void bind_training(Executor& executor, const TrainPlan& plan, const DeviceWeights& weights, const DeviceStates& states);

}  // namespace kiln
