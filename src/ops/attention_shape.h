#pragma once
#include <cstdint>

namespace kiln {

/// How the columns of a fused projection [N, (H + 2 Hkv) D] are laid out: H query heads, Hkv key heads, Hkv value
/// heads.
struct AttentionShape {
  std::int64_t heads = 1, kv_heads = 1, head_dim = 1;
  std::int64_t seq_len = 1;  // T: rows n of sequence n / T, position n % T

  std::int64_t columns() const { return (heads + 2 * kv_heads) * head_dim; }
  std::int64_t query_column(std::int64_t head) const { return head * head_dim; }
  std::int64_t key_column(std::int64_t kv_head) const { return (heads + kv_head) * head_dim; }
  std::int64_t value_column(std::int64_t kv_head) const { return (heads + kv_heads + kv_head) * head_dim; }
};

}  // namespace kiln
