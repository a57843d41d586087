#!/usr/bin/env python3
"""Golden LLaMA models for tests/model/llama_golden_test.cpp.

Usage: python scripts/golden/llama_golden.py [--out tests/golden]      (needs PyTorch, transformers and safetensors)

Each directory holds a small seeded transformers LlamaForCausalLM as save_pretrained writes it (config.json,
model.safetensors) and golden.safetensors:
  tokens, targets  I32 [2,24]; targets are already shifted, -100 is ignored
  logits           F32 [2,24,V]
  loss             F32 [1], mean over the targets that count
  grad.NAME        F32, gradient of that loss with respect to each parameter of the model
Values come from an fp64 copy with eager attention and are rounded once. transformers computes norms, softmax and RoPE
in fp32 whatever the weights are, so the copy replaces those three; the unmodified fp32 model is checked against it.
"""

import argparse
import copy
import pathlib
import unittest.mock

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

BATCH, LENGTH, STD = 2, 24, 0.2
SHARED = dict(max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager")
MODELS = {
    "llama_gqa": dict(
        hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=256, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama_tied": dict(
        hidden_size=32, intermediate_size=88, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1,
        vocab_size=128, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
}  # fmt: skip


def norm64(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rope64(self, x, position_ids):
    theta = self.config.rope_parameters["rope_theta"]
    size = self.config.head_dim
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = position_ids[..., None].double() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def softmax64(x, dim, dtype=None):
    return x.softmax(dim)


def evaluate(model, tokens, targets):
    """Logits, mean loss in fp64, gradients by name."""
    model.zero_grad()
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), ignore_index=-100)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def relative(a, b):
    return ((a.double() - b).abs().max() / b.abs().max()).item()


def make(name, sizes, directory):
    torch.manual_seed(20240 + len(name))
    model = LlamaForCausalLM(LlamaConfig(**sizes, **SHARED)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms near 1, so that their gradients matter
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, STD)
    tokens = torch.randint(sizes["vocab_size"], (BATCH, LENGTH))
    targets = torch.cat((tokens[:, 1:], torch.randint(sizes["vocab_size"], (BATCH, 1))), dim=1)
    targets[0, :3] = -100
    targets[1, 20] = -100
    with (
        unittest.mock.patch.object(modeling_llama.LlamaRMSNorm, "forward", norm64),
        unittest.mock.patch.object(modeling_llama.LlamaRotaryEmbedding, "forward", rope64),
        unittest.mock.patch.object(torch.nn.functional, "softmax", softmax64),
    ):
        logits, loss, gradients = evaluate(copy.deepcopy(model).double(), tokens, targets)
    assert all(t.dtype == torch.float64 for t in (logits, loss, *gradients.values()))

    logits32, loss32, gradients32 = evaluate(model, tokens, targets)
    errors = {"logits": relative(logits32, logits), "loss": relative(loss32, loss)}
    errors |= {key: relative(gradients32[key], gradients[key]) for key in gradients}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 2e-5, f"the fp32 model differs: {worst} by {errors[worst]:.1e}"

    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    (directory / "generation_config.json").unlink(missing_ok=True)
    tensors = {"tokens": tokens.int(), "targets": targets.int(), "logits": logits.float(), "loss": loss.float()[None]}
    tensors |= {f"grad.{key}": gradient.float() for key, gradient in gradients.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, directory / "golden.safetensors", {"format": "pt"})
    (directory / "golden.safetensors").chmod(0o644)
    sizes_kb = {path.name: path.stat().st_size // 1024 for path in sorted(directory.iterdir())}
    print(f"{name}: loss {loss:.6f}, fp32 within {errors[worst]:.1e} ({worst}), KiB {sizes_kb}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in MODELS.items():
        make(name, sizes, arguments.out / name)


if __name__ == "__main__":
    main()
