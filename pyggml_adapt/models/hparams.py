"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_adapt.errors import ModelError

MAX_LAYERS = 512
MAX_EXPERTS = 512
MAX_SIZE = 1 << 24  # of any dimension: larger than every published model's, small enough that products fit in 64 bits

ROPE_SCALING_TYPES = ("none", "linear", "yarn")


@dataclass(frozen=True, slots=True)
class HParams:
    """What shapes a model's graph, named as in llama.cpp's llama_hparams; counts in elements.

    Source: llama.cpp src/llama-model.cpp (load_hparams).
    """

    arch: str
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_rot: int
    n_expert: int
    n_expert_used: int
    f_norm_rms_eps: float
    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling_type: str
    n_ctx_orig_yarn: int
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0

    @property
    def n_embd_k_gqa(self) -> int:
        """Return the elements of K that one token adds to one layer."""
        return self.n_embd_head_k * self.n_head_kv

    @property
    def n_embd_v_gqa(self) -> int:
        """Return the elements of V that one token adds to one layer."""
        return self.n_embd_head_v * self.n_head_kv

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], n_vocab: int) -> HParams:
        """Return the hyper-parameters in `metadata`; n_vocab is ne1 of the token embedding.

        Raises: ModelError naming the key that is absent, of a wrong type, or out of range.
        """
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise ModelError("the metadata has no general.architecture")
        keys = _Keys(metadata, arch)
        n_embd, n_head = keys.count("embedding_length"), keys.count("attention.head_count")
        n_head_kv = keys.count("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise ModelError(f"{arch}.attention.head_count = {n_head} is not a multiple of head_count_kv = {n_head_kv}")
        if n_embd % n_head and f"{arch}.attention.key_length" not in metadata:
            raise ModelError(f"{arch}.embedding_length = {n_embd} is not a multiple of head_count = {n_head}")
        n_embd_head_k = keys.count("attention.key_length", max(n_embd // n_head, 1))
        n_rot = keys.count("rope.dimension_count", n_embd_head_k)
        n_ctx_train = keys.count("context_length", most=1 << 31)
        return cls(
            arch=arch,
            n_vocab=n_vocab,
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_layer=keys.count("block_count", most=MAX_LAYERS),
            n_ff=keys.count("feed_forward_length"),
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_embd_head_k=n_embd_head_k,
            n_embd_head_v=keys.count("attention.value_length", max(n_embd // n_head, 1)),
            n_rot=n_rot,
            **_experts(keys),
            f_norm_rms_eps=keys.number("attention.layer_norm_rms_epsilon", least=0.0),
            **_rope(keys, n_ctx_train),
        )


class _Keys:
    """The keys of one architecture: each read is checked for type and range."""

    def __init__(self, metadata: Mapping[str, object], arch: str):
        self.metadata, self.arch = metadata, arch

    def count(self, key: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        """Return a whole number; an array whose elements agree counts as that number."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise ModelError(f"{key} differs from layer to layer, which {self.arch} does not support here")
            value = value[0].item()
        if value is None:
            raise ModelError(f"the metadata has no {key}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{key} must be a whole number, not {value!r}")
        if not least <= value <= most:
            raise ModelError(f"{key} = {value} is not from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = -math.inf) -> float:
        """Return a finite number."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"the metadata has no {key}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{key} must be a number, not {value!r}")
        if not (math.isfinite(value) and value >= least):
            raise ModelError(f"{key} = {value} is not a finite number of at least {least}")
        return float(value)


def _experts(keys: _Keys) -> dict[str, Any]:
    n_expert = keys.count("expert_count", 0, least=0, most=MAX_EXPERTS)
    n_expert_used = keys.count("expert_used_count", 0, least=0, most=MAX_EXPERTS)
    if (n_expert > 0) != (n_expert_used > 0) or n_expert_used > n_expert:
        raise ModelError(f"{keys.arch}.expert_used_count = {n_expert_used} does not fit expert_count = {n_expert}")
    return {"n_expert": n_expert, "n_expert_used": n_expert_used}


def _rope(keys: _Keys, n_ctx_train: int) -> dict[str, Any]:
    """Return the rope parameters, with llama.cpp's defaults.

    Source: llama.cpp src/llama-model.cpp (load_hparams), src/llama-context.cpp (cparams).
    """
    kind = keys.metadata.get(f"{keys.arch}.rope.scaling.type", "linear")
    if kind not in ROPE_SCALING_TYPES:
        raise ModelError(
            f"{keys.arch}.rope.scaling.type = {kind!r} is not implemented; "
            f"implemented are {', '.join(ROPE_SCALING_TYPES)}"
        )
    factor = keys.number("rope.scaling.factor", 0.0, least=0.0)
    if f"{keys.arch}.rope.scaling.factor" not in keys.metadata:
        factor = keys.number("rope.scale_linear", 0.0, least=0.0)
    freq_scale = np.float32(1.0) if factor == 0.0 or kind == "none" else np.float32(1.0) / np.float32(factor)
    freq_base = keys.number("rope.freq_base", 10000.0, least=0.0)
    if freq_base <= 0.0:
        raise ModelError(f"{keys.arch}.rope.freq_base = {freq_base} is not positive")
    attn_factor = np.float32(keys.number("rope.scaling.attn_factor", 1.0))
    if kind == "yarn":
        attn_factor *= _yarn_attn_factor(np.float32(1.0) / freq_scale)
    return {
        "rope_freq_base": freq_base,
        "rope_freq_scale": float(freq_scale),
        "rope_scaling_type": kind,
        "n_ctx_orig_yarn": keys.count("rope.scaling.original_context_length", n_ctx_train, most=1 << 31),
        "yarn_ext_factor": 1.0 if kind == "yarn" else 0.0,
        "yarn_attn_factor": float(attn_factor),
    }


def _yarn_attn_factor(factor: np.float32) -> np.float32:
    """Return YaRN's magnitude scale, divided by the same scale that ggml's rope will multiply by; in F32 steps."""
    one, tenth = np.float32(1.0), np.float32(0.1)
    log = np.float32(math.log(factor))
    wanted = one if factor <= 1.0 else tenth * log + one
    return wanted * (one / (one + tenth * log))
