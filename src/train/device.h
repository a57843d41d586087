#pragma once
#include <memory>
#include <string>
#include <vector>

#include "graph/backend.h"
#include "model/llama.h"
#include "train/config.h"

namespace kiln {

/// Whether this build and machine have a CUDA device.
bool cuda_device_present();

/// What CUDA finds here.
struct DeviceInfo {
  bool compiled = false;
  std::string runtime, cublaslt, cusolver;  // versions
  std::string why_none;
  std::vector<std::string> devices;  // names
};
DeviceInfo cuda_info();

/// "auto", "cpu" or "cuda"; a usage Error otherwise.
Device parse_device(std::string_view name);

/// The device that `run.device` asks for: with auto, the GPU of this rank when there is one, else the CPU. A usage
/// Error when cuda is asked for and this build or machine has none.
std::unique_ptr<Backend> open_device(Device device);

/// What packs a plan as that device would, without one. A usage Error when a GPU is asked for in a build without CUDA.
std::unique_ptr<Backend> open_planning_device(Device device);

/// How a device stores a model's weights: f32 on the CPU; on a GPU bf16, sizes padded to 64.
StorageLayout storage_layout(const Backend& backend);
/// The same with the dtype of a step's gradients that a configuration asks for; bf16 is a usage Error on the
/// CPU and on several ranks.
StorageLayout training_layout(const Backend& backend, GradientPrecision asked, int micro_batches, int ranks);
/// Less padding where `layout` would cut the model's 8-bit states into other blocks than files have: to eights, which
/// is the least that kernels take.
StorageLayout layout_for_codes(const LlamaConfig& model, const OptimizerOptions& optimizer, StorageLayout layout);
/// f32 masters, of which bf16 weights are the upper halves; the CPU's weights are f32 themselves.
bool keeps_masters(const Config& config, const Backend& backend);

/// Dense bf16 FLOP/s of the GPU as published, which MFU is counted against; 0 when unknown, and on the CPU.
double published_flops_per_s(const Backend& backend);

}  // namespace kiln
