#pragma once
#include "graph/plan.h"

namespace kiln {

/// Linear head and cross-entropy in one, in chunks of tokens: the [N,V] logits never exist, only [chunk,V], which the
/// softmax overwrites. With `gradient` the forward pass leaves dx and dw as
/// well, so backward() has nothing to recompute.
///
/// in     x [N,C] f32|f64|bf16    w [V,C]    targets [N] i32, in [0,V) or -100 (ignored)    scalars (graph/parameter.h)
/// out    losses [N], f32 for bf16: -log softmax(x W')_target, 0 where ignored;  with `gradient` also dx [N,C] and dw
/// [V,C] of
///        Scalar::loss_scale * sum(losses)
/// grad   hands out dx and dw; losses are the root of backward(), whose seed is loss_scale
/// error  inner sizes differ
class Classifier final : public Op {
 public:
  struct Options {
    bool gradient = false;
    std::int64_t valid_vocab = 0;  // rows of w that are classes, the rest being padding (0: all); for devices that pad
    std::int64_t chunk_tokens = 384;  // of which logits live at once; measured best at C = 128 and 512
  };
  static constexpr std::int32_t kIgnoredTarget = -100;

  explicit Classifier(Options options) : options_(options) {}
  std::string_view name() const override { return options_.gradient ? "classifier_with_gradient" : "classifier"; }
  std::vector<TensorSpec> infer(std::span<const TensorSpec> in) const override;
  void gradient(GradientContext& context) const override;
  std::size_t workspace_bytes(std::span<const TensorSpec> in) const override;
  Cost cost(std::span<const TensorSpec> in) const override;
  void run_cpu(const KernelArgs& args) const override;
  const Options& options() const { return options_; }

 private:
  Options options_;
};

}  // namespace kiln
