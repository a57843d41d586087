#include "kernels/gemm_plans.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <vector>

#include "base/files.h"
#include "base/json.h"
#include "base/log.h"
#include "kernels/handles.h"
#include "kernels/launch.cuh"
#include "kernels/library_version.h"

namespace kiln::cuda {
namespace {

constexpr int kCandidates = 16, kRepeats = 3;

void check_lt(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ExitCode::resource, "cuBLASLt: {} failed: {}", call, cublasLtGetStatusString(status));
}

/// unique_ptr for handles that are destroyed by a function.
template <typename T, cublasStatus_t (*kDestroy)(T*)>
struct Destroyer {
  void operator()(T* handle) const { kDestroy(handle); }
};
using Handle = std::unique_ptr<cublasLtContext, Destroyer<cublasLtContext, cublasLtDestroy>>;
using MatmulDesc =
    std::unique_ptr<cublasLtMatmulDescOpaque_t, Destroyer<cublasLtMatmulDescOpaque_t, cublasLtMatmulDescDestroy>>;
using Layout =
    std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Destroyer<cublasLtMatrixLayoutOpaque_t, cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t,
                                   Destroyer<cublasLtMatmulPreferenceOpaque_t, cublasLtMatmulPreferenceDestroy>>;

struct Batch {
  std::int64_t count, stride;
};
Layout make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t columns, std::int64_t ld, Batch batch) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_lt(cublasLtMatrixLayoutCreate(&layout, type, static_cast<std::uint64_t>(rows),
                                      static_cast<std::uint64_t>(columns), ld),
           "cublasLtMatrixLayoutCreate");
  Layout made(layout);
  if (batch.count == 1) return made;
  const auto count = static_cast<std::int32_t>(batch.count);
  check_lt(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
           "batch count");
  check_lt(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch.stride,
                                            sizeof(batch.stride)),
           "batch stride");
  return made;
}

/// cuBLASLt is column-major, so it is given C' = op(B)' op(A)': the stored bytes stay as they are.
struct Problem {
  MatmulDesc desc;
  Layout a, b, c;

  explicit Problem(const Gemm& g)
      : a(g.trans_b == Trans::yes ? make_layout(CUDA_R_16BF, g.k, g.n, g.ldb, {g.batch, g.stride_b})
                                  : make_layout(CUDA_R_16BF, g.n, g.k, g.ldb, {g.batch, g.stride_b})),
        b(g.trans_a == Trans::yes ? make_layout(CUDA_R_16BF, g.m, g.k, g.lda, {g.batch, g.stride_a})
                                  : make_layout(CUDA_R_16BF, g.k, g.m, g.lda, {g.batch, g.stride_a})),
        c(make_layout(g.c_type == DType::f32 ? CUDA_R_32F : CUDA_R_16BF, g.n, g.m, g.ldc, {g.batch, g.stride_c})) {
    cublasLtMatmulDesc_t raw = nullptr;
    check_lt(cublasLtMatmulDescCreate(&raw, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    desc.reset(raw);
    const cublasOperation_t first = g.trans_b == Trans::yes ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t second = g.trans_a == Trans::yes ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_lt(cublasLtMatmulDescSetAttribute(raw, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof(first)), "transa");
    check_lt(cublasLtMatmulDescSetAttribute(raw, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof(second)), "transb");
  }
};

std::string key_of(const Gemm& g) {
  std::string key =
      fmt::format("{}{} {}x{}x{} ld {},{},{} {}", g.trans_a == Trans::yes ? 't' : 'n',
                  g.trans_b == Trans::yes ? 't' : 'n', g.m, g.n, g.k, g.lda, g.ldb, g.ldc, to_string(g.c_type));
  if (g.add != nullptr) key += " add";
  if (g.batch > 1) key += fmt::format(" batch {} by {},{},{}", g.batch, g.stride_a, g.stride_b, g.stride_c);
  return key;
}

std::string to_hex(const cublasLtMatmulAlgo_t& algo) {
  std::string text;
  for (const std::uint64_t word : algo.data) text += fmt::format("{:016x}", word);
  return text;
}

cublasLtMatmulAlgo_t from_hex(const std::string& text) {
  check(text.size() == 16 * std::size(cublasLtMatmulAlgo_t{}.data), "'{}' is not a GEMM plan", text);
  cublasLtMatmulAlgo_t algo{};
  for (std::size_t i = 0; i < std::size(algo.data); ++i)
    algo.data[i] = std::stoull(text.substr(16 * i, 16), nullptr, 16);
  return algo;
}

std::string device_name() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return properties.name;
}

}  // namespace

struct GemmPlans::Impl {
  struct Plan {
    Problem problem;
    cublasLtMatmulAlgo_t algo;
  };

  cudaStream_t stream = nullptr;
  Event begin = make_event(cudaEventDefault), end = make_event(cudaEventDefault);
  Handle handle;
  std::map<std::string, Plan> plans;
  std::map<std::string, std::string> choices;  // by shape, as the file holds them
  bool changed = false;

  cublasStatus_t matmul(const Problem& p, const Gemm& g, const cublasLtMatmulAlgo_t& algo, void* workspace) const {
    const float beta = g.add != nullptr ? g.beta : g.accumulate ? 1.0f : 0.0f;
    return cublasLtMatmul(handle.get(), p.desc.get(), &g.alpha, g.b, p.a.get(), g.a, p.b.get(), &beta,
                          g.add != nullptr ? g.add : g.c, p.c.get(), g.c, p.c.get(), &algo, workspace, kWorkspaceBytes,
                          stream);
  }

  /// Seconds of one call; infinite when the candidate does not run.
  double time_once(const Problem& p, const Gemm& g, const cublasLtMatmulAlgo_t& algo, void* workspace) const {
    check_cuda(cudaEventRecord(begin.get(), stream), "cudaEventRecord");
    if (matmul(p, g, algo, workspace) != CUBLAS_STATUS_SUCCESS) return INFINITY;
    check_cuda(cudaEventRecord(end.get(), stream), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(end.get()), "cudaEventSynchronize");
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin.get(), end.get()), "cudaEventElapsedTime");
    return 1e-3 * static_cast<double>(ms);
  }

  /// The best of a few calls after one to warm up.
  double time(const Problem& p, const Gemm& g, const cublasLtMatmulAlgo_t& algo, void* workspace) const {
    if (time_once(p, g, algo, workspace) == INFINITY) return INFINITY;
    double best = INFINITY;
    for (int i = 0; i < kRepeats; ++i) best = std::min(best, time_once(p, g, algo, workspace));
    return best;
  }

  cublasLtMatmulAlgo_t choose(const Problem& p, const Gemm& g, void* workspace) const {
    cublasLtMatmulPreference_t raw = nullptr;
    check_lt(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate");
    const Preference preference(raw);
    const std::size_t bytes = kWorkspaceBytes;
    check_lt(cublasLtMatmulPreferenceSetAttribute(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)),
             "workspace");
    std::array<cublasLtMatmulHeuristicResult_t, kCandidates> found{};
    int count = 0;
    cublasLtMatmulAlgoGetHeuristic(handle.get(), p.desc.get(), p.a.get(), p.b.get(), p.c.get(), p.c.get(), raw,
                                   kCandidates, found.data(), &count);
    if (count == 0) fail(ExitCode::usage, "cuBLASLt has no algorithm for the GEMM {}", key_of(g));
    // Timing overwrites C, and the real call comes after it. What is to be added to cannot be overwritten: the
    // heuristic's first choice stands (gradients begin by overwriting, so that this is rare).
    if (g.accumulate) return found.front().algo;
    std::size_t best = 0;
    double seconds = INFINITY;
    for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
      const double candidate = time(p, g, found[i].algo, workspace);
      if (candidate < seconds) best = i, seconds = candidate;
    }
    if (seconds == INFINITY) fail(ExitCode::resource, "cuBLASLt: no algorithm runs the GEMM {}", key_of(g));
    return found[best].algo;
  }

  Plan& plan(const Gemm& g, void* workspace) {
    const std::string key = key_of(g);
    if (const auto made = plans.find(key); made != plans.end()) return made->second;
    Problem problem(g);
    cublasLtMatmulAlgo_t algo;
    if (const auto chosen = choices.find(key); chosen != choices.end()) {
      algo = from_hex(chosen->second);
    } else {
      algo = choose(problem, g, workspace);
      choices[key] = to_hex(algo);
      changed = true;
    }
    return plans.emplace(key, Plan{std::move(problem), algo}).first->second;
  }

  /// The plans of a file; none, with a warning, when it is damaged or was made for another device or library.
  Json kept(const std::filesystem::path& file) const {
    if (!std::filesystem::is_regular_file(file)) return Json::object();
    try {
      const Json json = read_json(file);
      const Json& found = json.at("plans");
      for (const auto& [shape, algo] : found.items()) from_hex(algo.get<std::string>());
      if (json.at("made_for") == header()) return found;
      log_warning("{}: GEMM plans of another device or cuBLASLt; they are timed again, and runs may round differently",
                  file.string());
    } catch (const std::exception& e) {
      log_warning("{}: not a file of GEMM plans ({}); they are timed again, and runs may round differently",
                  file.string(), e.what());
    }
    return Json::object();
  }

  Json header() const { return {{"device", device_name()}, {"cublasLt", cublasLtGetVersion()}}; }
};

GemmPlans::GemmPlans(cudaStream_t stream) : impl_(std::make_unique<Impl>()) {
  impl_->stream = stream;
  cublasLtHandle_t handle = nullptr;
  check_lt(cublasLtCreate(&handle), "cublasLtCreate");
  impl_->handle.reset(handle);
}

GemmPlans::~GemmPlans() = default;

void GemmPlans::run(const Gemm& gemm, void* workspace) {
  if (gemm.m == 0 || gemm.n == 0) return;
  const Impl::Plan& plan = impl_->plan(gemm, workspace);
  const cublasStatus_t status = impl_->matmul(plan.problem, gemm, plan.algo, workspace);
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(ExitCode::resource, "cuBLASLt: the GEMM {} failed: {}", key_of(gemm), cublasLtGetStatusString(status));
}

void GemmPlans::load(const std::filesystem::path& file) {
  const Json kept = impl_->kept(file);
  for (const auto& [shape, algo] : kept.items()) impl_->choices[shape] = algo.get<std::string>();
}

void GemmPlans::save(const std::filesystem::path& file) const {
  Json plans = impl_->kept(file);
  for (const auto& [shape, algo] : impl_->choices) plans[shape] = algo;
  std::filesystem::create_directories(file.parent_path());
  write_text_atomic(file, Json{{"made_for", impl_->header()}, {"plans", plans}}.dump(1) + "\n");
  impl_->changed = false;
}

bool GemmPlans::changed() const { return impl_->changed; }

std::string GemmPlans::library_version() {
  return cuda::library_version([](libraryPropertyType which) {
    int number = 0;
    check_lt(cublasLtGetProperty(which, &number), "cublasLtGetProperty");
    return number;
  });
}

}  // namespace kiln::cuda
