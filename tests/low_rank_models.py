"""Models that differ from another by low-rank changes, and LoRA files made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tiny_models import Tiny, tensors_of, write_gguf

from pyggml_adapt.ggml import Type, dequantize, quantize
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter

Tensors = dict[str, tuple[Type, tuple[int, ...], object]]


def change(ne: tuple[int, ...], rank: int, seed: int, size: float = 0.05) -> np.ndarray:
    """Return F32 [..., ne1, ne0] of exactly this rank, with singular values that are close to each other."""
    rng = np.random.default_rng(seed)
    shape = ne[:1:-1]
    u = np.linalg.qr(rng.standard_normal((*shape, ne[1], rank)))[0]
    v = np.linalg.qr(rng.standard_normal((*shape, ne[0], rank)))[0]
    return (size * np.sqrt(ne[0]) * (u * np.linspace(1, 0.7, rank)) @ np.swapaxes(v, -1, -2)).astype(np.float32)


def values(tensor: tuple[Type, tuple[int, ...], object]) -> np.ndarray:
    """Return a tensor's values F32 in NumPy's order."""
    type, ne, data = tensor
    return dequantize(data, type, ne[0]).reshape(ne[::-1])


def plus(tensors: Tensors, changes: Mapping[str, np.ndarray], **others: object) -> Tensors:
    """Return the tensors with values added to some, in the types that they have."""
    result = dict(tensors)
    for name, added in changes.items():
        type, ne, _ = tensors[name]
        result[name] = (type, ne, quantize(values(tensors[name]) + added, type))
    return result


def linears(tensors: Tensors, *parts: str) -> list[str]:
    """Return the names of the linear weights in which one of `parts` is."""
    return [name for name, (_, ne, _) in tensors.items() if len(ne) > 1 and any(part in name for part in parts)]


def write(path: Path, tiny: Tiny, tensors: Tensors, **metadata: object) -> Path:
    """Write a model of a Tiny's metadata and other tensors; metadata: more, with __ for dots."""
    more = {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(path, {**tiny.all_metadata(), **more}, tensors, tokenizer=tiny.tokenizer)


def base_and_task(
    folder: Path, tiny: Tiny, rank: int, *parts: str, size: float = 0.05, **metadata: object
) -> tuple[Path, Path]:
    """Write a model, and one that differs from it by exactly this rank where one of `parts` is in the name."""
    tensors = tensors_of(tiny)
    names = linears(tensors, *parts)
    changes = {name: change(tensors[name][1], rank, i, size) for i, name in enumerate(names)}
    base = write(folder / "base.gguf", tiny, tensors)
    return base, write(folder / "task.gguf", tiny, plus(tensors, changes), **metadata)


def read_all(path: Path | str) -> Tensors:
    """Return a file's tensors."""
    with GGUFReader(path) as reader:
        mapped = reader.map()
        return {
            info.name: (info.type, info.ne[: info.n_dims], bytes(mapped[info.offset : info.offset + info.nbytes]))
            for info in reader.tensors.values()
        }


def write_lora(
    path: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    alpha: float = 8.0,
    type: Type = Type.F32,
    whole: Mapping[str, np.ndarray] | None = None,
    arch: str = "llama",
) -> Path:
    """Write a LoRA GGUF as llama.cpp's converter does; pairs: target -> (a, b) in NumPy's order; whole: F32."""
    tensors: dict[str, tuple[Type, np.ndarray]] = {}
    for target, (a, b) in pairs.items():
        tensors |= {target + ".lora_a": (type, a), target + ".lora_b": (type, b)}
    tensors |= {name: (Type.F32, array) for name, array in (whole or {}).items()}
    writer = GGUFWriter()
    for key, value in {"type": "adapter", "architecture": arch}.items():
        writer.set(f"general.{key}", value, "str")
    writer.set("adapter.type", "lora", "str")
    writer.set("adapter.lora.alpha", alpha, "f32")
    for name, (kind, array) in tensors.items():
        writer.add_tensor(name, kind, array.shape[::-1])
    writer.write(path, {name: quantize(array, kind) for name, (kind, array) in tensors.items()}, overwrite=True)
    return path
