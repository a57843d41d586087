#include <CLI/CLI.hpp>
#include <iostream>
#include <memory>

#include "apps/commands.h"
#include "base/json.h"
#include "core/parallel.h"
#include "train/device.h"
#include "train/step_bench.h"
#include "train/trainer.h"

namespace kiln {
namespace {

struct BenchArguments {
  std::string preset = "llama_9m", optimizer = "adamw";
  std::string device = "auto", weights = "fp32", recompute = "none";
  std::int64_t sequences = 8, seq_len = 256, m = 2048, n = 2048, k = 2048;
  int micro_batches = 1, steps = 5, repeats = 5, threads = 0;
  double clip_norm = 1.0;
  bool json = false;
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
  fmt::print("{:<28} {:>9} {:>7} {:>10} {:>9}\n", "op", "ms", "share", "GFLOP/s", "GB/s");
  for (const OpTime& op : b.ops)
    fmt::print("{:<28} {:>9.2f} {:>6.1f}% {:>10.1f} {:>9.1f}\n", op.op, op.seconds * 1e3,
               100 * op.seconds / b.step_seconds, op.flops / op.seconds / 1e9, op.bytes / op.seconds / 1e9);
}

Recompute parse_recompute(std::string_view name) {
  for (const Recompute recompute : kRecomputes)
    if (to_string(recompute) == name) return recompute;
  fail(ExitCode::usage, "--recompute {}, expected none, norms or block", name);
}

void run_step(const BenchArguments& a) {
  set_threads(a);
  Config config;  // its defaults are the optimizers' defaults
  config.optimizer.kind = parse_optimizer_kind(a.optimizer);
  const StepBench bench = bench_step({.model = llama_preset(a.preset),
                                      .optimizer = optimizer_options(config),
                                      .batch = {.sequences = a.sequences, .seq_len = a.seq_len},
                                      .micro_batches = a.micro_batches,
                                      .steps = a.steps,
                                      .device = parse_device(a.device),
                                      .clip_norm = a.clip_norm,
                                      .recompute = parse_recompute(a.recompute),
                                      .masters = a.weights == "fp32"});
  if (!a.json) return print_step(a, bench);
  Json json{{"preset", a.preset},
            {"sequences", a.sequences},
            {"seq_len", a.seq_len},
            {"optimizer", a.optimizer},
            {"recompute", a.recompute},
            {"threads", thread_count()},
            {"device", bench.device},
            {"device_bytes", bench.device_bytes},
            {"micro_batches", a.micro_batches},
            {"tokens", a.micro_batches * a.sequences * a.seq_len},
            {"step_ms", bench.step_seconds * 1e3},
            {"tokens_per_s", bench.tokens_per_s},
            {"step_gflops", bench.step_flops / bench.step_seconds / 1e9},
            {"gemm_gflops_ceiling", bench.gemm_flops_per_s / 1e9},
            {"gemm_library", bench.gemm_library},
            {"gemm_fraction", bench.gemm_fraction()},
            {"loss", bench.loss}};
  std::cout << json.dump() << '\n';
}

void run_gemm(const BenchArguments& a) {
  set_threads(a);
  for (const GemmRate& rate : bench_gemm(a.m, a.n, a.k, a.repeats))
    fmt::print("{:<16} {:>4} x {:>4} x {:>4}: {:>8.1f} GFLOP/s\n", rate.library, a.m, a.n, a.k, rate.flops_per_s / 1e9);
}

}  // namespace

void add_bench_command(CLI::App& app) {
  CLI::App* command = app.add_subcommand("bench", "Measure kiln's own figures");
  command->require_subcommand(1);
  command->footer("Example:\n  kiln bench step --preset llama_60m --sequences 8");
  auto a = std::make_shared<BenchArguments>();
  CLI::App* step = command->add_subcommand("step", "whole training steps on synthetic tokens, by op");
  step->add_option("--preset", a->preset)->capture_default_str();
  step->add_option("--optimizer", a->optimizer, "adamw, galore or fira")->capture_default_str();
  step->add_option("--sequences", a->sequences, "of one micro-batch")->capture_default_str();
  step->add_option("--micro-batches", a->micro_batches, "of one step")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  step->add_option("--device", a->device, "auto, cpu or cuda")->capture_default_str();
  step->add_option("--weights", a->weights, "fp32 or bf16_sr, on a GPU")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp32", "bf16_sr"}));
  step->add_option("--recompute", a->recompute, "none, norms or block; what is recomputed is no FLOP of the model")
      ->capture_default_str()
      ->check(CLI::IsMember({"none", "norms", "block"}));
  step->add_option("--clip-norm", a->clip_norm, "0: no clipping")->capture_default_str();
  step->add_option("--seq", a->seq_len)->capture_default_str();
  step->add_option("--steps", a->steps)->capture_default_str()->check(CLI::PositiveNumber);
  CLI::App* gemm = command->add_subcommand("gemm", "f32 GEMM of every library of this build, C[m,n] = A[m,k] B[n,k]'");
  gemm->add_option("-m", a->m)->capture_default_str();
  gemm->add_option("-n", a->n)->capture_default_str();
  gemm->add_option("-k", a->k)->capture_default_str();
  gemm->add_option("--repeats", a->repeats)->capture_default_str();
  for (CLI::App* sub : {step, gemm}) {
    sub->add_option("--threads", a->threads, "default: OMP_NUM_THREADS, or every processor");
    add_quiet_flag(*sub);
  }
  step->add_flag("--json", a->json, "one JSON object");
  step->callback([a] { run_step(*a); });
  gemm->callback([a] { run_gemm(*a); });
}

}  // namespace kiln
