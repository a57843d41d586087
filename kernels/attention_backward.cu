#include "kernels/attention_backward.cuh"

namespace kiln::cuda {

std::size_t attention_backward_workspace_bytes(const AttentionShape& shape, std::int64_t rows) {
  check_attention(shape, rows);
  if (attention_gradient_fuses(shape)) return 0;
  return static_cast<std::size_t>(rows / shape.seq_len * shape.heads * padded_tokens(shape)) * 2 * sizeof(float);
}

void attention_backward(const AttentionShape& shape, std::int64_t rows, const AttentionBackward& args,
                        cudaStream_t stream) {
  check_attention(shape, rows);
  if (attention_gradient_fuses(shape)) return attention_fused_gradient(shape, rows, args, stream);
  attention_query_gradient(shape, rows, args, stream);
  attention_key_gradient(shape, rows, args, stream);
}

}  // namespace kiln::cuda
