#!/usr/bin/env python3
"""kiln merge against the page cache and mergekit: ten fp32 checkpoints of the 60M model, averaged.

Usage: python scripts/bench_merge.py [--checkpoints 10] [--rounds 5] [--threads T] [--work DIR] [--kiln PROGRAM]
                                     [--mergekit PYTHON] [--record]     (needs a release build, numpy and safetensors)

Each round measures, one after the other, so that all see the machine in the same state: reading the files from the page
cache (preads of 1 MiB on T threads), writing a new file as large as the output (pwrites of 256 KiB, without fsync),
`kiln merge`, and mergekit's `linear` where PYTHON is an interpreter that has it. Averaging is held against the time of
that reading and of that writing; outputs are removed and the disk is synced before each.
kiln is timed as a process, with hashes of its inputs and of its output, fsync and manifest; mergekit inside a process
that has imported it already. kiln runs twice: on the directories as `transformers` leaves them, which record no hash,
so that theirs are computed while they are averaged; and on the same weights in directories with kiln's manifests, whose
hashes are verified before the first byte is written, by a pass of its own. `kiln bench merge` then measures reading,
averaging and hashing where nothing is written, against its own preads of the same files.
Figures are medians over the rounds, shares those of each round; both merges are compared with numpy's fp64 sum, bit for
bit. Only a machine that does nothing else gives meaningful shares.
--record writes the table to scripts/results/merge.md.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
HIDDEN, FFN, LAYERS, HEADS, VOCAB = 512, 1376, 8, 8, 32000

# A process inherits the peak of the one that started it, so a small one stands between.
PEAK = """
import resource, subprocess, sys, time
begin = time.perf_counter()
status = subprocess.call(sys.argv[1:])
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""

MERGEKIT = """
import importlib.metadata, sys, time
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
models = [{"model": path, "parameters": {"weight": 1.0}} for path in sys.argv[3:]]
config = MergeConfiguration.model_validate({"merge_method": "linear", "dtype": "float32", "models": models})
options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, num_threads=int(sys.argv[2]))
begin = time.perf_counter()
run_merge(config, sys.argv[1], options)
seconds = time.perf_counter() - begin
print(importlib.metadata.version("mergekit"), torch.__version__.split("+")[0], seconds)
"""

NOTE = """\
Merging is held against reading alone with nothing written and nothing hashed. Hashes of every input, and writing the output
beside reading, come on top: the row of the merge as it is run has its share of reading alone too.
"""


def shapes():
    table = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN),
             "model.norm.weight": (HIDDEN,)}  # fmt: skip
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            table[f"{at}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        table[f"{at}mlp.gate_proj.weight"] = table[f"{at}mlp.up_proj.weight"] = (FFN, HIDDEN)
        table[f"{at}mlp.down_proj.weight"] = (HIDDEN, FFN)
        table[f"{at}input_layernorm.weight"] = table[f"{at}post_attention_layernorm.weight"] = (HIDDEN,)
    return table


def write_checkpoints(work, count):
    import numpy
    from safetensors.numpy import save_file

    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
              "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
              "num_key_value_heads": HEADS, "vocab_size": VOCAB, "max_position_embeddings": 1024,
              "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip
    directories = []
    for i in range(count):
        directories.append(work / f"checkpoint-{i + 1}")
        directories[-1].mkdir(parents=True)
        random = numpy.random.default_rng(i)
        tensors = {name: 0.02 * random.standard_normal(shape, dtype=numpy.float32) for name, shape in shapes().items()}
        save_file(tensors, directories[-1] / "model.safetensors", metadata={"format": "pt"})
        (directories[-1] / "config.json").write_text(json.dumps(config))
    return directories


def read_cached(files, threads):
    """GB/s of reading all files, once the page cache holds them."""

    def read(part):
        buffer = bytearray(1 << 20)
        for path in part:
            descriptor, offset = os.open(path, os.O_RDONLY), 0
            while count := os.preadv(descriptor, [buffer], offset):
                offset += count
            os.close(descriptor)

    workers = [threading.Thread(target=read, args=(files[i::threads],)) for i in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(path.stat().st_size for path in files) / (time.perf_counter() - begin) / 1e9


def write_cached(path, size, threads):
    """GB/s of writing a new file to the page cache."""
    path.unlink(missing_ok=True)
    os.sync()
    piece, descriptor = b"\1" * (1 << 18), os.open(path, os.O_WRONLY | os.O_CREAT)

    def write(thread):
        for offset in range(thread << 18, size, threads << 18):
            os.pwrite(descriptor, piece[: size - offset], offset)

    workers = [threading.Thread(target=write, args=(thread,)) for thread in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    return size / seconds / 1e9


def run(command, threads):
    """Output, seconds and peak resident MiB of a process."""
    command = [sys.executable, "-S", "-c", PEAK, *(str(word) for word in command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"bench_merge: {command[4]} ended with exit code {done.returncode}")
    output, last = done.stdout.rstrip().rsplit("\n", 1)
    seconds, peak = last.split()
    return output, float(seconds), float(peak)


def clear(directory):
    """The one after the other finds no output to replace, and no disk that still writes."""
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()


def equals_reference(directories, merged):
    """Whether the merge is the fp64 sum, oldest first, rounded once."""
    import numpy
    from safetensors import safe_open

    inputs = [safe_open(directory / "model.safetensors", "numpy") for directory in directories]
    output = safe_open(merged / "model.safetensors", "numpy")
    for name in shapes():
        total = numpy.zeros(shapes()[name], numpy.float64)
        for tensors in inputs:
            total += tensors.get_tensor(name).astype(numpy.float64) * (1.0 / len(inputs))
        if (output.get_tensor(name).view(numpy.uint32) != total.astype(numpy.float32).view(numpy.uint32)).any():
            return False
    return True


def with_manifests(directories, work, arguments):
    """The same weights in checkpoints of kiln: merges of one."""
    made = []
    for directory in directories:
        made.append(work / f"manifest-{directory.name}")
        run([arguments.kiln, "merge", directory, "--out", made[-1], "--json"], arguments.threads)
        if not (made[-1] / "MANIFEST.json").exists():
            sys.exit(f"bench_merge: {made[-1]} has no manifest")
    return made


def merge(directories, out, arguments):
    """Report, seconds and peak of one merge."""
    clear(out)
    output, seconds, peak = run([arguments.kiln, "merge", *directories, "--out", out, "--json"], arguments.threads)
    return json.loads(output), seconds, peak


def measure(arguments, work):
    directories = write_checkpoints(work, arguments.checkpoints)
    recorded = with_manifests(directories, work, arguments)
    files = [directory / "model.safetensors" for directory in directories]
    # Fills the cache.
    read_cached(files + [directory / "model.safetensors" for directory in recorded], arguments.threads)
    total, size = sum(path.stat().st_size for path in files) / 1e9, files[0].stat().st_size
    rounds = []
    for _ in range(arguments.rounds):
        before = read_cached(files, arguments.threads)
        write = write_cached(work / "written", size, arguments.threads)
        report, seconds, peak = merge(directories, work / "kiln", arguments)
        cache = (before + read_cached(files, arguments.threads)) / 2
        one = {"cache": cache, "write": write, "apart": total / cache + size / 1e9 / write, "seconds": seconds,
               "peak": peak, "average": total / report["average_seconds"]}  # fmt: skip
        one["average share"] = one["average"] / cache
        one["apart share"] = one["apart"] / report["average_seconds"]
        verified, one["verified seconds"], _ = merge(recorded, work / "verified", arguments)
        if verified["verified_files"] != len(recorded):
            sys.exit(f"bench_merge: {verified['verified_files']} of {len(recorded)} hashes were verified")
        one["verify"] = total / verified["open_seconds"]
        output, _, _ = run([arguments.kiln, "bench", "merge", *directories, "--repeats", 3, "--json",
                            "--threads", arguments.threads], arguments.threads)  # fmt: skip
        one |= {f"unwritten {key}": value for key, value in json.loads(output).items()}
        if arguments.mergekit:
            clear(work / "mergekit")
            command = [arguments.mergekit, "-c", MERGEKIT, work / "mergekit", arguments.threads, *directories]
            output, _, one["mergekit peak"] = run(command, arguments.threads)
            *arguments.versions, seconds_taken = output.split()[-3:]
            one["mergekit seconds"] = float(seconds_taken)
            one["ratio"] = one["mergekit seconds"] / seconds
            one["ratio apart"] = one["mergekit seconds"] / one["apart"]
        rounds.append(one)
    median = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    median["exact"] = all(equals_reference(directories, work / out) for out in ("kiln", "verified"))
    return median


def table(arguments, median):
    rows = [
        ("page cache, preads of 1 MiB", f"{median['cache']:.1f} GB/s"),
        ("page cache, pwrites of 256 KiB to a new file", f"{median['write']:.1f} GB/s"),
        ("those two one after the other, inputs and output", f"{median['apart']:.3f} s"),
        ("kiln: reading, hashing, averaging and writing back", f"{median['average']:.1f} GB/s of inputs, "
         f"{100 * median['average share']:.0f} % of reading alone, "
         f"{100 * median['apart share']:.0f} % of both one after the other"),
        ("kiln: the whole command, with fsync and manifest", f"{median['seconds']:.2f} s"),
        ("kiln: the same of inputs with manifests, verified before",
         f"{median['verified seconds']:.2f} s, of it verifying at {median['verify']:.1f} GB/s"),
        ("kiln bench merge: preads of 1 MiB", f"{median['unwritten read_gb_per_s']:.1f} GB/s"),
        ("kiln bench merge: reading and averaging, nothing written",
         f"{median['unwritten average_gb_per_s']:.1f} GB/s, "
         f"{100 * median['unwritten average_fraction']:.0f} % of that"),
        ("kiln bench merge: reading, hashing and averaging, nothing written",
         f"{median['unwritten hashed_gb_per_s']:.1f} GB/s, {100 * median['unwritten hashed_fraction']:.0f} %"),
        ("kiln: peak resident memory", f"{median['peak']:.0f} MiB"),
        ("kiln: equal to the fp64 sum rounded once", "bit for bit" if median["exact"] else "NO"),
    ]
    if arguments.mergekit:
        mergekit, torch = arguments.versions
        rows += [(f"mergekit {mergekit} linear (PyTorch {torch}), imports not counted",
                  f"{median['mergekit seconds']:.2f} s"),
                 ("mergekit: peak resident memory", f"{median['mergekit peak']:.0f} MiB"),
                 ("kiln is faster by", f"{median['ratio']:.1f} x"),
                 ("reading and writing one after the other would be faster by",
                  f"{median['ratio apart']:.1f} x")]  # fmt: skip
    return "| what | figure |\n|-|-|\n" + "\n".join(f"| {what} | {figure} |" for what, figure in rows) + "\n\n" + NOTE


def processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=pathlib.Path, help="directory for about 6 GB; a temporary one otherwise")
    parser.add_argument("--kiln", default=ROOT / "build/release/kiln")
    parser.add_argument("--mergekit", help="a Python interpreter with mergekit")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        median = measure(arguments, pathlib.Path(work))
    text = table(arguments, median)
    print(text)
    if arguments.record:
        command = f"python scripts/bench_merge.py --rounds {arguments.rounds}"
        if arguments.mergekit:
            command += " --mergekit PYTHON"
        header = (f"# Merging {arguments.checkpoints} fp32 checkpoints of the 60M model\n\n- Command: `{command}`\n"
                  f"- Device: {processor()}, {arguments.threads} threads, load before {load:.1f}\n"
                  f"- Date: {datetime.date.today().isoformat()}\n\n")  # fmt: skip
        (ROOT / "scripts/results/merge.md").write_text(header + text)


if __name__ == "__main__":
    main()
