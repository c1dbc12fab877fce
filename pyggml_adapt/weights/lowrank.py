"""Low-rank adaptors in GGUF: llama.cpp's LoRA files, and ours, which are LoRA files that may hold whole tensors too.

Source: llama.cpp src/llama-adapter.cpp (names, orientation, scale), convert_lora_to_gguf.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import AdaptorError
from pyggml_adapt.ggml import GGUFReader, TensorInfo, Type
from pyggml_adapt.weights.identity import LOW_RANK, blocks, fingerprint, layout_of, mismatch, text

A, B = ".lora_a", ".lora_b"  # what the names of a pair's tensors end with, after the name of the weight they are on
ALPHA = "adapter.lora.alpha"
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"  # absent where it is tied to the embedding
_FACTORS = (Type.F32, Type.F16, Type.BF16)
_LARGEST = float(np.finfo(np.float32).max)
_INVOCATION = "adapter.alora.invocation_tokens"


@dataclass(frozen=True, slots=True)
class PairInfo:
    """The entries of one pair, a [n_in, rank] and b [rank, n_out], and the file's alpha.

    On experts both have n_expert as well; on the embedding a is [rank, n_vocab] and b [rank, n_embd].
    """

    a: TensorInfo
    b: TensorInfo
    alpha: float

    @property
    def rank(self) -> int:
        """Return the rank, of each expert."""
        return self.b.ne[0]


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a low-rank file holds: pairs by the name of the weight they are on, and whole tensors."""

    pairs: Mapping[str, PairInfo]
    whole: Mapping[str, TensorInfo]


def scale_of(alpha: float, rank: int, factor: float) -> float:
    """Return what a pair's product is multiplied by, computed in F32 as llama.cpp does; alpha 0 stands for the rank.

    It is infinite where F32 cannot hold it.
    """
    with np.errstate(over="ignore"):
        scale = np.float32(factor)
        return float(scale * np.float32(alpha) / np.float32(rank)) if alpha else float(scale)


def read_low_rank(reader: GGUFReader) -> LowRank:
    """Return the pairs and whole tensors of a low-rank file; its data is not read.

    Raises: AdaptorError (adaptor_invalid) naming the tensor or key at fault.
    """
    alpha = reader.metadata.get(ALPHA)
    if not isinstance(alpha, float) or not abs(alpha) <= _LARGEST:  # NaN too
        found = "absent" if alpha is None else repr(alpha)
        raise _invalid(reader, f"the key {ALPHA!r} must be a finite F32, but it is {found}")
    if _INVOCATION in reader.metadata:
        raise _invalid(reader, f"it is meant for the tokens after certain ones only ({_INVOCATION}): not implemented")
    halves: dict[str, dict[str, TensorInfo]] = {}
    whole = {}
    for name, info in reader.tensors.items():
        if name.endswith((A, B)):
            halves.setdefault(name[: -len(A)], {})[name[-len(A) :]] = info
        else:
            whole[name] = info
    pairs = {target: _pair(reader, target, half, alpha) for target, half in halves.items()}
    if not pairs and not whole:
        raise _invalid(reader, "it holds no tensor")
    both = next((target for target in pairs if target in whole), None)
    if both is not None:
        raise _invalid(reader, f"{both!r} has a low-rank pair and is there as a whole tensor too")
    return LowRank(pairs, whole)


def _pair(reader: GGUFReader, target: str, half: Mapping[str, TensorInfo], alpha: float) -> PairInfo:
    for suffix in (A, B):
        if suffix not in half:
            raise _invalid(reader, f"the pair on {target!r} has no {suffix[1:]}")
    a, b = half[A], half[B]
    for info in (a, b):
        if info.type not in _FACTORS:
            raise _invalid(reader, f"{info.name!r} has type {info.type.name}: low-rank factors are F32, F16 or BF16")
    rank_a = a.ne[0] if target == EMBEDDING else a.ne[1]
    if b.ne[0] != rank_a or a.ne[2:] != b.ne[2:] or a.ne[3] != 1 or rank_a == 0:
        shapes = f"{list(a.ne[: a.n_dims])} and {list(b.ne[: b.n_dims])}"
        raise _invalid(reader, f"the pair on {target!r} has shapes {shapes}, which do not fit each other at one rank")
    return PairInfo(a, b, alpha)


def check_finite(reader: GGUFReader, infos: Iterable[TensorInfo]) -> None:
    """Raise AdaptorError (adaptor_invalid) for the first of these tensors, F32, F16 or BF16, with a NaN or infinity."""
    for info in infos:
        for block in blocks(reader, info.offset, info.nbytes):
            if not all_finite(np.frombuffer(block, np.uint8), info.type):
                raise _invalid(reader, f"{info.name!r} has elements that are NaN or infinite")


def all_finite(data: np.ndarray, type: Type) -> bool:
    """Return whether all elements of F32, F16 or BF16 data are finite; true for other types, which are not decoded."""
    exponents = {Type.F32: ("<u4", 0x7F800000), Type.F16: ("<u2", 0x7C00), Type.BF16: ("<u2", 0x7F80)}
    if type not in exponents:
        return True
    dtype, mask = exponents[type]
    bits = data.view(dtype)
    return not bool(((bits & mask) == mask).any())


def check_base(foundation: GGUFReader, reader: GGUFReader) -> None:
    """Raise AdaptorError (adaptor_base_mismatch) if a low-rank file says that it was made for another model."""
    who = f"{reader.path}: the adaptor"
    arch, ours = (each.metadata.get("general.architecture") for each in (reader, foundation))
    if arch != ours:
        raise mismatch(who, foundation.path, f"it is for architecture {arch!r}, and that is {ours!r}")
    if layout_of(reader) == LOW_RANK and text(reader, "foundation.fingerprint") != fingerprint(foundation):
        raise mismatch(who, foundation.path, "it was made for a file of other bytes")


def _invalid(reader: GGUFReader, detail: str) -> AdaptorError:
    return AdaptorError(f"{reader.path}: {detail}", code="adaptor_invalid")
