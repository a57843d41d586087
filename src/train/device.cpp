#include "train/device.h"

#include "dist/communicator.h"
#include "train/train_plan.h"
#ifdef KILN_WITH_CUDA
#include "kernels/cuda_backend.h"
#endif

namespace kiln {

#ifdef KILN_WITH_CUDA
bool cuda_device_present() { return cuda::device_count() > 0; }

DeviceInfo cuda_info() {
  return {.compiled = true,
          .runtime = cuda::runtime_version(),
          .cublaslt = cuda::cublaslt_version(),
          .cusolver = cuda::cusolver_version(),
          .why_none = cuda::why_no_device(),
          .devices = cuda::device_names()};
}
#else
bool cuda_device_present() { return false; }
DeviceInfo cuda_info() { return {}; }
#endif

Device parse_device(std::string_view name) {
  if (name == "auto") return Device::automatic;
  if (name == "cpu") return Device::cpu;
  if (name == "cuda") return Device::cuda;
  fail(ExitCode::usage, "device '{}', expected auto, cpu or cuda", name);
}

std::unique_ptr<Backend> open_device(Device device) {
  if (device == Device::cpu || (device == Device::automatic && !cuda_device_present())) return make_cpu_backend();
#ifdef KILN_WITH_CUDA
  check(cuda_device_present(), "run.device: cuda, but this machine has no usable CUDA device ({}); use cpu or auto",
        cuda::why_no_device());
  const LaunchInfo launch = launch_info();
  check(launch.local_rank < cuda::device_count(),
        "{} ranks on this machine, but {} GPUs for them; start at most one rank a GPU, or use run.device: cpu",
        launch.local_size, cuda::device_count());
  return cuda::make_backend(launch.local_rank, launch.rank);
#else
  fail(ExitCode::usage,
       "run.device: cuda, but this program was built without CUDA; build with --preset cuda, or use cpu");
#endif
}

std::unique_ptr<Backend> open_planning_device(Device device) {
  if (device == Device::cpu || (device == Device::automatic && !cuda_device_present())) return make_cpu_backend();
#ifdef KILN_WITH_CUDA
  return cuda::make_planning_backend();
#else
  fail(ExitCode::usage,
       "run.device: cuda, but this program was built without CUDA, whose kernels say what a plan needs on a GPU; build "
       "with --preset cuda (no GPU is needed to plan), or use cpu");
#endif
}

bool keeps_masters(const Config& config, const Backend& backend) {
  return !backend.is_host() && config.precision.weights == WeightPrecision::fp32;
}

StorageLayout storage_layout(const Backend& backend) {
  return backend.is_host() ? StorageLayout(DType::f32) : StorageLayout(DType::bf16, 64);
}

StorageLayout training_layout(const Backend& backend, GradientPrecision asked, int micro_batches, int ranks) {
  StorageLayout layout = storage_layout(backend);
  check(asked != GradientPrecision::bf16 || !backend.is_host(),
        "precision.gradients: bf16 on the CPU, whose gradients are f32; use auto or fp32");
  check(asked != GradientPrecision::bf16 || ranks == 1,
        "precision.gradients: bf16 on {} ranks, whose gradients add up in f32; use auto or fp32", ranks);
  const bool half = asked == GradientPrecision::bf16 ||
                    (asked == GradientPrecision::automatic && !backend.is_host() && micro_batches == 1 && ranks == 1);
  if (half) layout.linear_gradients = DType::bf16;
  return layout;
}

StorageLayout layout_for_codes(const LlamaConfig& model, const OptimizerOptions& optimizer, StorageLayout layout) {
  if (layout.multiple > 8 && !padded_codes(model, *make_optimizer(optimizer), layout).empty()) layout.multiple = 8;
  return layout;
}

double published_flops_per_s(const Backend& backend) {
  const std::string name = backend.name();
  struct Peak {
    std::string_view device;
    double flops_per_s;
  };
  // Vendor datasheets, dense bf16, SXM boards.
  for (const Peak& peak : {Peak{"H100", 989e12}, Peak{"H200", 989e12}})
    if (name.find(peak.device) != std::string::npos) return peak.flops_per_s;
  return 0;
}

}  // namespace kiln
