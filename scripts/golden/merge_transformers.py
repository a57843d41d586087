#!/usr/bin/env python3
"""Directories that transformers wrote, and their averages, for tests/merge/transformers_test.cpp.

Usage: python scripts/golden/merge_transformers.py [--out tests/golden/merge]  (needs PyTorch, transformers, safetensors)

checkpoint-100 and checkpoint-200 are a tiny LLaMA with tied weights in bf16 as save_pretrained writes it, the second in
shards (max_shard_size). expected.safetensors holds, for each tensor NAME of them,
  sma.fp32.NAME, sma.bf16.NAME    (a + b) / 2
  wma.fp32.NAME, wma.bf16.NAME    a / 3 + 2 b / 3
computed by PyTorch in fp64 and rounded once, to nearest even.
"""

import argparse
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    hidden_size=8, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
    vocab_size=48, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
WEIGHTS = {"sma": (1 / 2, 1 / 2), "wma": (1 / 3, 2 / 3)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def neighbours(x):
    """x of 16 or 32 bits, and the values next to it: one step of the bits away, which is the order of magnitudes."""
    bits = x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)
    return [x, (bits - 1).view(x.dtype), (bits + 1).view(x.dtype)]


def round_once(exact, dtype):
    """PyTorch converts fp64 to bf16 by way of fp32, which rounds twice: the nearest of the values around is chosen."""
    values = neighbours(exact.to(dtype))
    errors = torch.stack([(value.double() - exact).abs().nan_to_num(torch.inf) for value in values])  # NaN next to 0
    odd = torch.stack([value.view(torch.int16 if dtype == torch.bfloat16 else torch.int32) & 1 for value in values])
    nearest = errors == errors.min(0).values
    assert errors.min(0).values.max() < 0.01
    choice = (nearest & ((odd == 0) | (nearest.sum(0) == 1))).int().argmax(0)
    return torch.stack(values).gather(0, choice[None])[0]


def make(directory, seed, **options):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    model = model.to(torch.bfloat16)
    model.save_pretrained(directory, **options)
    for path in directory.iterdir():
        path.chmod(0o644)
    return {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden/merge"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    inputs = [make(out / "checkpoint-100", 1), make(out / "checkpoint-200", 2, max_shard_size="1KB")]
    expected = {}
    for method, weights in WEIGHTS.items():
        for name in inputs[0]:
            exact = weights[0] * inputs[0][name].double() + weights[1] * inputs[1][name].double()
            for dtype, kind in DTYPES.items():
                expected[f"{method}.{dtype}.{name}"] = round_once(exact, kind).contiguous()
    save_file(expected, out / "expected.safetensors", {"format": "pt"})
    (out / "expected.safetensors").chmod(0o644)
    for path in sorted(out.rglob("*")):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
