#!/usr/bin/env python3
"""PyTorch's side of scripts/bench_cpu_compare.py: a plain LLaMA training step on the CPU, timed on request.

Usage: python scripts/bench_cpu.py --preset 9m|60m --sequences B [--seq 256] [--threads T] [--steps N]    (needs PyTorch)
       python scripts/bench_cpu.py ... --serve

Eager fp32: forward with scaled_dot_product_attention, cross-entropy, backward, clipping by the global norm, AdamW in
the faster of PyTorch's fused and foreach implementations. Shapes, initial scale and optimizer constants are kiln's.
Without --serve it prints one JSON object. With it, the first line of output describes the model, and each line
`step N` of input is answered by a JSON object: `seconds`, the median of N steps that follow two unmeasured ones.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

SHAPES = {  # width C, ffn F, heads H, layers L
    "9m": (128, 352, 4, 4),
    "60m": (512, 1376, 8, 8),
}
VOCAB = 32000
WARM_UP = 2


def rotate(x, cos, sin):
    """Rotate-half RoPE; x [B,H,T,D], cos and sin [T,D]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x, cos, sin):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, ffn, heads):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.gate_proj, self.up_proj = (nn.Linear(width, ffn, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    def __init__(self, preset, seq):
        super().__init__()
        width, ffn, heads, layers = SHAPES[preset]
        self.embedding = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(Layer(width, ffn, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, VOCAB, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads))
        angle = torch.outer(torch.arange(seq), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def flops_per_token(model, preset, seq):
    """6 * (matmul weights) + 6 L C T, causal; as `kiln bench step` counts them."""
    width, _, _, layers = SHAPES[preset]
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 6 * weights + 6 * layers * width * seq


class Trainer:
    def __init__(self, preset, sequences, seq):
        torch.manual_seed(1)
        self.model = Llama(preset, seq)
        self.tokens = torch.randint(VOCAB, (sequences, seq + 1))
        self.optimizer_kind = self.choose_optimizer()
        self.optimizer = self.make_optimizer(self.optimizer_kind)

    def make_optimizer(self, kind):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0.0, **{kind: True})

    def choose_optimizer(self):
        seconds = {}
        for kind in ("fused", "foreach"):
            self.optimizer = self.make_optimizer(kind)
            self.step()  # makes the states
            times = []
            for _ in range(3):
                self.backward()
                begin = time.perf_counter()
                self.optimizer.step()
                times.append(time.perf_counter() - begin)
            seconds[kind] = min(times)
        return min(seconds, key=seconds.get)

    def backward(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()
        return loss

    def step(self):
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return loss.item()

    def measure(self, steps):
        for _ in range(WARM_UP):
            self.step()
        seconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            loss = self.step()
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        return {"seconds": median, "tokens_per_s": self.tokens[:, 1:].numel() / median, "loss": loss}


def serve(trainer):
    for line in sys.stdin:
        words = line.split()
        if len(words) != 2 or words[0] != "step" or not words[1].isdigit() or int(words[1]) < 1:
            sys.exit(f"bench_cpu: input {line.strip()!r}, expected 'step N' with N at least 1")
        print(json.dumps(trainer.measure(int(words[1]))), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SHAPES, default="9m")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help="time steps as lines of standard input ask for them")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    trainer = Trainer(arguments.preset, arguments.sequences, arguments.seq)
    description = {
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
        "adamw": trainer.optimizer_kind,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_token": flops_per_token(trainer.model, arguments.preset, arguments.seq),
    }
    if not arguments.serve:
        print(json.dumps(description | trainer.measure(arguments.steps)))
        return
    print(json.dumps(description), flush=True)
    serve(trainer)


if __name__ == "__main__":
    main()
