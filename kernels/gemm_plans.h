#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

#include "core/tensor.h"
#include "ops/gemm.h"

namespace kiln::cuda {

/// C[m,n] (+)= op(A)[m,k] op(B)[k,n], row-major; A and B bf16, sums f32, C bf16 or f32. Leading dimensions in elements.
/// Trans::yes: A is stored [k,m], B is stored [n,k]. With `add`, C = alpha op(A) op(B) + beta add.
struct Gemm {
  Trans trans_a = Trans::no, trans_b = Trans::no;
  std::int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  std::int64_t lda = 0;
  const void* b = nullptr;
  std::int64_t ldb = 0;
  void* c = nullptr;
  std::int64_t ldc = 0;
  DType c_type = DType::bf16;
  bool accumulate = false;    // adds to C
  const void* add = nullptr;  // as C and not C itself
  float alpha = 1, beta = 1;  // beta of `add`
  // So many problems, their matrices (and `add` as C) so many elements apart.
  std::int64_t batch = 1, stride_a = 0, stride_b = 0, stride_c = 0;
};

/// cuBLASLt GEMMs whose algorithm is chosen once by shape: the fastest of the heuristic's candidates, timed on the
/// first call's own operands. Choices are kept in a file, since another choice may round differently: a run repeats bit
/// for bit as long as the file stands.
///
/// floor  2mnk FLOPs over the tensor cores' rate, or A, B and C once over the memory's
class GemmPlans {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  explicit GemmPlans(cudaStream_t stream);
  ~GemmPlans();
  /// Enqueues one GEMM; `workspace` holds kWorkspaceBytes. The first call of a shape times candidates and waits; it
  /// must not happen while the stream is being captured. A usage Error when cuBLASLt has no algorithm for the shape.
  void run(const Gemm& gemm, void* workspace);

  /// Choices from a file, if it is there and was made for this device and library; chosen from now on they are added to
  /// it at save().
  void load(const std::filesystem::path& file);
  void save(const std::filesystem::path& file) const;
  bool changed() const;

  /// cuBLASLt's, such as "13.1.0"; needs no device.
  static std::string library_version();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kiln::cuda
