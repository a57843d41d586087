#!/usr/bin/env python3
"""Causal attention through PyTorch's SDPA, cuDNN and flash, at the shapes of `kiln bench attention`. Prints one JSON
object; FLOPs are those of the causal half, backward 2.5 times forward.

cudnn and flash read each head's queries, keys and values from a block of their own, [sequences, heads, T, D];
cudnn_packed reads them as a projection leaves them and as kiln does, [sequences, T, 3, heads, D].

Usage: python scripts/gpu/torch_attention.py [--tokens 131072] [--repeats 20]
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTH = 1024
WAYS = {"cudnn": (SDPBackend.CUDNN_ATTENTION, False), "cudnn_packed": (SDPBackend.CUDNN_ATTENTION, True),
        "flash": (SDPBackend.FLASH_ATTENTION, False)}  # fmt: skip


def median_ms(run, repeats):
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))[repeats // 2]


def measure(tokens, seq, dim, repeats):
    heads, sequences = WIDTH // dim, max(1, tokens // seq // (2 if seq > 256 else 1))
    qkv = torch.randn(sequences, seq, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    flops = 2.0 * sequences * WIDTH * seq * seq
    row = {"seq_len": seq, "head_dim": dim, "heads": heads, "sequences": sequences}
    for name, (backend, packed) in WAYS.items():
        parts = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = ((part if packed else part.contiguous()).detach().requires_grad_() for part in parts)
        with sdpa_kernel(backend):
            forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
            out = forward()
            dout = torch.randn_like(out)
            forward_ms = median_ms(forward, repeats)
            backward_ms = median_ms(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), repeats)
        row[name] = {"forward_ms": forward_ms, "forward_tflops": flops / forward_ms / 1e9,
                     "backward_ms": backward_ms, "backward_tflops": 2.5 * flops / backward_ms / 1e9}  # fmt: skip
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    rows = [measure(arguments.tokens, seq, dim, arguments.repeats)
            for dim in (64, 128) for seq in (256, 1024, 2048, 4096)]  # fmt: skip
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "attention": rows}))


if __name__ == "__main__":
    main()
