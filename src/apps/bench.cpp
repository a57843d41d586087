#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "apps/commands.h"
#include "base/json.h"
#include "core/parallel.h"
#include "merge/inputs.h"
#include "merge/merge_bench.h"
#include "train/device.h"
#include "train/op_bench.h"
#include "train/step_bench.h"
#include "train/trainer.h"

namespace kiln {
namespace {

struct BenchArguments {
  std::string preset = "llama_9m", optimizer = "adamw";
  std::string device = "auto", weights = "fp32", recompute = "none";
  std::vector<std::string> overrides;                                                     // of the configuration
  std::vector<std::string> presets{"llama_60m", "llama_130m", "llama_350m", "llama_1b"};  // of GEMMs on a GPU
  std::int64_t sequences = 8, seq_len = 256, m = 2048, n = 2048, k = 2048;
  std::vector<std::filesystem::path> checkpoints;  // of a merge
  std::int64_t tokens = 0;                         // 0: the device's default
  int op_repeats = 20;                             // of attention, and of GEMMs on a GPU
  int micro_batches = 1, steps = 5, repeats = 5, threads = 0;
  std::int64_t recompute_layers = 0;  // 0: all
  double clip_norm = 1.0;
  bool by_shape = false, json = false;
};

void set_threads(const BenchArguments& a) {
  Config config;
  if (a.threads > 0) config.run.threads = a.threads;
  set_thread_count(rank_threads(config));
}

void print_step(const BenchArguments& a, const StepBench& b) {
  const std::string where = b.device == "cpu" ? fmt::format("{} threads", thread_count()) : b.device;
  fmt::print("{} batch {} x {} x {}, {}, {}: {:.2f} ms a step, {:.0f} tokens/s, loss {:.4f}\n", a.preset,
             a.micro_batches, a.sequences, a.seq_len, a.optimizer, where, b.step_seconds * 1e3, b.tokens_per_s, b.loss);
  if (b.device == "cpu")
    fmt::print("{:.1f} GFLOP/s of a {} GEMM's {:.1f} (2048^3): {:.1f} %\n\n", b.step_flops / b.step_seconds / 1e9,
               b.gemm_library, b.gemm_flops_per_s / 1e9, 100 * b.gemm_fraction());
  else
    fmt::print("{:.1f} TFLOP/s, MFU {:.1f} % of the {} {:.0f}; {:.2f} GiB allocated\n\n",
               b.step_flops / b.step_seconds / 1e12, 100 * b.gemm_fraction(), b.gemm_library, b.gemm_flops_per_s / 1e12,
               static_cast<double>(b.device_bytes) / (1 << 30));
  const int width = a.by_shape ? 54 : 28;
  fmt::print("{:<{}} {:>9} {:>7} {:>10} {:>9}\n", "op", width, "ms", "share", "GFLOP/s", "GB/s");
  for (const OpTime& op : b.ops)
    fmt::print("{:<{}} {:>9.2f} {:>6.1f}% {:>10.1f} {:>9.1f}\n", op.op, width, op.seconds * 1e3,
               100 * op.seconds / b.step_seconds, op.flops / op.seconds / 1e9, op.bytes / op.seconds / 1e9);
}

Recomputation parse_recompute(const BenchArguments& a) {
  check(a.recompute_layers == 0 || a.recompute != to_string(Recompute::none),
        "--recompute-layers {}: set --recompute to norms or block, or leave the number out", a.recompute_layers);
  for (const Recompute recompute : kRecomputes)
    if (to_string(recompute) == a.recompute)
      return {recompute, a.recompute_layers > 0 ? a.recompute_layers : Recomputation::kAll};
  fail(ExitCode::usage, "--recompute {}, expected none, norms or block", a.recompute);
}

void run_step(const BenchArguments& a) {
  set_threads(a);
  std::vector<std::string> overrides{"optimizer.kind=" + a.optimizer};
  overrides.insert(overrides.end(), a.overrides.begin(), a.overrides.end());
  const Config config = parse_config("{}", "kiln bench step", overrides);
  const StepBench bench = bench_step({.model = llama_preset(a.preset),
                                      .optimizer = optimizer_options(config),
                                      .batch = {.sequences = a.sequences, .seq_len = a.seq_len},
                                      .micro_batches = a.micro_batches,
                                      .steps = a.steps,
                                      .device = parse_device(a.device),
                                      .clip_norm = a.clip_norm,
                                      .recompute = parse_recompute(a),
                                      .masters = a.weights == "fp32",
                                      .gradients = config.precision.gradients,
                                      .update_in_backward = config.memory.update == UpdatePlacement::in_backward,
                                      .by_shape = a.by_shape});
  if (!a.json) return print_step(a, bench);
  Json json{{"preset", a.preset},
            {"sequences", a.sequences},
            {"seq_len", a.seq_len},
            {"optimizer", a.optimizer},
            {"recompute", a.recompute},
            {"recompute_layers", a.recompute_layers > 0 ? Json(a.recompute_layers) : Json(nullptr)},
            {"threads", thread_count()},
            {"device", bench.device},
            {"device_bytes", bench.device_bytes},
            {"micro_batches", a.micro_batches},
            {"tokens", a.micro_batches * a.sequences * a.seq_len},
            {"step_ms", bench.step_seconds * 1e3},
            {"mean_step_ms", bench.mean_seconds * 1e3},
            {"slowest_step_ms", bench.slowest_seconds * 1e3},
            {"tokens_per_s", bench.tokens_per_s},
            {"step_gflops", bench.step_flops / bench.step_seconds / 1e9},
            {"gemm_gflops_ceiling", bench.gemm_flops_per_s / 1e9},
            {"gemm_library", bench.gemm_library},
            {"gemm_fraction", bench.gemm_fraction()},
            {"loss", bench.loss},
            {"ops_ms", Json::object()}};
  for (const OpTime& op : bench.ops) json["ops_ms"][op.op] = op.seconds * 1e3;
  std::cout << json.dump() << '\n';
}

void run_cpu_gemm(const BenchArguments& a) {
  const std::vector<GemmRate> rates = bench_gemm(a.m, a.n, a.k, a.repeats);
  if (!a.json) {
    for (const GemmRate& rate : rates)
      fmt::print("{:<16} {:>4} x {:>4} x {:>4}: {:>8.1f} GFLOP/s\n", rate.library, a.m, a.n, a.k,
                 rate.flops_per_s / 1e9);
    return;
  }
  Json json{{"device", "cpu"}, {"m", a.m}, {"n", a.n}, {"k", a.k}, {"gflops", Json::object()}};
  for (const GemmRate& rate : rates) json["gflops"][rate.library] = rate.flops_per_s / 1e9;
  std::cout << json.dump() << '\n';
}

void run_device_gemms(const BenchArguments& a, Backend& backend) {
  const ModelGemmBench bench = bench_model_gemms(backend, a.presets, a.tokens, a.op_repeats);
  if (a.json) {
    Json json{{"device", backend.name()},
              {"copy_gb_per_s", bench.copy_bytes_per_s / 1e9},
              {"ceiling_tflops", bench.ceiling_flops_per_s / 1e12},
              {"gemms", Json::array()}};
    for (const ModelGemm& g : bench.gemms)
      json["gemms"].push_back({{"preset", g.model},
                               {"name", g.name},
                               {"m", g.m},
                               {"n", g.n},
                               {"k", g.k},
                               {"one_kernel", g.one_kernel},
                               {"ms", g.seconds * 1e3},
                               {"tflops", g.flops_per_s() / 1e12}});
    std::cout << json.dump() << '\n';
    return;
  }
  fmt::print("{}: copy {:.0f} GB/s, GEMM 8192^3 {:.0f} TFLOP/s\n\n", backend.name(), bench.copy_bytes_per_s / 1e9,
             bench.ceiling_flops_per_s / 1e12);
  fmt::print("{:<11} {:<22} {:>7} {:>7} {:>7} {:>9} {:>9} {:>8}\n", "preset", "GEMM", "m", "n", "k", "ms", "TFLOP/s",
             "ceiling");
  for (const ModelGemm& g : bench.gemms)
    fmt::print("{:<11} {:<22} {:>7} {:>7} {:>7} {:>9.3f} {:>9.1f} {:>7.1f}%{}\n", g.model, g.name, g.m, g.n, g.k,
               g.seconds * 1e3, g.flops_per_s() / 1e12, 100 * g.flops_per_s() / bench.ceiling_flops_per_s,
               g.one_kernel ? "" : "  (apart)");
}

void run_gemm(const BenchArguments& a) {
  set_threads(a);
  const std::unique_ptr<Backend> backend = open_device(parse_device(a.device));
  if (backend->is_host()) return run_cpu_gemm(a);
  run_device_gemms(a, *backend);
}

void run_attention(const BenchArguments& a) {
  set_threads(a);
  const std::unique_ptr<Backend> backend = open_device(parse_device(a.device));
  const std::int64_t tokens = a.tokens > 0 ? a.tokens : backend->is_host() ? 2048 : 131072;
  const std::vector<AttentionRate> rates = bench_attention(*backend, tokens, a.op_repeats);
  if (a.json) {
    Json json{{"device", backend->name()}, {"attention", Json::array()}};
    for (const AttentionRate& r : rates)
      json["attention"].push_back({{"seq_len", r.shape.seq_len},
                                   {"head_dim", r.shape.head_dim},
                                   {"heads", r.shape.heads},
                                   {"sequences", r.sequences},
                                   {"forward_ms", r.forward_seconds * 1e3},
                                   {"forward_tflops", r.forward_flops_per_s() / 1e12},
                                   {"backward_ms", r.backward_seconds * 1e3},
                                   {"backward_tflops", r.backward_flops_per_s() / 1e12}});
    std::cout << json.dump() << '\n';
    return;
  }
  fmt::print("{}: causal attention, FLOPs of the causal half, backward 2.5 times forward\n\n", backend->name());
  fmt::print("{:>5} {:>4} {:>6} {:>10} {:>11} {:>11} {:>12} {:>12}\n", "T", "D", "heads", "sequences", "forward ms",
             "backward ms", "fwd TFLOP/s", "bwd TFLOP/s");
  for (const AttentionRate& r : rates)
    fmt::print("{:>5} {:>4} {:>6} {:>10} {:>11.3f} {:>11.3f} {:>12.2f} {:>12.2f}\n", r.shape.seq_len, r.shape.head_dim,
               r.shape.heads, r.sequences, r.forward_seconds * 1e3, r.backward_seconds * 1e3,
               r.forward_flops_per_s() / 1e12, r.backward_flops_per_s() / 1e12);
}

void run_merge(const BenchArguments& a) {
  set_threads(a);
  const MergeBench b = bench_merge(expand_checkpoints(a.checkpoints), a.repeats);
  const auto rate = [&](double seconds) { return static_cast<double>(b.bytes) / seconds / 1e9; };
  if (a.json) {
    Json json{{"threads", thread_count()},
              {"bytes", b.bytes},
              {"read_gb_per_s", rate(b.read_seconds)},
              {"average_gb_per_s", rate(b.average_seconds)},
              {"average_fraction", b.average_fraction},
              {"hashed_gb_per_s", rate(b.hashed_seconds)},
              {"hashed_fraction", b.hashed_fraction}};
    std::cout << json.dump() << '\n';
    return;
  }
  fmt::print("{} threads, {:.2f} GB of tensors in the page cache, nothing written\n\n", thread_count(),
             static_cast<double>(b.bytes) / 1e9);
  fmt::print("{:<32} {:>8.1f} GB/s\n", "preads of 1 MiB", rate(b.read_seconds));
  fmt::print("{:<32} {:>8.1f} GB/s, {:.0f} % of that\n", "reading and averaging", rate(b.average_seconds),
             100 * b.average_fraction);
  fmt::print("{:<32} {:>8.1f} GB/s, {:.0f} %\n", "reading, hashing and averaging", rate(b.hashed_seconds),
             100 * b.hashed_fraction);
}

}  // namespace

void add_bench_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure kiln's own figures");
  command->require_subcommand(1);
  command->footer("Example:\n  kiln bench step --preset llama_60m --sequences 8");
  auto a = std::make_shared<BenchArguments>();
  CLI::App* step = command->add_subcommand("step", "whole training steps on synthetic tokens, by op");
  step->add_option("overrides", a->overrides, "optimizer.*, memory.update and precision.gradients, as key.path=value");
  step->add_option("--preset", a->preset)->capture_default_str();
  step->add_option("--optimizer", a->optimizer, "a member of the family, by its optimizer.kind")->capture_default_str();
  step->add_option("--sequences", a->sequences, "of one micro-batch")->capture_default_str();
  step->add_option("--micro-batches", a->micro_batches, "of one step")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  step->add_option("--weights", a->weights, "fp32 or bf16_sr, on a GPU")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp32", "bf16_sr"}));
  step->add_option("--recompute", a->recompute, "none, norms or block; what is recomputed is no FLOP of the model")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "norms", "block"}));
  step->add_option("--recompute-layers", a->recompute_layers,
                   "the first so many; the others by the policy before; otherwise all")
      ->check(CLI::PositiveNumber);
  step->add_option("--clip-norm", a->clip_norm, "0: no clipping")->capture_default_str();
  step->add_flag("--by-shape", a->by_shape, "a row of the table for every op and shape");
  step->add_option("--seq", a->seq_len)->capture_default_str();
  step->add_option("--steps", a->steps)->capture_default_str()->check(CLI::PositiveNumber);
  CLI::App* gemm = command->add_subcommand(
      "gemm", "on the CPU: f32 C[m,n] = A[m,k] B[n,k]' by every library of this build; on a GPU: every GEMM of a step");
  gemm->add_option("-m", a->m)->capture_default_str();
  gemm->add_option("-n", a->n)->capture_default_str();
  gemm->add_option("-k", a->k)->capture_default_str();
  gemm->add_option("--repeats", a->repeats, "on the CPU")->capture_default_str();
  gemm->add_option("--presets", a->presets, "on a GPU: the models")->delimiter(',')->capture_default_str();
  CLI::App* attention = command->add_subcommand("attention", "causal attention, forward and backward, T 256 to 4096");
  for (CLI::App* sub : {gemm, attention}) {
    sub->add_option("--tokens", a->tokens, "of a batch; default: more than the caches hold");
    sub->add_option("--op-repeats", a->op_repeats, "runs of each op, of which the median counts")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
  }
  CLI::App* merge = command->add_subcommand(
      "merge", "reading, hashing and averaging checkpoints, against reading them; nothing is written");
  merge->add_option("checkpoints", a->checkpoints, "checkpoint directories, or a run's directory of snapshots")
      ->required();
  merge->add_option("--repeats", a->repeats, "rounds, of which the median counts")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  merge->add_flag("--json", a->json, "one JSON object");
  merge->add_option("--threads", a->threads, "default: OMP_NUM_THREADS, or every processor");
  add_quiet_flag(*merge);
  for (CLI::App* sub : {step, gemm, attention}) {
    sub->add_option("--device", a->device, "auto, cpu or cuda")->capture_default_str();
    sub->add_flag("--json", a->json, "one JSON object");
    sub->add_option("--threads", a->threads, "default: OMP_NUM_THREADS, or every processor");
    add_quiet_flag(*sub);
  }
  step->callback([a] { run_step(*a); });
  gemm->callback([a] { run_gemm(*a); });
  attention->callback([a] { run_attention(*a); });
  merge->callback([a] { run_merge(*a); });
}

}  // namespace kiln
