"""Random low-rank files, written as llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tiny_models import Tiny

from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.ggml.gguf import GGUFWriter
from pyggml_adapt.models import TensorSpec

LINEARS = r"attn_(q|k|v|output)\.weight|ffn_(up|gate|down)\.weight"


def factors(spec: TensorSpec, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random a and b for a weight, in NumPy's order, whose product changes it a little."""
    rng = np.random.default_rng([seed, *spec.name.encode()])
    k, m, *experts = spec.ne
    shape_a, shape_b = [*experts, rank, k], [*experts, m, rank]
    if spec.name == "token_embd.weight":
        shape_a, shape_b = [m, rank], [k, rank]
    a = rng.standard_normal(shape_a, dtype=np.float32) / np.float32(np.sqrt(k))
    return a, rng.standard_normal(shape_b, dtype=np.float32) * np.float32(0.3)


def write_lora(
    path: Path,
    tiny: Tiny,
    targets: str = LINEARS,
    *,
    rank: int = 4,
    alpha: float | None = 8.0,
    type: Type = Type.F32,
    seed: int = 0,
    whole: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
    change: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write pairs on the weights whose names `targets` matches, and return the path.

    whole: tensors beside them, F32.  metadata: more strings, which replace the usual ones.  change: tensors of the
    pairs that are others than usual, or None for absent.
    """
    writer = GGUFWriter()
    keys = {"general.architecture": tiny.arch, "general.type": "adapter", "adapter.type": "lora", **(metadata or {})}
    for key, value in keys.items():
        writer.set(key, value, "str")
    if alpha is not None:
        writer.set("adapter.lora.alpha", alpha, "f32")
    tensors: dict[str, np.ndarray] = {}
    for spec in tiny.tensors():
        if re.search(targets, spec.name):
            tensors[f"{spec.name}.lora_a"], tensors[f"{spec.name}.lora_b"] = factors(spec, rank, seed)
    data: dict[str, object] = {}
    for name, array in {**tensors, **(change or {})}.items():
        if array is not None:
            writer.add_tensor(name, type, array.shape[::-1])
            data[name] = quantize(array, type)
    for name, array in (whole or {}).items():
        writer.add_tensor(name, Type.F32, array.shape[::-1])
        data[name] = quantize(array, Type.F32)
    writer.write(path, data, overwrite=True)
    return path
