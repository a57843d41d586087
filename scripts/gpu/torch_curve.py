#!/usr/bin/env python3
"""The loss curve of the PyTorch peer on the batches of a kiln run, from the same initial weights; and curves compared.

Usage: python scripts/gpu/torch_curve.py train --init CKPT --train 'data/shards/train*' --out torch.jsonl
           [--seq 256] [--sequences 128] [--micro 32] [--steps 300] [--peak-lr 0.001] [--warmup 30] [--seed 1]
           [--compute bf16|fp32]
       python scripts/gpu/torch_curve.py compare A.jsonl B.jsonl ... [--window 20]

`train`: fp32 master weights and AdamW states; forward and backward under bf16 autocast, or in fp32. Cosine schedule to
10 %, clipping at 1, as kiln's `schedule: {kind: cosine}`. `compare` reads files with `step` and `loss` a line (kiln's
metrics.jsonl is one) and prints one JSON object: each later curve against the first, smoothed over a window of steps.
"""

import argparse
import contextlib
import json
import math
import pathlib


def learning_rate(step, peak, warmup, total, final_ratio=0.1):
    """src/train/schedule.cpp, cosine; steps count from 1."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(arguments):
    import torch
    from kiln_data import Samples
    from torch_llama import load_checkpoint

    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_checkpoint(arguments.init).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    compiled = torch.compile(model)
    bf16 = arguments.compute == "bf16"
    autocast = torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext()
    data = Samples(arguments.train, arguments.seq, arguments.seed)
    cos, sin = model.rope(arguments.seq, "cuda")
    parts = arguments.sequences // arguments.micro
    with open(arguments.out, "w") as out:
        for step in range(1, arguments.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.peak_lr, arguments.warmup, arguments.steps)
            first = (step - 1) * arguments.sequences
            batch = torch.stack([data.sample(first + i) for i in range(arguments.sequences)]).cuda()
            total = torch.zeros((), device="cuda")
            for part in batch.split(arguments.micro):
                with autocast:
                    loss = compiled(part[:, :-1].contiguous(), part[:, 1:].contiguous(), cos, sin) / parts
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            out.write(json.dumps({"step": step, "loss": total.item(), "grad_norm": norm.item()}) + "\n")


def read_curve(path):
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
    return {row["step"]: row["loss"] for row in rows}


def smoothed(curve, steps, window):
    return [sum(curve[s] for s in steps[i : i + window]) / window for i in range(len(steps) - window + 1)]


def compare(arguments):
    curves = [read_curve(path) for path in arguments.curves]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(steps) < arguments.window:
        raise SystemExit(f"torch_curve: {len(steps)} common steps, expected at least the window of {arguments.window}")
    reference = smoothed(curves[0], steps, arguments.window)
    result = {"reference": arguments.curves[0], "steps": len(steps), "window": arguments.window,
              "last_loss": reference[-1], "curves": []}  # fmt: skip
    for path, curve in zip(arguments.curves[1:], curves[1:]):
        differences = [b - a for a, b in zip(reference, smoothed(curve, steps, arguments.window))]
        result["curves"].append({"curve": path, "largest_difference": max(differences, key=abs),
                                 "mean_difference": sum(differences) / len(differences),
                                 "last_difference": differences[-1],
                                 "first_step_difference": curve[steps[0]] - curves[0][steps[0]]})  # fmt: skip
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("--init", required=True)
    one.add_argument("--train", required=True)
    one.add_argument("--out", required=True)
    one.add_argument("--seq", type=int, default=256)
    one.add_argument("--sequences", type=int, default=128)
    one.add_argument("--micro", type=int, default=32)
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--peak-lr", type=float, default=1e-3)
    one.add_argument("--warmup", type=int, default=30)
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--compute", choices=("bf16", "fp32"), default="bf16")
    two = commands.add_parser("compare")
    two.add_argument("curves", nargs="+")
    two.add_argument("--window", type=int, default=20)
    arguments = parser.parse_args()
    train(arguments) if arguments.command == "train" else compare(arguments)


if __name__ == "__main__":
    main()
