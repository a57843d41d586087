#!/usr/bin/env python3
"""kiln against PyTorch on the CPU: tokens/s of whole training steps, interleaved in one run.

Usage: python scripts/bench_cpu_compare.py [--presets 9m,60m] [--sequences 8] [--seq 256] [--rounds 5] [--steps 5]
                                           [--threads T] [--record]          (needs a release build and PyTorch)

Each round runs `kiln bench step` and the same number of steps of scripts/bench_cpu.py, one after the other and in
alternating order, so that both see the machine in the same state. Figures are medians over the rounds. The GEMM
ceiling is the fastest other library's rate at 2048^3, measured by kiln before and after its steps.
--record writes the table to scripts/results/cpu_step.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = ["model", "batch", "kiln ms", "PyTorch ms", "kiln tokens/s", "PyTorch tokens/s", "ratio (range)",
           "kiln GFLOP/s", "GEMM GFLOP/s", "of GEMM"]  # fmt: skip


class PyTorch:
    """The server of bench_cpu.py for one model."""

    def __init__(self, arguments, preset):
        command = [arguments.python, str(ROOT / "scripts/bench_cpu.py"), "--serve", "--preset", preset,
                   "--sequences", str(arguments.sequences), "--seq", str(arguments.seq),
                   "--threads", str(arguments.threads)]  # fmt: skip
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.description = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"bench_cpu_compare: scripts/bench_cpu.py ended with exit code {self.process.wait()}")
        return json.loads(line)

    def measure(self, steps):
        self.process.stdin.write(f"step {steps}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure_kiln(arguments, preset):
    command = [arguments.kiln, "bench", "step", "--preset", f"llama_{preset}", "--sequences", str(arguments.sequences),
               "--seq", str(arguments.seq), "--steps", str(arguments.steps), "--threads", str(arguments.threads),
               "--json"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        sys.exit(f"bench_cpu_compare: {arguments.kiln}: {error.strerror}; build it (cmake --build --preset release)")
    if done.returncode != 0:
        sys.exit(f"bench_cpu_compare: kiln bench step ended with exit code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def check_same_work(kiln, torch):
    flops = 1e9 * kiln["step_gflops"] / kiln["tokens_per_s"]
    if abs(flops / torch["flops_per_token"] - 1) > 1e-6 or kiln["threads"] != torch["threads"]:
        sys.exit(
            f"bench_cpu_compare: the sides differ: kiln {flops:.0f} FLOPs per token on {kiln['threads']} threads, "
            f"PyTorch {torch['flops_per_token']} on {torch['threads']}"
        )


def compare(arguments, preset):
    """One row of the table, with what describes PyTorch and the ceiling."""
    server = PyTorch(arguments, preset)
    kiln, torch = [], []
    for number in range(arguments.rounds):
        sides = [
            lambda: kiln.append(measure_kiln(arguments, preset)),
            lambda: torch.append(server.measure(arguments.steps)),
        ]
        for side in sides if number % 2 == 0 else reversed(sides):
            side()
            time.sleep(arguments.pause)  # idle worker threads stop spinning
        check_same_work(kiln[-1], server.description)
        print(f"{preset} round {number + 1} of {arguments.rounds}: kiln {kiln[-1]['tokens_per_s']:.0f} tokens/s, "
              f"PyTorch {torch[-1]['tokens_per_s']:.0f}", file=sys.stderr)  # fmt: skip
    server.close()

    def median(side, key):
        return statistics.median(result[key] for result in side)

    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(kiln, torch)]
    ratio = median(kiln, "tokens_per_s") / median(torch, "tokens_per_s")
    row = [preset, f"{arguments.sequences} x {arguments.seq}", f"{median(kiln, 'step_ms'):.1f}",
           f"{1e3 * median(torch, 'seconds'):.1f}", f"{median(kiln, 'tokens_per_s'):.0f}",
           f"{median(torch, 'tokens_per_s'):.0f}", f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
           f"{median(kiln, 'step_gflops'):.1f}", f"{median(kiln, 'gemm_gflops_ceiling'):.1f}",
           f"{100 * median(kiln, 'gemm_fraction'):.1f} %"]  # fmt: skip
    return row, server.description | {"gemm_library": kiln[-1]["gemm_library"]}


def markdown(rows):
    lines = [COLUMNS, ["-"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def revision():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "CMakeLists.txt")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with local changes" if changed else "")


def record(arguments, table, facts):
    command = (f"python scripts/bench_cpu_compare.py --presets {','.join(arguments.presets)} "
               f"--sequences {arguments.sequences} --seq {arguments.seq} --rounds {arguments.rounds} "
               f"--steps {arguments.steps} --threads {arguments.threads} --record")  # fmt: skip
    adamw = " and ".join(sorted({fact["adamw"] for fact in facts}))
    text = f"""# Training step on the CPU: kiln and PyTorch

`{command}`

{datetime.date.today().isoformat()}, {processor()}, {arguments.threads} threads of {os.cpu_count()}; kiln {revision()};
PyTorch {facts[0]["torch"]}, eager, fp32, scaled_dot_product_attention, AdamW ({adamw}, the faster one). Medians of
{arguments.rounds} interleaved rounds of {arguments.steps} steps, each step with forward, backward, clipping and AdamW.
The GEMM rate is that of {facts[0]["gemm_library"]} at 2048 x 2048 x 2048, measured around kiln's steps of every round.

{table}
"""
    path = ROOT / "scripts/results/cpu_step.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    print(f"written to {path.relative_to(ROOT)}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", type=lambda text: text.split(","), default=["9m", "60m"])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two measurements")
    parser.add_argument("--kiln", default=str(ROOT / "build/release/kiln"), help="the program")
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--record", action="store_true", help="write scripts/results/cpu_step.md")
    arguments = parser.parse_args()
    arguments.kiln = str(pathlib.Path(arguments.kiln).resolve())
    for key in ("sequences", "seq", "rounds", "steps", "threads"):
        if getattr(arguments, key) < 1:
            parser.error(f"--{key}: {getattr(arguments, key)}, expected at least 1")

    results = [compare(arguments, preset) for preset in arguments.presets]
    table = markdown([row for row, _ in results])
    print(table)
    if arguments.record:
        record(arguments, table, [facts for _, facts in results])


if __name__ == "__main__":
    main()
