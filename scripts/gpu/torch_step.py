#!/usr/bin/env python3
"""Whole training steps of the PyTorch peer on one GPU: torch.compile, SDPA, fused AdamW, bf16. Prints one JSON object.

Usage: python scripts/gpu/torch_step.py --size 60m --sequences 512 [--seq 256] [--micro-batches 1] [--steps 10]
                                        [--weights bf16|fp32]
With fp32 the weights, gradients and states are fp32 and the forward pass runs under bf16 autocast; with bf16 all of
them are bf16, which is the faster peer.
"""

import argparse
import contextlib
import json
import time

import torch
from torch_llama import SIZES, VOCAB, Llama


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=32, help="of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="0: no clipping")
    arguments = parser.parse_args()

    torch.manual_seed(1)
    device = torch.device("cuda")
    model = Llama(*SIZES[arguments.size]).to(device)
    autocast = contextlib.nullcontext()
    if arguments.weights == "bf16":
        model = model.to(torch.bfloat16)
    else:
        autocast = torch.autocast("cuda", torch.bfloat16)
    flops = model.flops_per_token(arguments.seq)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    compiled = torch.compile(model)
    shape = (arguments.micro_batches, arguments.sequences, arguments.seq)
    tokens = torch.randint(VOCAB, shape, device=device)
    targets = torch.randint(VOCAB, shape, device=device)
    cos, sin = model.rope(arguments.seq, device)

    def step():
        for m in range(arguments.micro_batches):
            with autocast:
                loss = compiled(tokens[m], targets[m], cos, sin) / arguments.micro_batches
            loss.backward()
        if arguments.clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    median = sorted(seconds)[len(seconds) // 2]
    rate = tokens.numel() / median
    print(json.dumps({"size": arguments.size, "seq": arguments.seq, "sequences": arguments.sequences,
                      "micro_batches": arguments.micro_batches, "weights": arguments.weights, "step_ms": median * 1e3,
                      "tokens_per_s": rate, "peak_bytes": torch.cuda.max_memory_allocated(),
                      "mfu": rate * flops / 989e12, "loss": loss.item() * arguments.micro_batches,
                      "torch": torch.__version__, "device": torch.cuda.get_device_name()}))  # fmt: skip


if __name__ == "__main__":
    main()
