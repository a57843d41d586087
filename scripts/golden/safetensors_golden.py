#!/usr/bin/env python3
"""Writes tests/golden/reference.safetensors with the reference implementation (packages safetensors and numpy)."""

import pathlib

import numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/reference.safetensors"


def main():
    tensors = {
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 4,
        "half": np.array([1.5, -2.25, 65504.0], dtype=np.float16),
        "wide": np.array([[1e-300, 3.0]], dtype=np.float64),
        "index": np.array([-1, 2, 3], dtype=np.int64),
        "bytes": np.array([7], dtype=np.uint8),
        "scalar": np.array(0.5, dtype=np.float32),
    }
    save_file(tensors, OUT, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
