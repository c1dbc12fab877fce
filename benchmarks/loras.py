"""Low-rank files of random pairs on all linears, as llama.cpp reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from models import Shape, weights

from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.ggml.gguf import GGUFWriter

RANK, ALPHA = 16, 32.0


def is_linear(name: str) -> bool:
    """Return whether a tensor is one of the matrices in the layers."""
    return name.startswith("blk.") and "norm" not in name


def write_lora(path: Path, shape: Shape, *, rank: int = RANK, type: Type = Type.F16, seed: int = 0) -> Path:
    """Write a low-rank file for a model of this shape, unless it is there, and return its path."""
    if path.exists():
        return path
    rng = np.random.default_rng(seed)
    writer = GGUFWriter()
    for key, value in (("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")):
        writer.set(key, value, "str")
    writer.set("adapter.lora.alpha", ALPHA, "f32")
    ne = {}
    for name, (k, *m) in weights(shape):
        if is_linear(name):
            ne[f"{name}.lora_a"], ne[f"{name}.lora_b"] = (k, rank), (rank, *m)
    for name, shape_of_it in ne.items():
        writer.add_tensor(name, type, shape_of_it)

    def data(name: str) -> np.ndarray:
        n0, n1 = ne[name]
        values = rng.standard_normal((n1, n0), dtype=np.float32)
        return quantize(values * np.float32(0.1 / np.sqrt(n0)), type)

    writer.write(path, data)
    return path
