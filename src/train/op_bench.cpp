#include "train/op_bench.h"

#include <algorithm>
#include <functional>

#include "base/rng.h"
#include "graph/executor.h"
#include "graph/parameter.h"
#include "ops/attention.h"
#include "ops/classifier.h"
#include "ops/last_row.h"
#include "ops/linear.h"
#include "ops/rope.h"
#include "ops/swiglu.h"
#include "train/device.h"

namespace kiln {
namespace {

using Ids = std::vector<ValueId>;

constexpr std::int64_t kSequence = 256;  // tokens of one, where a GEMM rotates queries and keys

/// A plan, its memory on a device, and random numbers in what it reads.
class Bench {
 public:
  Bench(Backend& backend, DType dtype) : backend_(backend), dtype_(dtype) {}

  Plan& plan() { return plan_; }
  DType dtype() const { return dtype_; }
  /// In the device's dtype.
  ValueId input(Shape shape) { return input(TensorSpec{shape, dtype_}); }
  /// Real numbers are uniform in [-1, 1]; integers and scalars are 0.
  ValueId input(const TensorSpec& spec) {
    memory_.push_back(backend_.allocate(spec.bytes(), "benchmark"));
    tensors_.push_back({memory_.back().data(), spec});
    ids_.push_back(plan_.external("input", spec, Role::input));
    if (spec.dtype == DType::bf16 || spec.dtype == DType::f32) fill(tensors_.back());
    return ids_.back();
  }
  /// An input whose memory is another plan's.
  ValueId borrow(const Tensor& tensor) {
    tensors_.push_back(tensor);
    ids_.push_back(plan_.external("input", tensor.spec, Role::input));
    return ids_.back();
  }
  void add(OpPtr op, const Ids& in) {
    for (const ValueId out : plan_.add(std::move(op), in, "op")) plan_.keep(out);
  }

  /// After this the plan stands.
  Executor& executor() {
    if (executor_) return *executor_;
    executor_ = std::make_unique<Executor>(plan_, 1, backend_);
    for (std::size_t i = 0; i < ids_.size(); ++i) executor_->bind(ids_[i], tensors_[i]);
    return *executor_;
  }
  double median_seconds(int repeats) {
    for (int i = 0; i < 3; ++i) executor().run(Phase::micro, false);
    backend_.forget_marks();
    std::vector<std::size_t> marks{backend_.mark()};
    for (int i = 0; i < repeats; ++i) {
      executor().run(Phase::micro, false);
      marks.push_back(backend_.mark());
    }
    backend_.synchronize();
    std::vector<double> seconds;
    for (std::size_t i = 0; i + 1 < marks.size(); ++i)
      seconds.push_back(backend_.seconds_between(marks[i], marks[i + 1]));
    backend_.forget_marks();
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
  }

 private:
  /// A block of random numbers, over and over: drawing all of them would take longer than the benchmark.
  void fill(const Tensor& tensor) {
    constexpr std::int64_t kBlock = 1 << 20;
    const std::int64_t count = std::min(kBlock, tensor.numel());
    const Philox random(ids_.size(), stream_of("bench"));
    std::vector<float> wide;
    std::vector<bfloat16> narrow;
    for (std::int64_t i = 0; i < count; ++i) {
      wide.push_back(static_cast<float>(2 * random.uniform(static_cast<std::uint64_t>(i)) - 1));
      narrow.push_back(to_bfloat16(wide.back()));
    }
    const DType dtype = tensor.dtype();
    for (std::int64_t first = 0; first < tensor.numel(); first += count) {
      const Tensor piece{static_cast<std::byte*>(tensor.data) + static_cast<std::size_t>(first) * size_of(dtype),
                         {{std::min(count, tensor.numel() - first)}, dtype}};
      backend_.upload(piece, dtype == DType::bf16 ? static_cast<const void*>(narrow.data()) : wide.data());
    }
  }

  Backend& backend_;
  DType dtype_;
  Plan plan_;
  std::vector<Buffer> memory_;
  std::vector<Tensor> tensors_;
  Ids ids_;
  std::unique_ptr<Executor> executor_;
};

/// One layer's sizes, and the GEMMs in it.
class LayerGemms {
 public:
  LayerGemms(Backend& backend, std::string_view preset, std::int64_t tokens, int repeats)
      : backend_(backend),
        layout_(storage_layout(backend)),
        c_(padded(llama_preset(preset), layout_)),
        preset_(preset),
        tokens_(tokens),
        repeats_(repeats) {}

  std::vector<ModelGemm> run() {
    const std::int64_t q = c_.heads * c_.head_dim, qkv = q + 2 * c_.kv_heads * c_.head_dim;
    linear("qkv", qkv, c_.hidden);
    qkv_rope(qkv);
    linear("o", c_.hidden, q);
    linear("gate_up", 2 * c_.ffn, c_.hidden);
    gate_up_swiglu();
    linear("down", c_.hidden, c_.ffn);
    linear("head", c_.vocab, c_.hidden);
    down_dx_swiglu_dx();
    classifier();
    return std::move(list_);
  }

 private:
  void measure(const std::string& name, std::int64_t m, std::int64_t n, std::int64_t k,
               const std::function<void(Bench&)>& record) {
    Bench bench(backend_, layout_.dtype);
    record(bench);
    const bool one = bench.executor().packing().groups.size() == 1;
    list_.push_back({preset_, name, m, n, k, one, bench.median_seconds(repeats_)});
  }
  /// A projection of [tokens, columns] to rows, and its two gradients.
  void linear(const std::string& name, std::int64_t rows, std::int64_t columns) {
    measure(name, tokens_, rows, columns, [&](Bench& b) {
      b.add(std::make_shared<Linear>(), {b.input({tokens_, columns}), b.input({rows, columns})});
    });
    measure(name + " dx", tokens_, columns, rows, [&](Bench& b) {
      b.add(std::make_shared<LinearInputGradient>(), {b.input({tokens_, rows}), b.input({rows, columns})});
    });
    measure(name + " dw", rows, columns, tokens_, [&](Bench& b) {
      b.add(std::make_shared<LinearWeightGradient>(false), {b.input({tokens_, rows}), b.input({tokens_, columns})});
    });
  }
  void qkv_rope(std::int64_t qkv) {
    const AttentionShape shape{
        .heads = c_.heads, .kv_heads = c_.kv_heads, .head_dim = c_.head_dim, .seq_len = kSequence};
    measure("qkv + rope", tokens_, qkv, c_.hidden, [&](Bench& b) {
      const ValueId out =
          b.plan().add1(std::make_shared<Linear>(), {b.input({tokens_, c_.hidden}), b.input({qkv, c_.hidden})}, "qkv");
      b.plan().keep(out);
      b.add(std::make_shared<Rope>(shape, Rope::Direction::forward),
            {out, b.input({{kSequence, c_.head_dim}, accumulator_of(b.dtype())}), b.input({{1}, DType::i32})});
    });
  }
  void gate_up_swiglu() {
    measure("gate_up + swiglu", tokens_, 2 * c_.ffn, c_.hidden, [&](Bench& b) {
      const ValueId out = b.plan().add1(std::make_shared<Linear>(),
                                        {b.input({tokens_, c_.hidden}), b.input({2 * c_.ffn, c_.hidden})}, "gate_up");
      b.plan().keep(out);
      b.add(std::make_shared<SwiGlu>(), {out});
    });
  }
  void down_dx_swiglu_dx() {
    measure("down dx + swiglu dx", tokens_, c_.ffn, c_.hidden, [&](Bench& b) {
      const ValueId da = b.plan().add1(std::make_shared<LinearInputGradient>(),
                                       {b.input({tokens_, c_.hidden}), b.input({c_.hidden, c_.ffn})}, "da");
      b.add(std::make_shared<SwiGluGradient>(), {b.input({tokens_, 2 * c_.ffn}), da});
    });
  }
  /// Logits, dx and dw: three GEMMs, counted as one of three times the depth.
  void classifier() {
    measure("classifier, 3 GEMMs", tokens_, c_.vocab, 3 * c_.hidden, [&](Bench& b) {
      b.add(std::make_shared<Classifier>(Classifier::Options{.gradient = true}),
            {b.input({tokens_, c_.hidden}), b.input({c_.vocab, c_.hidden}), b.input({{tokens_}, DType::i32}),
             b.input(scalars_spec())});
    });
  }

  Backend& backend_;
  StorageLayout layout_;
  LlamaConfig c_;
  std::string preset_;
  std::int64_t tokens_;
  int repeats_;
  std::vector<ModelGemm> list_;
};

AttentionRate attention_rate(Backend& backend, const AttentionShape& shape, std::int64_t sequences, int repeats) {
  const DType dtype = storage_layout(backend).dtype;
  const std::int64_t rows = sequences * shape.seq_len;
  AttentionRate rate{.shape = shape, .sequences = sequences};
  Bench forward(backend, dtype);
  const ValueId qkv = forward.input({rows, shape.columns()});
  const Ids out = forward.plan().add(std::make_shared<Attention>(shape), {qkv}, "attention");
  for (const ValueId id : out) forward.plan().keep(id);
  rate.forward_seconds = forward.median_seconds(repeats);

  Bench backward(backend, dtype);
  const ValueId read = backward.borrow(forward.executor().tensor(qkv));
  const ValueId o = backward.borrow(forward.executor().tensor(out[0]));
  const ValueId lse = backward.borrow(forward.executor().tensor(out[1]));
  const ValueId dout = backward.input({rows, shape.heads * shape.head_dim});
  backward.add(std::make_shared<AttentionGradient>(shape), {read, o, lse, dout});
  rate.backward_seconds = backward.median_seconds(repeats);
  return rate;
}

}  // namespace

std::int64_t gpu_bench_tokens(std::int64_t hidden) {
  return std::clamp<std::int64_t>((std::int64_t{1} << 26) / hidden, 16384, 131072) / kSequence * kSequence;
}

double AttentionRate::forward_flops() const {
  const auto tokens = static_cast<double>(shape.seq_len);
  return 2.0 * static_cast<double>(sequences * shape.heads * shape.head_dim) * tokens * tokens;
}

double ModelGemm::flops_per_s() const {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / seconds;
}

std::vector<AttentionRate> bench_attention(Backend& backend, std::int64_t tokens, int repeats) {
  constexpr std::int64_t kWidth = 1024;
  std::vector<AttentionRate> list;
  for (const std::int64_t dim : {64, 128})
    for (const std::int64_t length : {256, 1024, 2048, 4096}) {
      const std::int64_t heads = kWidth / dim;
      const AttentionShape shape{.heads = heads, .kv_heads = heads, .head_dim = dim, .seq_len = length};
      const std::int64_t sequences = std::max<std::int64_t>(1, tokens / length / (length > 256 ? 2 : 1));
      list.push_back(attention_rate(backend, shape, sequences, repeats));
    }
  return list;
}

ModelGemmBench bench_model_gemms(Backend& backend, const std::vector<std::string>& presets, std::int64_t tokens,
                                 int repeats) {
  const DType dtype = storage_layout(backend).dtype;
  ModelGemmBench result;
  {
    // The last row of a matrix of one row is a copy of it.
    const std::int64_t elements = std::int64_t{1} << (backend.is_host() ? 24 : 28);
    Bench copy(backend, dtype);
    copy.add(std::make_shared<LastRow>(), {copy.input({1, elements})});
    const double bytes = 2.0 * static_cast<double>(elements) * static_cast<double>(size_of(dtype));
    result.copy_bytes_per_s = bytes / copy.median_seconds(repeats);
  }
  {
    const std::int64_t size = backend.is_host() ? 1024 : 8192;
    Bench square(backend, dtype);
    square.add(std::make_shared<Linear>(), {square.input({size, size}), square.input({size, size})});
    const ModelGemm gemm{.m = size, .n = size, .k = size, .seconds = square.median_seconds(repeats)};
    result.ceiling_flops_per_s = gemm.flops_per_s();
  }
  for (const std::string& preset : presets) {
    const std::int64_t count = tokens > 0          ? tokens
                               : backend.is_host() ? 2048
                                                   : gpu_bench_tokens(llama_preset(preset).hidden);
    check(count % kSequence == 0, "--tokens: {}, expected a multiple of {}", count, kSequence);
    for (ModelGemm& gemm : LayerGemms(backend, preset, count, repeats).run()) result.gemms.push_back(std::move(gemm));
  }
  return result;
}

}  // namespace kiln
