#!/usr/bin/env python3
"""Loads a checkpoint directory as it stands with transformers, in fp32, and compares what kiln says of it.

Usage: python scripts/golden/check_transformers.py CKPT_DIR [--length 64]      (needs PyTorch, NumPy and transformers)
       python scripts/golden/check_transformers.py CKPT_DIR --logits FILE.safetensors
       python scripts/golden/check_transformers.py CKPT_DIR --shard FILE.bin [--seq-len 256] --loss VALUE

--logits: a file with `tokens` [B,T] and the `logits` [B,T,V] expected of them, such as tests/golden/*/golden.safetensors.
--shard with --loss: the loss that `kiln eval CKPT_DIR --data FILE.bin --seq-len N` printed for the whole shard.
Without either, the tokens are a fixed sequence and nothing is compared. Prints one JSON object with checksums of the
logits. Exit code 1 when a key of the model is missing, unexpected or of another shape, or when the relative error (the
largest difference over the largest value) exceeds 1e-5.
"""

import argparse
import json
import sys

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = 1e-5
HEADER_WORDS = 256
TOKEN_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic, version


def load_model(directory):
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    faults = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults |= {"error_msgs": list(map(str, info.get("error_msgs") or []))}
    if any(faults.values()):
        sys.exit(f"{directory}: {json.dumps(faults)}")
    return model.eval()


def read_shard(path):
    header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    kind = TOKEN_TYPES.get(tuple(header[:2].tolist()))
    if kind is None:
        sys.exit(f"{path}: starts with {header[:2].tolist()}, expected the magic and version of a token shard")
    tokens = np.fromfile(path, dtype=kind, offset=4 * HEADER_WORDS)
    if len(tokens) != header[2]:
        sys.exit(f"{path}: {len(tokens)} tokens, the header says {header[2]}")
    return torch.from_numpy(tokens.astype(np.int64))


def shard_loss(model, tokens, length):
    """Mean loss over the samples of `length` tokens that lie end to end in the shard."""
    samples = (len(tokens) - 1) // length
    total = 0.0
    for first in range(0, samples, 8):
        rows = [tokens[i * length : (i + 1) * length + 1] for i in range(first, min(first + 8, samples))]
        batch = torch.stack(rows)
        logits = model(input_ids=batch[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (samples * length), samples * length


def relative_error(found, expected):
    if found.shape != expected.shape:
        sys.exit(f"logits: shape {list(expected.shape)}, transformers gives {list(found.shape)}")
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def check(arguments, model):
    report = {"architecture": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
    if arguments.shard:
        loss, count = shard_loss(model, read_shard(arguments.shard), arguments.seq_len)
        report |= {"loss": loss, "tokens": count, "relative_error": abs(loss - arguments.loss) / abs(arguments.loss)}
        return report

    expected = load_file(arguments.logits) if arguments.logits else None
    if expected is not None:
        for name in {"tokens", "logits"} - expected.keys():
            sys.exit(f"{arguments.logits}: no tensor '{name}', expected tokens [B,T] and logits [B,T,V]")
        tokens = expected["tokens"].long()
        tokens = tokens[None] if tokens.ndim == 1 else tokens
    else:
        tokens = torch.tensor([[(7919 * i + 13) % model.config.vocab_size for i in range(arguments.length)]])
    logits = model(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    report |= {
        "tokens": tokens.numel(),
        "loss": loss.item(),
        "logits_sum": logits.double().sum().item(),
        "logits_square_sum": logits.double().square().sum().item(),
    }
    if expected is not None:
        report["relative_error"] = relative_error(logits, expected["logits"].view(-1, *logits.shape[1:]))
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT_DIR")
    parser.add_argument("--length", type=int, default=64, help="tokens of the fixed sequence")
    parser.add_argument("--logits", metavar="FILE", help="safetensors with tokens and the logits to compare")
    parser.add_argument("--shard", metavar="FILE", help="token shard whose whole loss to compare")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens of a sample of the shard")
    parser.add_argument("--loss", type=float, help="the loss that kiln eval gave for the shard")
    arguments = parser.parse_args()
    if bool(arguments.shard) != (arguments.loss is not None) or (arguments.shard and arguments.logits):
        parser.error("--shard and --loss go together, and without --logits")

    with torch.no_grad():
        report = check(arguments, load_model(arguments.checkpoint))
    print(json.dumps(report))
    if not report.get("relative_error", 0.0) <= TOLERANCE:  # NaN fails too
        sys.exit(f"{arguments.checkpoint}: relative error {report['relative_error']:.1e}, expected at most {TOLERANCE}")


if __name__ == "__main__":
    main()
