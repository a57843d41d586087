#!/usr/bin/env python3
"""Golden traces of AdamW, GaLore and Fira for tests/optim/golden_test.cpp.

Usage: python scripts/golden/optimizer_traces.py [--out tests/golden/optim]      (needs PyTorch)

Written from the papers' formulas in fp64, with torch.linalg.svd for the projector:
  AdamW   Loshchilov & Hutter 2019, as torch.optim.AdamW (checked here against it)
  GaLore  Zhao et al. 2024, arXiv:2403.03507
  Fira    Chen et al. 2024, arXiv:2410.01623: `paper` is appendix A.1; `reference` multiplies the back-projection inside
          the residual by alpha too, as the authors' code does
Weights and gradients come from a formula in i, j and t that the test evaluates itself, so only the path W - W0 after
some steps is stored: traces.json describes the cases, traces.bin holds the paths as little-endian f32 in the order of
the cases, then of "steps". Moments are not rotated at a refresh, so the sign of a singular vector matters: the component of
largest magnitude is positive.
"""

import argparse
import json
import math
import pathlib

import torch

STEPS = 26
STORED = [1, 2, 10, 11, 12, 21, 22, 26]
RANK, REFRESH, ALPHA, BETA1, BETA2 = 4, 10, 0.25, 0.9, 0.999
# (weight decay, gamma): at the papers' 1.01 the limiter works in nearly all of so few steps, at 1.1 in some.
SETTINGS = [(0.0, 1.01), (0.1, 1.1)]
SHAPES = {"tall": (24, 12), "wide": (12, 24), "square": (16, 16)}


def gradient(rows, columns, t):
    """Six decaying rank-1 terms that turn slowly, noise, and a norm that swings so that the limiter works; rounded to f32."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(columns, dtype=torch.float64)[None, :]
    g = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(1, 7):
        g += 0.5**k * torch.sin(1.3 * k * i + 0.11 * k * t + k) * torch.cos(0.9 * k * j + 0.07 * k * t)
    g *= 1 + 0.03 * (i + j)  # so that every singular vector has one component that is clearly the largest
    g += 0.01 * torch.sin(12.9898 * i + 78.233 * j + 37.719 * t)
    return (g * (1 + 0.5 * math.sin(0.7 * t))).float().double()


def initial(rows, columns):
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(columns, dtype=torch.float64)[None, :]
    return (0.1 * torch.sin(1.7 * i + 2.9 * j + 0.3)).float().double()


def learning_rate(t):
    return 0.02 * min(1.0, t / 5) * (0.55 + 0.45 * math.cos(math.pi * t / 30))


def projector(g):
    """Top singular vectors of the shorter side, [short, RANK]; refuses a gradient whose vectors are ill-conditioned."""
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    gaps = s[:RANK] / s[1 : RANK + 1]
    assert gaps.min() > 1.15, f"singular values too close: {s.tolist()}"
    vectors = vt.T[:, :RANK] if g.shape[0] >= g.shape[1] else u[:, :RANK]
    order = vectors.abs().sort(dim=0, descending=True)
    assert (order.values[0] - order.values[1]).min() > 1e-3, "the largest component is not unique"
    return vectors * vectors.gather(0, order.indices[:1]).sign()


def adamw(w, eps, decay):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, STEPS + 1):
        g, lr = gradient(*w.shape, t), learning_rate(t)
        w = w - lr * decay * w
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        denominator = v.sqrt() / math.sqrt(1 - BETA2**t) + eps
        w = w - lr / (1 - BETA1**t) * m / denominator
        yield w


def low_rank(w, eps, decay, gamma, residual):
    """residual: None (GaLore), "paper" or "reference" (Fira)."""
    right = w.shape[0] >= w.shape[1]
    axis = 1 if right else 0  # the rank axis of R
    m = v = None
    previous, limited = None, 0
    for t in range(1, STEPS + 1):
        g, lr = gradient(*w.shape, t), learning_rate(t)
        if (t - 1) % REFRESH == 0:
            p = projector(g)
        r = g @ p if right else p.T @ g
        back = (lambda x: x @ p.T) if right else (lambda x: p @ x)
        if m is None:
            m, v = torch.zeros_like(r), torch.zeros_like(r)
        m = BETA1 * m + (1 - BETA1) * r
        v = BETA2 * v + (1 - BETA2) * r * r
        n = m / (v.sqrt() + eps)
        update = ALPHA * back(n)
        if residual:
            phi = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8)
            kept = ALPHA if residual == "reference" else 1.0
            s = phi * (g - kept * back(r))
            if previous is not None:
                limiter = max(s.norm() / (previous + 1e-8), gamma) / gamma
                limited += bool(limiter > 1)
                s = s / limiter
            previous = s.norm()
            update = update + (s if residual == "reference" else ALPHA * s)
        w = w - lr * math.sqrt(1 - BETA2**t) / (1 - BETA1**t) * update
        w = w - lr * decay * w
        yield w
    assert not residual or limited >= 20 or (gamma > 1.01 and 3 <= limited), f"the limiter worked {limited} times"


def check_adamw(shape, eps, decay):
    """Our AdamW is torch.optim.AdamW."""
    w = torch.nn.Parameter(initial(*shape))
    optimizer = torch.optim.AdamW([w], lr=1.0, betas=(BETA1, BETA2), eps=eps, weight_decay=decay)
    for t, expected in enumerate(adamw(initial(*shape), eps, decay), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        w.grad = gradient(*shape, t)
        optimizer.step()
        assert torch.allclose(w, expected, rtol=1e-12, atol=1e-14)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden/optim"))
    out = parser.parse_args().out
    cases, paths = [], []
    for shape in SHAPES.values():
        for decay, gamma in SETTINGS:
            check_adamw(shape, 1e-8, decay)
            for kind, variant in (("adamw", ""), ("galore", ""), ("fira", "paper"), ("fira", "reference")):
                eps = 1e-8 if kind == "adamw" else 1e-6
                w = initial(*shape)
                trace = adamw(w, eps, decay) if kind == "adamw" else low_rank(w, eps, decay, gamma, variant or None)
                paths += [w.numpy() - initial(*shape).numpy() for t, w in enumerate(trace, start=1) if t in STORED]
                cases.append({"kind": kind, "variant": variant, "rows": shape[0], "columns": shape[1], "eps": eps,
                              "weight_decay": decay, "gamma": gamma})
    out.mkdir(parents=True, exist_ok=True)
    header = {"rank": RANK, "refresh": REFRESH, "alpha": ALPHA, "beta1": BETA1, "beta2": BETA2,
              "steps": STORED, "cases": cases}
    (out / "traces.json").write_text(json.dumps(header, indent=1) + "\n")
    (out / "traces.bin").write_bytes(b"".join(path.astype("<f4").tobytes(order="C") for path in paths))


if __name__ == "__main__":
    main()
