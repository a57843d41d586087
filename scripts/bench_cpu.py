#!/usr/bin/env python3
"""Training throughput of kiln and of PyTorch on this CPU, interleaved, on synthetic tokens.

Usage: python scripts/bench_cpu.py [--kiln build/release/kiln] [--preset llama_9m] [--sequences 8] [--rounds 5]
                                   [--threads T] [--steps 3] [--record FILE]      (needs PyTorch)

Every round measures both, the first one alternating, so that a change of clock or of load reaches both alike. A step is
forward, backward, clipping to norm 1 and AdamW, all fp32. PyTorch runs eager with scaled_dot_product_attention (causal),
F.rms_norm, cross_entropy and the faster of AdamW's fused and foreach forms. The ratio is the median of the rounds'
ratios. "GEMM ceiling" is kiln's rate over the whole step as a share of the best library's 2048^3 GEMM.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

VOCAB = 32000
PRESETS = {  # hidden, ffn, heads, layers
    "llama_9m": (128, 352, 4, 4),
    "llama_60m": (512, 1376, 8, 8),
    "llama_130m": (768, 2048, 12, 12),
}


class Norm(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


def linear(inputs, outputs):
    return torch.nn.Linear(inputs, outputs, bias=False)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(torch.nn.Module):
    def __init__(self, hidden, ffn, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(hidden), Norm(hidden)
        self.qkv, self.o = linear(hidden, 3 * hidden), linear(hidden, hidden)
        self.gate, self.up, self.down = linear(hidden, ffn), linear(hidden, ffn), linear(ffn, hidden)

    def forward(self, x, cos, sin):
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(o.transpose(1, 2).reshape(batch, length, hidden))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(torch.nn.Module):
    def __init__(self, hidden, ffn, heads, layers, length):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, hidden)
        self.blocks = torch.nn.ModuleList(Block(hidden, ffn, heads) for _ in range(layers))
        self.norm, self.head = Norm(hidden), linear(hidden, VOCAB)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, 0, 0.02)
        size = hidden // heads
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
        angle = torch.cat((angle, angle), dim=-1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


class TorchTrainer:
    def __init__(self, preset, sequences, length, steps):
        torch.manual_seed(1)
        self.model = Llama(*PRESETS[preset], length)
        self.tokens = torch.randint(VOCAB, (sequences, length))
        self.targets = torch.randint(VOCAB, (sequences * length,))
        self.steps = steps
        self.optimizer = None
        self.kind = None

    def use(self, kind):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.01, **{kind: True})
        self.kind = kind

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(self.tokens).flatten(0, 1), self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def choose_optimizer(self):
        """Fused or foreach, whichever updates faster; also warms up."""
        seconds = {}
        for kind in ("foreach", "fused"):
            self.use(kind)
            self.step()
            times = []
            for _ in range(5):
                begin = time.perf_counter()
                self.optimizer.step()
                times.append(time.perf_counter() - begin)
            seconds[kind] = min(times)
        self.use(min(seconds, key=seconds.get))

    def measure(self):
        """Tokens/s at the median step, after one that is not timed."""
        self.step()
        times = []
        for _ in range(self.steps):
            begin = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - begin)
        return self.tokens.numel() / statistics.median(times)


def measure_kiln(arguments):
    command = [arguments.kiln, "bench", "step", "--preset", arguments.preset]
    command += ["--sequences", str(arguments.sequences), "--seq", str(arguments.seq), "--steps", str(arguments.steps)]
    command += ["--threads", str(arguments.threads), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}: exit {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def cpu_model():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def relative_command():
    """This call, with paths relative to the working directory or, from elsewhere, by their last part."""

    def shorten(word):
        name, equals, value = word.rpartition("=")
        if not os.path.isabs(value):
            return word
        relative = os.path.relpath(value)
        return name + equals + (os.path.basename(value) if relative.startswith("..") else relative)

    script = os.path.relpath(os.path.abspath(__file__), pathlib.Path(__file__).resolve().parent.parent)
    return shlex.join(["python", script, *map(shorten, sys.argv[1:])])


def table(arguments, rounds, torch_kind):
    def cells(pick):
        values = [pick(r) for r in rounds]
        return statistics.median(values), min(values), max(values)

    kiln = cells(lambda r: r["kiln"]["tokens_per_s"])
    pytorch = cells(lambda r: r["torch"])
    ratio = cells(lambda r: r["kiln"]["tokens_per_s"] / r["torch"])
    ceiling = cells(lambda r: r["kiln"]["gemm_gflops_ceiling"])
    fraction = cells(lambda r: 100 * r["kiln"]["gemm_fraction"])
    library = rounds[0]["kiln"]["gemm_library"]
    rows = [
        ("kiln, tokens/s", "{:.0f}", kiln),
        (f"PyTorch {torch.__version__} eager ({torch_kind} AdamW), tokens/s", "{:.0f}", pytorch),
        ("kiln / PyTorch, per round", "{:.2f}", ratio),
        (f"GEMM ceiling ({library}, 2048^3), GFLOP/s", "{:.1f}", ceiling),
        ("kiln's step, % of the GEMM ceiling", "{:.1f}", fraction),
    ]
    lines = [
        f"## {arguments.preset}, {arguments.sequences} x {arguments.seq} tokens, fp32, CPU",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- CPU: {cpu_model()}, {arguments.threads} threads",
        f"- rounds: {len(rounds)}, {arguments.steps} timed steps each, kiln and PyTorch alternating",
        f"- command: `{relative_command()}`",
        "",
        "| | median | min | max |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {name} | {' | '.join(form.format(v) for v in values)} |" for name, form, values in rows]
    return "\n".join(lines) + "\n"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kiln", default="build/release/kiln")
    parser.add_argument("--preset", choices=PRESETS, default="llama_9m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--record", type=pathlib.Path, help="append the result to this file as a markdown table")
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps, arguments.threads, arguments.sequences, arguments.seq) < 1:
        parser.error("counts must be at least 1")
    if not os.access(arguments.kiln, os.X_OK):
        parser.error(f"--kiln {arguments.kiln}: no such program; build it first")
    return arguments


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    trainer = TorchTrainer(arguments.preset, arguments.sequences, arguments.seq, arguments.steps)
    trainer.choose_optimizer()
    rounds = []
    for i in range(arguments.rounds):
        measured = {}
        for which in ("kiln", "torch") if i % 2 == 0 else ("torch", "kiln"):
            measured[which] = measure_kiln(arguments) if which == "kiln" else trainer.measure()
        rounds.append(measured)
        kiln, pytorch = measured["kiln"]["tokens_per_s"], measured["torch"]
        print(f"round {i + 1}: kiln {kiln:.0f}, PyTorch {pytorch:.0f} tokens/s, ratio {kiln / pytorch:.2f}", flush=True)
    text = table(arguments, rounds, trainer.kind)
    print("\n" + text, end="")
    if arguments.record:
        new = not arguments.record.exists()
        with arguments.record.open("a") as file:
            file.write(text if new else "\n" + text)


if __name__ == "__main__":
    main()
