#!/usr/bin/env python3
"""Golden traces of every optimizer of the family for tests/optim/golden_test.cpp.

Usage: python scripts/golden/optimizer_traces.py [--out tests/golden/optim]      (needs PyTorch)

Written from the papers' formulas in fp64, with torch.linalg.svd for the projector:
  AdamW   Loshchilov & Hutter 2019, as torch.optim.AdamW (checked here against it)
  GaLore  Zhao et al. 2024, arXiv:2403.03507
  Fira    Chen et al. 2024, arXiv:2410.01623: `paper` is appendix A.1; `reference` multiplies the back-projection inside
          the residual by alpha too, as the authors' code does
  Fira+   Fira whose moments follow the basis as in LDAdam, Robert et al. 2024, arXiv:2410.16103
  APOLLO  Zhu et al. 2024, arXiv:2412.05270, and its Mini form
  Muon    Jordan et al. 2024, with both scales
  LoRA    Hu et al. 2021, arXiv:2106.09685, with A and B as leaves of torch's autograd; ReLoRA as optim/lora.h
  states  bf16 with stochastic rounding, int8 with the dynamic map of Dettmers et al. 2022, arXiv:2110.02861
Weights and gradients come from a formula in i, j and t that the test evaluates itself, so only the path W - W0 after
some steps is stored: traces.json describes the cases, traces.bin holds the paths as little-endian f32 in the order of
the cases, then of their "steps". Moments are not rotated at a refresh, so the sign of a singular vector matters: the component of
largest magnitude is positive.
"""

import argparse
import json
import math
import pathlib

import numpy
import torch

STEPS = 26
STORED = [1, 2, 10, 11, 12, 21, 22, 26]
RANK, REFRESH, ALPHA, BETA1, BETA2 = 4, 10, 0.25, 0.9, 0.999
# (weight decay, gamma): at the papers' 1.01 the limiter works in nearly all of so few steps, at 1.1 in some.
SETTINGS = [(0.0, 1.01), (0.1, 1.1)]
# Of the members beyond the first four; matrices are called NAME, and draws come from SEED.
SHORT, DECAY, GAMMA, NAME, SEED = [2, 11, 12, 26], 0.1, 1.1, "layer.weight", 1
LORA_ALPHA, REWARM = 8.0, 3
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


def stream_of(name):
    """FNV-1a, 64 bits."""
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def philox(seed, stream, counters):
    """Philox4x32-10 (Salmon et al. 2011): [len(counters), 4] words at (counter, stream) under the key `seed`."""
    low = numpy.uint64(0xFFFFFFFF)
    n = numpy.asarray(counters, dtype=numpy.uint64)
    stream = numpy.full_like(n, stream % 2**64)
    c = [n & low, n >> numpy.uint64(32), stream & low, stream >> numpy.uint64(32)]
    key = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(10):
        p, q = c[0] * numpy.uint64(0xD2511F53), c[2] * numpy.uint64(0xCD9E8D57)
        c = [(q >> numpy.uint64(32)) ^ c[1] ^ numpy.uint64(key[0]), q & low,
             (p >> numpy.uint64(32)) ^ c[3] ^ numpy.uint64(key[1]), p & low]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return numpy.stack(c, axis=1)


def uniforms(words, pair):
    """53 bits of two words, in [0, 1)."""
    bits = (words[:, 2 * pair + 1] << numpy.uint64(32)) | words[:, 2 * pair]
    return (bits >> numpy.uint64(11)).astype(numpy.float64) * 2.0**-53


def normal(stream, shape):
    words = philox(SEED, stream, range(math.prod(shape)))
    u, v = uniforms(words, 0) + 2.0**-53, uniforms(words, 1)
    return torch.tensor((numpy.sqrt(-2 * numpy.log(u)) * numpy.cos(2 * math.pi * v)).reshape(shape))


def dynamic_map(signed):
    """As bitsandbytes builds it, from the means of neighbouring boundaries."""
    values = [0.0, 1.0]
    for i in range(7):
        boundaries = numpy.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        means = 10.0 ** (i - 6) * (boundaries[:-1] + boundaries[1:]) / 2
        values += [*means, *-means] if signed else [*means]
    return numpy.sort(numpy.array(values)).astype(numpy.float32)


class State:
    """One state as it is kept between two steps: f64, or rounded as its precision says. Draws and blocks count elements
    of the flat tensor."""

    def __init__(self, name, shape, precision, signed=True, nearest=False):
        self.stream, self.precision, self.signed, self.nearest = stream_of(f"{NAME}.{name}"), precision, signed, nearest
        self.value = torch.zeros(shape, dtype=torch.float64)

    def keep(self, value, t):
        self.value = value
        if self.precision != "fp32":
            flat = value.numpy().reshape(-1).astype(numpy.float32)
            rounded = self.bf16(flat, t) if self.precision == "bf16" else self.int8(flat)
            self.value = torch.tensor(rounded.astype(numpy.float64).reshape(value.shape))
        return self.value

    def bf16(self, flat, t):
        if self.nearest:
            return torch.tensor(flat).bfloat16().float().numpy()
        words = philox(SEED ^ (t * 0x9E3779B97F4A7C15 % 2**64), self.stream, range((len(flat) + 7) // 8)).reshape(-1)
        halves = numpy.stack([words & numpy.uint64(0xFFFF), words >> numpy.uint64(16)], axis=1).reshape(-1)
        bits = flat.view(numpy.uint32) + halves[: len(flat)].astype(numpy.uint32)
        return (bits & numpy.uint32(0xFFFF0000)).view(numpy.float32)

    def int8(self, flat):
        values = dynamic_map(self.signed)
        thresholds = ((values[:-1] + values[1:]) * numpy.float32(0.5)).astype(numpy.float32)
        if not self.signed:
            thresholds[0] = 0  # what is not zero does not become zero
        out = numpy.zeros_like(flat)
        for first in range(0, len(flat), 256):
            block = flat[first : first + 256]
            scale = numpy.abs(block).max()
            if scale > 0:
                out[first : first + 256] = values[numpy.searchsorted(thresholds, block / scale)] * scale
        return out


def moments(shape, precision, prefix=""):
    return State(prefix + "exp_avg", shape, precision), State(prefix + "exp_avg_sq", shape, precision, signed=False)


def advance(m, v, g, t):
    """New moments before they are rounded; what is kept is rounded."""
    new_m, new_v = BETA1 * m.value + (1 - BETA1) * g, BETA2 * v.value + (1 - BETA2) * g * g
    m.keep(new_m, t)
    v.keep(new_v, t)
    return new_m, new_v


def galore_rate(t):
    return learning_rate(t) * math.sqrt(1 - BETA2**t) / (1 - BETA1**t)


def rounded_adamw(w, precision):
    m, v = moments(w.shape, precision)
    for t in range(1, STEPS + 1):
        lr = learning_rate(t)
        new_m, new_v = advance(m, v, gradient(*w.shape, t), t)
        w = w * (1 - lr * DECAY)
        w = w - lr / (1 - BETA1**t) * new_m / (new_v.sqrt() / math.sqrt(1 - BETA2**t) + 1e-8)
        yield w


class Limiter:
    def __init__(self):
        self.previous, self.limited = None, 0

    def __call__(self, s):
        if self.previous is not None:
            limiter = max(s.norm() / (self.previous + 1e-8), GAMMA) / GAMMA
            self.limited += bool(limiter > 1)
            s = s / limiter
        self.previous = s.norm()
        return s


def subspace(w, kind, states="fp32", projector_states="fp32"):
    """galore, fira or fira+ (paper) with rounded states. R is [long side, rank] on both sides."""
    right = w.shape[0] >= w.shape[1]
    long = max(w.shape)
    m, v = moments((long, RANK), states)
    p = State("projector", (min(w.shape), RANK), projector_states, nearest=True)
    limiter = Limiter()
    for t in range(1, STEPS + 1):
        g = gradient(*w.shape, t)
        if (t - 1) % REFRESH == 0:
            old = p.value
            p.keep(projector(g), t)
            if kind == "fira+" and t > 1:
                c = old.T @ p.value
                mean, square = m.value / (1 - BETA1 ** (t - 1)), v.value / (1 - BETA2 ** (t - 1))
                turned = (square - mean**2) @ c**2 + (mean @ c) ** 2
                m.value, v.value = (1 - BETA1 ** (t - 1)) * (mean @ c), (1 - BETA2 ** (t - 1)) * turned.abs()
        gt = g if right else g.T
        r = gt @ p.value
        new_m, new_v = advance(m, v, r, t)
        n = new_m / (new_v.sqrt() + 1e-6)
        update = n @ p.value.T
        if kind != "galore":
            phi = n.norm(dim=1, keepdim=True) / (r.norm(dim=1, keepdim=True) + 1e-8)
            update = update + limiter(phi * (gt - r @ p.value.T))
        lr = learning_rate(t)
        w = (w - galore_rate(t) * ALPHA * (update if right else update.T)) * (1 - lr * DECAY)
        yield w
    assert kind == "galore" or limiter.limited >= 3


def apollo(w, mini):
    right, rank, scale = w.shape[0] >= w.shape[1], 1 if mini else RANK, 128.0 if mini else 1.0
    m, v = moments((max(w.shape), rank), "fp32")
    limiter = Limiter()
    for t in range(1, STEPS + 1):
        g = gradient(*w.shape, t)
        gt = g if right else g.T
        r = gt @ normal(stream_of(NAME) + (t - 1) // REFRESH, (min(w.shape), rank)) / math.sqrt(rank)
        new_m, new_v = advance(m, v, r, t)
        n = new_m / (new_v.sqrt() + 1e-6)
        dim = None if mini else 1
        phi = torch.linalg.vector_norm(n, dim=dim, keepdim=True) / (torch.linalg.vector_norm(r, dim=dim, keepdim=True) + 1e-8)
        s = limiter(phi * gt)
        w = (w - galore_rate(t) * math.sqrt(scale) * (s if right else s.T)) * (1 - learning_rate(t) * DECAY)
        yield w
    assert limiter.limited >= 3


def muon(w, scale):
    b = torch.zeros_like(w)
    rows, columns = w.shape
    factor = 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms" else math.sqrt(max(1, rows / columns))
    for t in range(1, STEPS + 1):
        g, lr = gradient(*w.shape, t), learning_rate(t)
        b = 0.95 * b + g
        x = g + 0.95 * b
        x = x / (x.norm() + 1e-7)
        x = x.T if rows > columns else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w * (1 - lr * DECAY) - lr * factor * (x.T if rows > columns else x)
        yield w


def lora(w, restart):
    """Adapters as autograd sees them: W_0 fixed, A and B leaves, the loss <G, W>, so that its gradient is G."""
    rows, columns = w.shape
    scale = LORA_ALPHA / RANK
    fixed = w
    adam = None
    for t in range(1, STEPS + 1):
        lr, since = learning_rate(t), (t - 1) % REFRESH
        if t == 1 or (restart and since == 0):
            words = philox(SEED, stream_of(NAME) + (t - 1) // REFRESH, range(RANK * columns))
            if adam is not None:
                fixed = fixed + scale * (b @ a).detach()
            a = torch.tensor((2 * uniforms(words, 0) - 1) / math.sqrt(columns)).reshape(RANK, columns)
            a, b = a.requires_grad_(), torch.zeros(rows, RANK, dtype=torch.float64, requires_grad=True)
            if adam is None:
                adam = {"a": [torch.zeros_like(a), torch.zeros_like(a)], "b": [torch.zeros_like(b), torch.zeros_like(b)]}
            else:
                for pair in adam.values():
                    square = pair[1].detach().reshape(-1)
                    threshold = square.sort().values[int(0.99 * len(square))]
                    keep = pair[1] >= threshold
                    pair[:] = [x * keep for x in pair]
        if restart and t > REFRESH:
            lr *= min(1.0, (since + 1) / REWARM)
        loss = (gradient(rows, columns, t) * (fixed + scale * b @ a)).sum()
        gradients = torch.autograd.grad(loss, (a, b))
        leaves = []
        for leaf, g, pair in zip((a, b), gradients, adam.values()):
            m, v = BETA1 * pair[0] + (1 - BETA1) * g, BETA2 * pair[1] + (1 - BETA2) * g * g
            pair[:] = [m, v]
            step = m / (1 - BETA1**t) / ((v / (1 - BETA2**t)).sqrt() + 1e-8)
            leaves.append((leaf.detach() * (1 - lr * DECAY) - lr * step).requires_grad_())
        a, b = leaves
        yield fixed + scale * (b @ a).detach()


def members():
    """(fields of the case, trace from W) of the members beyond AdamW, GaLore and Fira in full precision."""
    yield {"kind": "adam8bit", "eps": 1e-8, "states": "int8"}, lambda w: rounded_adamw(w, "int8")
    yield {"kind": "adamw", "eps": 1e-8, "states": "bf16"}, lambda w: rounded_adamw(w, "bf16")
    for projector_states in ("bf16", "int8"):
        yield ({"kind": "galore", "states": projector_states, "projector_states": projector_states},
               lambda w, p=projector_states: subspace(w, "galore", p, p))
    yield {"kind": "fira", "states": "int8"}, lambda w: subspace(w, "fira", "int8")
    yield {"kind": "fira+"}, lambda w: subspace(w, "fira+")
    yield {"kind": "apollo", "alpha": 1.0}, lambda w: apollo(w, False)
    yield {"kind": "apollo_mini", "alpha": 128.0}, lambda w: apollo(w, True)
    for scale in ("match_rms", "spectral"):
        yield {"kind": "muon", "eps": 1e-8, "muon_scale": scale}, lambda w, s=scale: muon(w, s)
    yield {"kind": "lora", "eps": 1e-8, "alpha": LORA_ALPHA}, lambda w: lora(w, False)
    yield {"kind": "relora", "eps": 1e-8, "alpha": LORA_ALPHA, "rewarm": REWARM}, lambda w: lora(w, True)


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
                              "weight_decay": decay, "gamma": gamma, "steps": STORED})
        for fields, trace in members():
            w = initial(*shape)
            paths += [x.numpy() - w.numpy() for t, x in enumerate(trace(w), start=1) if t in SHORT]
            cases.append({"variant": "paper", "rows": shape[0], "columns": shape[1], "eps": 1e-6, "weight_decay": DECAY,
                          "gamma": GAMMA, "steps": SHORT} | fields)
    out.mkdir(parents=True, exist_ok=True)
    header = {"rank": RANK, "refresh": REFRESH, "alpha": ALPHA, "beta1": BETA1, "beta2": BETA2, "cases": cases}
    (out / "traces.json").write_text(json.dumps(header, indent=1) + "\n")
    (out / "traces.bin").write_bytes(b"".join(path.astype("<f4").tobytes(order="C") for path in paths))


if __name__ == "__main__":
    main()
