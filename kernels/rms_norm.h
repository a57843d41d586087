#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "core/tensor.h"
#include "kernels/row_order.h"

namespace kiln::cuda {

/// y = r rstd w, with 1/rstd^2 = mean(r^2) + eps over a row (ops/rms_norm.h), r = x + delta rounded to bf16 where there
/// is a delta, else x.
///
/// in     x [rows,width] bf16    w [width]    delta [rows,width] or null; width a multiple of 8, at most 8192
/// out    y [rows,width]    rstd [rows] f32    sum [rows,width]: r, with a delta alone
/// stream enqueues one kernel; capturable; bitwise deterministic
/// floor  the inputs and outputs once over the memory's bandwidth
struct NormForward {
  const __nv_bfloat16 *x = nullptr, *w = nullptr, *delta = nullptr;
  __nv_bfloat16 *y = nullptr, *sum = nullptr;
  float* rstd = nullptr;
  std::int64_t rows = 0;
  int width = 0;
  float eps = 0;
  RowOrder order = RowOrder::ascending;
};
/// error  Error(usage) where norm_forward does not take x
void check_norm_width(const TensorSpec& x);
void norm_forward(const NormForward& args, cudaStream_t stream);

}  // namespace kiln::cuda
