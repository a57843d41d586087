#include "optim/lora.h"

#include <cmath>

#include "base/rng.h"
#include "core/parallel.h"
#include "ops/gemm.h"

namespace kiln {
namespace {

Moments moments_of(const Parameter& parameter, const LoraUpdate::Options& o, bool of_a) {
  const LowRankShape at(parameter.shape, o.rank);
  return Moments(parameter, of_a ? Shape{at.rank, at.n} : Shape{at.m, at.rank},
                 {.beta1 = o.beta1, .beta2 = o.beta2, .eps = o.eps, .precision = o.states, .seed = o.seed},
                 of_a ? "lora_a_" : "lora_b_");
}

/// Zero but where the second moment is among the largest 1 - kLoraPruned; scratch [numel].
template <typename T>
void prune(const MomentViews<T>& moments, T* scratch) {
  const std::int64_t n = moments.second.numel();
  const T* v = moments.second.load_all(scratch);
  if (v != scratch) std::copy(v, v + n, scratch);
  T* least = scratch + static_cast<std::int64_t>(kLoraPruned * static_cast<double>(n));
  std::nth_element(scratch, least, scratch + n);
  const T threshold = *least;
  moments.for_blocks([=](std::int64_t, std::int64_t count, T* first, T* second) {
    for (std::int64_t i = 0; i < count; ++i)
      if (second[i] < threshold) first[i] = second[i] = 0;
  });
}

/// x <- keep x - rate direction, and the direction becomes the change of x.
template <typename T>
void move(std::int64_t count, T keep, T rate, T* x, T* direction) {
  parallel_for(count, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T before = x[i];
      x[i] = keep * before - rate * direction[i];
      direction[i] = x[i] - before;
    }
  });
}

}  // namespace

LoraUpdate::LoraUpdate(Parameter parameter, const Options& options)
    : UpdateOp(std::move(parameter)),
      options_(options),
      at_(this->parameter().shape, options.rank),
      of_a_(moments_of(this->parameter(), options, true)),
      of_b_(moments_of(this->parameter(), options, false)) {
  check_matrix(this->parameter());
}

std::vector<StateSpec> LoraUpdate::states(const Parameter& parameter, const Options& options) {
  const LowRankShape at(parameter.shape, options.rank);
  std::vector<StateSpec> list{{"lora_a", {{at.rank, at.n}, DType::f32}}, {"lora_b", {{at.m, at.rank}, DType::f32}}};
  moments_of(parameter, options, true).append_specs(list);
  moments_of(parameter, options, false).append_specs(list);
  return list;
}

std::size_t LoraUpdate::workspace_bytes(std::span<const TensorSpec> in) const {
  return size_of(in[0].dtype) * static_cast<std::size_t>((at_.m + at_.n) * at_.rank);
}

Cost LoraUpdate::cost(std::span<const TensorSpec>) const {
  const double elements = static_cast<double>(at_.m * at_.n), rank = static_cast<double>(at_.rank);
  return {8.0 * elements * rank, 24.0 * elements};  // G read twice; W read and written twice
}

double LoraUpdate::rewarmed(std::int64_t step) const {
  if (!options_.restart || options_.rewarm < 1 || refresh_epoch(schedule(), step) == 0) return 1.0;
  const std::int64_t since = (step - 1 - schedule().offset) % options_.refresh;
  return std::min(1.0, static_cast<double>(since + 1) / static_cast<double>(options_.rewarm));
}

void LoraUpdate::update(const UpdateArgs& args) const {
  visit_real(args.w.dtype(), [&]<typename T>() { update_as<T>(args); });
}

template <typename T>
void LoraUpdate::start(std::int64_t step, T* a, T* b, const MomentViews<T>& of_a, const MomentViews<T>& of_b,
                       T* scratch) const {
  const auto epoch = options_.restart ? static_cast<std::uint64_t>(refresh_epoch(schedule(), step)) : 0;
  const Philox random(options_.seed, stream_of(parameter().name.c_str()) + epoch);
  const double bound = 1.0 / std::sqrt(static_cast<double>(at_.n));
  parallel_for(at_.rank * at_.n, 1024, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t e = begin; e < end; ++e)
      a[e] = static_cast<T>((2.0 * random.uniform(static_cast<std::uint64_t>(e)) - 1.0) * bound);
  });
  std::fill_n(b, at_.m * at_.rank, T(0));
  for (const MomentViews<T>* moments : {&of_a, &of_b}) {
    if (step > 1)
      prune(*moments, scratch);
    else
      moments->for_blocks([](std::int64_t, std::int64_t count, T* first, T* second) {
        std::fill_n(first, count, T(0));
        std::fill_n(second, count, T(0));
      });
  }
}

template <typename T>
void LoraUpdate::update_as(const UpdateArgs& args) const {
  const double step = scalar(args.scalars, Scalar::step), clip = scalar(args.scalars, Scalar::clip_scale);
  const auto number = static_cast<std::int64_t>(step);
  const double lr = scalar(args.scalars, Scalar::lr) * rewarmed(number),
               s = options_.alpha / static_cast<double>(at_.rank);
  const std::int64_t m = at_.m, n = at_.n, r = at_.rank;
  T *w = args.w.as<T>(), *a = args.states[0].as<T>(), *b = args.states[1].as<T>();
  const T* g = args.g.as<T>();
  std::span<const Tensor> states = args.states.subspan(2);
  const MomentViews<T> of_a = of_a_.views<T>(states, number), of_b = of_b_.views<T>(states, number);
  T *da = static_cast<T*>(args.workspace.data), *db = da + r * n;
  if (draws(number)) start(number, a, b, of_a, of_b, da);

  const T scale = static_cast<T>(s), grad_scale = static_cast<T>(s * clip);
  gemm<T>({.trans_b = Trans::yes,
           .m = m,
           .n = r,
           .k = n,
           .a = g,
           .lda = n,
           .b = a,
           .ldb = n,
           .c = db,
           .ldc = r,
           .alpha = grad_scale});
  gemm<T>({.trans_a = Trans::yes,
           .m = r,
           .n = n,
           .k = m,
           .a = b,
           .lda = r,
           .b = g,
           .ldb = n,
           .c = da,
           .ldc = n,
           .alpha = grad_scale});
  const double root = std::sqrt(1.0 - std::pow(options_.beta2, step));
  const T rate = static_cast<T>(lr / (1.0 - std::pow(options_.beta1, step)));
  const T keep = static_cast<T>(parameter().decay ? 1.0 - lr * options_.weight_decay : 1.0);
  auto add = [&](const T* left, const T* right) {  // W += s left right
    gemm<T>({.m = m,
             .n = n,
             .k = r,
             .a = left,
             .lda = r,
             .b = right,
             .ldb = n,
             .c = w,
             .ldc = n,
             .alpha = scale,
             .beta = 1});
  };
  of_a_.advance(of_a, da, da, root);
  move(r * n, keep, rate, a, da);
  add(b, da);
  of_b_.advance(of_b, db, db, root);
  move(m * r, keep, rate, b, db);
  add(db, a);
}

std::unique_ptr<Optimizer> make_lora(const OptimizerOptions& o) {
  return std::make_unique<SplitOptimizer<LoraUpdate>>(o.kind,
                                                      LoraUpdate::Options{.beta1 = o.beta1,
                                                                          .beta2 = o.beta2,
                                                                          .eps = o.eps,
                                                                          .weight_decay = o.weight_decay,
                                                                          .rank = o.rank,
                                                                          .alpha = o.alpha,
                                                                          .restart = o.kind == OptimizerKind::relora,
                                                                          .refresh = o.refresh,
                                                                          .stagger = o.stagger,
                                                                          .rewarm = o.rewarm,
                                                                          .seed = o.seed,
                                                                          .states = o.states},
                                                      adam_options(o, AdamForm::pytorch, o.states));
}

}  // namespace kiln
