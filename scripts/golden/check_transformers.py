#!/usr/bin/env python3
"""Loads a checkpoint directory with transformers and prints the loss of a fixed token sequence as JSON.

Usage: python scripts/golden/check_transformers.py CKPT_DIR [--length 64]      (needs PyTorch and transformers)

Fails when a key of the model is missing from the files, unexpected there or of another shape.
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CKPT_DIR")
    parser.add_argument("--length", type=int, default=64, help="tokens of the sequence")
    arguments = parser.parse_args()

    model, info = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    faults = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults |= {"error_msgs": list(map(str, info.get("error_msgs") or []))}
    if any(faults.values()):
        sys.exit(f"{arguments.checkpoint}: {json.dumps(faults)}")

    vocab = model.config.vocab_size
    tokens = torch.tensor([[(7919 * i + 13) % vocab for i in range(arguments.length)]])
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:])
    report = {
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": arguments.length,
        "loss": loss.item(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
