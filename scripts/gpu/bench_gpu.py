#!/usr/bin/env python3
"""kiln and its PyTorch peer on one GPU, section by section, each command under a time limit; one Markdown table last.

Usage: python scripts/gpu/bench_gpu.py --kiln build/cuda/kiln [--sections step60,step,seq,attention,gemm,curve,generate,tests]
           [--shards 'data/shards/train*'] [--tests build/cuda/test_kernels] [--limit 120] [--steps 10] [--no-peer]
           [--as-peer] [--within 0.6] [--work DIR] [--out results.md]

  step60     60M at 8, 32, 128 and 512 sequences of 256          seq        350M and 1B at 1024 and 2048
  step       130M, 350M and 1B at sequences of 256               attention  forward and backward, against SDPA
  gemm       every GEMM of the presets against its ceiling       curve      loss of fp32 and bf16_sr against PyTorch
  generate   a greedy text on GPU and CPU (from curve's model)   tests      the kernels' tests

Rows of the step sections run kiln and the peer one after the other. Neither clips gradients. The peer is all bf16;
kiln keeps fp32 masters and states, and with --as-peer is timed once more after the peer with bf16 weights and states,
with --within 0.6 with as few layers recomputed as keep 60 % of the peer's bytes (both: with those weights and states).
`curve` needs token shards of a vocabulary of at most 32000; `generate` needs
curve's checkpoint in --work, and a tokenizer (--tokenizer FILE).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
GIB = 1 << 30
# size, sequence length, sequences of a micro-batch
ROWS = {
    "step60": [("60m", 256, 8), ("60m", 256, 32), ("60m", 256, 128), ("60m", 256, 512)],
    "step": [("130m", 256, 256), ("350m", 256, 128), ("1b", 256, 64)],
    "seq": [("350m", 1024, 32), ("350m", 2048, 16), ("1b", 1024, 16), ("1b", 2048, 8)],
}
SECTIONS = ["step60", "step", "seq", "attention", "gemm", "curve", "generate", "tests"]
CURVE = {"seq": 256, "sequences": 128, "micro": 32, "steps": 300, "peak_lr": 1e-3, "warmup": 30, "seed": 1}


class Bench:
    def __init__(self, arguments):
        self.arguments = arguments
        self.lines = []
        self.work = pathlib.Path(arguments.work)
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self, command, limit=None):
        """Standard output; None after a failure or the time limit, which is told on standard error."""
        begin = time.monotonic()
        command = [str(part) for part in command]
        print("+", " ".join(command), file=sys.stderr, flush=True)
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  timeout=limit or self.arguments.limit)  # fmt: skip
        except (subprocess.TimeoutExpired, OSError) as error:
            print(f"  failed: {error}", file=sys.stderr, flush=True)
            return None
        print(f"  {time.monotonic() - begin:.1f} s, exit code {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode != 0:
            print((done.stdout[-1500:] + done.stderr[-1500:]).strip(), file=sys.stderr, flush=True)
            return None
        return done.stdout

    def run_json(self, command, limit=None):
        text = self.run(command, limit)
        if text is None:
            return None
        return json.loads(text.strip().splitlines()[-1])

    def kiln(self, *command):
        return self.run_json([self.arguments.kiln, *command, "--json"])

    def peer(self, script, *command):
        return None if self.arguments.no_peer else self.run_json([sys.executable, HERE / script, *command])

    def table(self, title, header, rows):
        self.lines += [f"### {title}", "", "| " + " | ".join(header) + " |", "|" + "-|" * len(header)]
        self.lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
        self.save()

    def save(self):
        """After every section, so that an end from outside loses nothing that was measured."""
        if self.arguments.out:
            pathlib.Path(self.arguments.out).write_text("\n".join(self.lines))

    def steps(self, section):
        rows = []
        for size, seq, sequences in ROWS[section]:
            count = self.arguments.steps if size != "60m" or sequences * seq >= 32768 else 5 * self.arguments.steps
            command = ["bench", "step", "--device", "cuda", "--preset", f"llama_{size}", "--seq", seq, "--sequences",
                       sequences, "--steps", count, "--clip-norm", 0]  # fmt: skip
            kiln = self.kiln(*command)
            peer = self.peer("torch_step.py", "--size", size, "--seq", seq, "--sequences", sequences, "--steps", count,
                             "--clip-norm", 0)  # fmt: skip
            rows.append([size, f"{sequences} x {seq}", *step_cells(kiln, peer)])
            for extra in self.extras():
                options = self.recompute_within(size, seq, sequences, peer, extra) if extra["within"] else []
                again = None if options is None else self.kiln(*command, *extra["options"], *options)
                cells = step_cells(again, peer)
                how = " ".join(options[1::2]) if options else "-"
                rows[-1] += [cells[0], cells[4], cells[6], cells[8]] + ([how] if extra["within"] else [])
            print("  " + " | ".join(rows[-1]), file=sys.stderr, flush=True)
        self.table(f"Whole steps ({section})",
                   ["model", "batch", "kiln ms", "PyTorch ms", "kiln tokens/s", "PyTorch tokens/s", "ratio",
                    "kiln MFU", "kiln GiB", "PyTorch GiB", "memory"]
                   + [cell for extra in self.extras() for cell in extra["header"]], rows)  # fmt: skip

    def extras(self):
        """What kiln is timed with once more, after the peer."""
        bf16 = ["--weights", "bf16_sr", "optimizer.states=bf16"] if self.arguments.as_peer else []
        ways = []
        if self.arguments.as_peer:
            ways.append({"options": bf16, "within": 0.0, "header": ["bf16 ms", "ratio", "GiB", "memory"]})
        if self.arguments.within:
            ways.append({"options": bf16, "within": self.arguments.within,
                         "header": ["within, ms", "ratio", "GiB", "memory", "recompute"]})  # fmt: skip
        return ways

    def recompute_within(self, size, seq, sequences, peer, extra):
        """Options of `kiln bench step` for the choice of `kiln plan` within a share of the peer's bytes, or None."""
        if peer is None:
            return None
        config = self.work / "within.yaml"
        config.write_text(
            f"run: {{dir: {self.work / 'within'}, device: cuda}}\nmodel: {{preset: llama_{size}}}\n"
            f"data: {{train: none, seq_len: {seq}}}\nbatch: {{sequences: {sequences}, micro: {sequences}}}\n"
            "schedule: {kind: constant, peak_lr: 0.001, total_steps: 1}\noptimizer: {kind: adamw}\n"
        )
        sets = ["precision.weights=bf16_sr", "optimizer.states=bf16"] if extra["options"] else []
        text = self.run([self.arguments.kiln, "plan", config, "--json", "--budget",
                         int(extra["within"] * peer["peak_bytes"]), *sets])  # fmt: skip
        if text is None:
            return None
        adamw = next(o for o in json.loads(text)["optimizers"] if o["optimizer"] == "adamw")
        if adamw["choice"] is None:
            return None
        options = ["--recompute", adamw["choice"]["recompute"]]
        if adamw["choice"]["recompute_layers"] is not None:
            options += ["--recompute-layers", str(adamw["choice"]["recompute_layers"])]
        return options

    def attention(self):
        kiln = self.kiln("bench", "attention", "--device", "cuda")
        if kiln is None:
            return
        peer = self.peer("torch_attention.py")
        others = {(r["seq_len"], r["head_dim"]): r for r in peer["attention"]} if peer else {}
        rows = []
        for r in kiln["attention"]:
            other = others.get((r["seq_len"], r["head_dim"]))
            row = [str(r[key]) for key in ("seq_len", "head_dim", "heads", "sequences")]
            for way in ("forward", "backward"):
                mine = r[f"{way}_tflops"]
                row.append(f"{mine:.0f}")
                for name in ("cudnn", "cudnn_packed", "flash"):
                    row.append(f"{other[name][f'{way}_tflops']:.0f}" if other else "-")
                for name in ("cudnn", "cudnn_packed"):
                    row.append(f"{mine / other[name][f'{way}_tflops']:.2f}" if other else "-")
            rows.append(row)
        self.table("Attention, causal, TFLOP/s",
                   ["T", "D", "heads", "sequences"]
                   + [f"{way} {column}" for way in ("fwd", "bwd")
                      for column in ("kiln", "cuDNN", "cuDNN packed", "flash", "kiln/cuDNN", "kiln/packed")],
                   rows)  # fmt: skip

    def gemm(self):
        kiln = self.kiln("bench", "gemm", "--device", "cuda")
        if kiln is None:
            return
        rows = [[g["preset"], g["name"], f"{g['m']} x {g['n']} x {g['k']}", f"{g['ms']:.3f}", f"{g['tflops']:.0f}",
                 f"{100 * g['tflops'] / kiln['ceiling_tflops']:.0f} %", "yes" if g["one_kernel"] else "no"]
                for g in kiln["gemms"]]  # fmt: skip
        title = f"GEMMs (ceiling {kiln['ceiling_tflops']:.0f} TFLOP/s at 8192^3; copy {kiln['copy_gb_per_s']:.0f} GB/s)"
        self.table(title, ["preset", "GEMM", "m x n x k", "ms", "TFLOP/s", "of ceiling", "one kernel"], rows)

    def train(self, name, *overrides):
        c = CURVE
        config = self.work / "curve.yaml"
        config.write_text(
            f"run: {{dir: {self.work / name}, seed: {c['seed']}, device: cuda}}\n"
            "model: {preset: llama_60m}\n"
            f"data: {{train: '{self.arguments.shards}', seq_len: {c['seq']}}}\n"
            f"batch: {{sequences: {c['sequences']}, micro: {c['micro']}}}\n"
            f"schedule: {{kind: cosine, peak_lr: {c['peak_lr']}, warmup_steps: {c['warmup']}, "
            f"total_steps: {c['steps']}, final_ratio: 0.1}}\n"
            "optimizer: {kind: adamw, weight_decay: 0.0, clip_norm: 1.0}\n"
            "checkpoint: {every: 0, keep: 3}\neval: {every: 0}\n"
        )
        return self.run([self.arguments.kiln, "train", config, "--quiet", "--resume", "none", *overrides])

    def curve(self):
        if not self.arguments.shards:
            print("curve: needs --shards", file=sys.stderr)
            return
        # One step at a rate that changes no weight leaves the initial weights in a checkpoint.
        if self.train("init", "schedule.total_steps=1", "schedule.warmup_steps=0", "schedule.peak_lr=1e-30") is None:
            return
        init = self.work / "init" / "step_00000001"
        curves = []
        for name in ("fp32", "bf16_sr"):
            if self.train(name, "--init-from", init, f"precision.weights={name}") is not None:
                curves.append(self.work / name / "metrics.jsonl")
        c = CURVE
        reference = self.work / "torch.jsonl"
        done = self.run([sys.executable, HERE / "torch_curve.py", "train", "--init", init, "--train",
                         self.arguments.shards, "--out", reference, "--seq", c["seq"], "--sequences", c["sequences"],
                         "--micro", c["micro"], "--steps", c["steps"], "--peak-lr", c["peak_lr"], "--warmup",
                         c["warmup"], "--seed", c["seed"]])  # fmt: skip
        if done is None or not curves:
            return
        result = self.run_json([sys.executable, HERE / "torch_curve.py", "compare", reference, *curves])
        if result is None:
            return
        rows = [[pathlib.Path(r["curve"]).parent.name, f"{result['last_loss'] + r['last_difference']:.4f}",
                 f"{result['last_loss']:.4f}", f"{r['first_step_difference']:+.5f}", f"{r['largest_difference']:+.4f}",
                 f"{r['mean_difference']:+.4f}", f"{r['last_difference']:+.4f}"] for r in result["curves"]]  # fmt: skip
        self.table(f"60M on the same {result['steps']} batches, means of {result['window']} steps, nats",
                   ["kiln weights", "kiln last", "PyTorch last", "difference of step 1", "largest difference",
                    "mean difference", "last difference"], rows)  # fmt: skip

    def generate(self):
        model = self.work / "fp32" / f"step_{CURVE['steps']:08d}"
        command = [self.arguments.kiln, "generate", model, "--prompt", self.arguments.prompt, "--temperature", "0",
                   "--tokens", "64"]  # fmt: skip
        if self.arguments.tokenizer:
            command += ["--tokenizer", self.arguments.tokenizer]
        rows = []
        for device in ("cuda", "cpu"):
            begin = time.monotonic()
            text = self.run([*command, "--device", device])
            seconds = f"{time.monotonic() - begin:.1f}"
            rows.append([device, seconds, "-" if text is None else " ".join(text.split()).replace("|", "\\|")])
        self.table("Greedy text of 64 tokens, with the loading of the model", ["device", "seconds", "text"], rows)

    def tests(self):
        if not self.arguments.tests:
            print("tests: needs --tests", file=sys.stderr)
            return
        text = self.run([self.arguments.tests, "--durations", "yes"], limit=max(self.arguments.limit, 400))
        self.table("Kernel tests", ["result"], [["failed, see above" if text is None else text.strip().splitlines()[-1]]])


def step_cells(kiln, peer):
    def value(source, key, form, scale=1.0):
        return "-" if source is None else form.format(source[key] * scale)

    both = kiln is not None and peer is not None
    ratio = f"{kiln['tokens_per_s'] / peer['tokens_per_s']:.2f}" if both else "-"
    memory = f"{100 * kiln['device_bytes'] / peer['peak_bytes']:.0f} %" if both else "-"
    return [value(kiln, "step_ms", "{:.2f}"), value(peer, "step_ms", "{:.2f}"), value(kiln, "tokens_per_s", "{:,.0f}"),
            value(peer, "tokens_per_s", "{:,.0f}"), ratio, value(kiln, "gemm_fraction", "{:.1f} %", 100),
            value(kiln, "device_bytes", "{:.2f}", 1 / GIB), value(peer, "peak_bytes", "{:.2f}", 1 / GIB),
            memory]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kiln", default="build/cuda/kiln")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--shards", default="", help="pattern of token shards, for curve")
    parser.add_argument("--tests", default="", help="the program test_kernels")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--prompt", default="It was a")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one command")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-peer", action="store_true", help="kiln alone")
    parser.add_argument("--as-peer", action="store_true", help="time kiln with bf16 weights and states too")
    parser.add_argument("--within", type=float, default=0.0, help="time kiln within this share of the peer's bytes too")
    parser.add_argument("--work", default="runs/bench_gpu")
    parser.add_argument("--out", default="", help="also write the tables to this file, after each section")
    arguments = parser.parse_args()
    wanted = arguments.sections.split(",")
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: {', '.join(unknown)}, expected some of {', '.join(SECTIONS)}")
    os.environ.setdefault("KILN_CACHE_DIR", str(pathlib.Path(arguments.work).resolve() / "plans"))
    bench = Bench(arguments)
    for name in wanted:
        bench.steps(name) if name in ROWS else getattr(bench, name)()
    print("\n".join(bench.lines))


if __name__ == "__main__":
    main()
