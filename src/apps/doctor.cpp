#include <CLI/CLI.hpp>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <memory>
#include <thread>

#include "apps/commands.h"
#include "base/json.h"
#include "base/text.h"
#include "dist/device_communicator.h"
#include "train/device.h"

namespace kiln {
namespace {

/// The value of the first "KEY : VALUE" line of a /proc file; "" when there is none.
std::string proc_value(const char* path, const std::string& key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(key)) {
      const std::size_t at = line.find_first_not_of(" \t", line.find(':') + 1);
      return at == std::string::npos ? "" : line.substr(at);
    }
  return "";
}

std::string compiled_vectors() {
#if defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__AVX__)
  return "AVX";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "128-bit";
#endif
}

/// Full path of a program on PATH; "" when it is not there.
std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::string rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const std::size_t colon = rest.find(':');
    const std::filesystem::path candidate = std::filesystem::path(rest.substr(0, colon)) / name;
    std::error_code none;
    if (std::filesystem::is_regular_file(candidate, none)) return candidate.string();
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  return "";
}

/// What works, what does not, and what to do about it.
struct Finding {
  std::string what, state, advice;
};

constexpr const char* kNotCompiled = "not compiled in";

Finding cuda_finding(const DeviceInfo& info) {
  if (!info.compiled) return {"CUDA backend", kNotCompiled, "install the CUDA Toolkit and build with --preset cuda"};
  if (info.devices.empty())
    return {"CUDA backend", fmt::format("CUDA {}, no device: {}", info.runtime, info.why_none),
            "train with run.device: cpu"};
  return {"CUDA backend", fmt::format("CUDA {}: {}", info.runtime, fmt::join(info.devices, ", ")), ""};
}

/// A library that is compiled in where its version is known.
Finding library(const std::string& name, const std::string& version, const std::string& advice) {
  return {name, version.empty() ? kNotCompiled : version, version.empty() ? advice : ""};
}

std::vector<Finding> examine() {
  const std::string memory = proc_value("/proc/meminfo", "MemTotal");
  const std::uint64_t bytes = std::strtoull(memory.c_str(), nullptr, 10) * 1024;
  const DeviceInfo cuda = cuda_info();
  const std::string mpirun = find_program("mpirun");
  std::vector<Finding> list{
      {"processor",
       fmt::format("{}, {} processors", proc_value("/proc/cpuinfo", "model name"), std::thread::hardware_concurrency()),
       ""},
      {"vector units", compiled_vectors() + " (compiled in)", ""},
      {"memory", human_bytes(bytes), ""},
      {"compiler", fmt::format("{}", __VERSION__), ""},
      {"CPU backend", "available", ""},
      library("MPI", mpi_library(), "install libopenmpi-dev and configure again"),
      {"mpirun", mpirun.empty() ? "not found" : mpirun, mpirun.empty() ? "install openmpi-bin" : ""},
      cuda_finding(cuda),
      library("cuBLASLt", cuda.cublaslt, "comes with the CUDA backend"),
      library("cuSOLVER", cuda.cusolver, "comes with the CUDA backend"),
      library("NCCL", nccl_version(), "needed for several GPUs; install NCCL and build with --preset cuda")};
  return list;
}

void run(bool as_json) {
  const std::vector<Finding> findings = examine();
  if (as_json) {
    Json json = Json::object();
    for (const Finding& f : findings) json[f.what] = {{"state", f.state}, {"advice", f.advice}};
    std::cout << json.dump(2) << '\n';
    return;
  }
  for (const Finding& f : findings)
    fmt::print("{:<14} {}{}\n", f.what, f.state, f.advice.empty() ? "" : fmt::format("  ({})", f.advice));
}

}  // namespace

void add_doctor_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("doctor", "Say what this machine and build can do, and what is missing");
  auto as_json = std::make_shared<bool>(false);
  command->add_flag("--json", *as_json, "one JSON object");
  add_quiet_flag(*command);
  command->footer("Example:\n  kiln doctor");
  command->callback([as_json] { run(*as_json); });
}

}  // namespace kiln
