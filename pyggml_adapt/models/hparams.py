"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_adapt.errors import ModelError

MAX_LAYERS = 512
MAX_EXPERTS = 512
MAX_SIZE = 1 << 24  # of any dimension: larger than every published model's, small enough that products fit in 64 bits

ROPE_SCALING_TYPES = ("none", "linear", "yarn")
GATING_FUNCS = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True, slots=True)
class HParams:
    """What shapes a model's graph, named as in llama.cpp's llama_hparams; counts in elements.

    Those with a default are read only for the architectures that have them: by Model.read_hparams().
    Source: llama.cpp src/llama-model.cpp (load_hparams), src/llama-hparams.h.
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
    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling_type: str
    n_ctx_orig_yarn: int
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    f_norm_rms_eps: float | None = None  # None: norms are LayerNorms
    f_norm_eps: float = 0.0
    n_ff_exp: int = 0  # of one expert, if it is not n_ff
    n_ff_shexp: int = 0  # of the shared expert
    n_layer_dense_lead: int = 0  # layers before the first that has experts
    expert_gating_func: str = "softmax"
    expert_weights_norm: bool = True
    expert_weights_scale: float = 0.0  # 0: none
    f_clamp_kqv: float = 0.0  # 0: no limit
    f_attention_scale: float = 0.0  # 0: 1 / sqrt(n_embd_head_k)
    f_embedding_scale: float = 0.0  # 0: none
    f_residual_scale: float = 0.0  # 0: none
    f_logit_scale: float = 0.0  # 0: none
    rope_finetuned: bool = True
    xielu: tuple[tuple[float, float, float, float], ...] = ()  # of each layer: alpha_n, alpha_p, beta, eps

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
        keys = Keys(metadata, arch)
        n_embd, n_head = keys.count("embedding_length"), keys.count("attention.head_count")
        n_head_kv = keys.count("attention.head_count_kv", n_head)
        if n_head % n_head_kv:
            raise ModelError(f"{arch}.attention.head_count = {n_head} is not a multiple of head_count_kv = {n_head_kv}")
        if n_embd % n_head and f"{arch}.attention.key_length" not in metadata:
            raise ModelError(f"{arch}.embedding_length = {n_embd} is not a multiple of head_count = {n_head}")
        n_embd_head_k = keys.count("attention.key_length", max(n_embd // n_head, 1))
        n_rot = keys.count("rope.dimension_count", n_embd_head_k)
        n_ctx_train = keys.count("context_length", most=1 << 31)
        keys.refuse("nextn_predict_layers")
        keys.refuse("attention.causal", True)
        found = {
            "n_layer": keys.count("block_count", most=MAX_LAYERS),
            "n_ff": keys.count("feed_forward_length"),
            "n_head": n_head,
            "n_head_kv": n_head_kv,
            "n_embd_head_k": n_embd_head_k,
            "n_embd_head_v": keys.count("attention.value_length", max(n_embd // n_head, 1)),
            "n_rot": n_rot,
            **_experts(keys),
            **_rope(keys, n_ctx_train),
        }
        found |= readers[arch](keys) if arch in readers else {}
        return cls(arch=arch, n_vocab=n_vocab, n_ctx_train=n_ctx_train, n_embd=n_embd, **found)


class Keys:
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

    def flag(self, key: str, default: bool) -> bool:
        """Return whether something is so."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{key} must be true or false, not {value!r}")
        return value

    def numbers(self, key: str, n: int) -> tuple[float, ...]:
        """Return n finite numbers, of a key that has no prefix; one number counts as n of it."""
        value = self.metadata.get(key)
        if value is None:
            raise ModelError(f"the metadata has no {key}")
        array = np.asarray(value)
        if array.dtype.kind not in "fiu" or array.shape not in ((), (n,)) or not np.isfinite(array).all():
            raise ModelError(f"{key} must be a finite number for each of {n} layers, not {value!r}")
        return tuple(np.broadcast_to(array, n).tolist())

    def refuse(self, key: str, harmless: float = 0) -> None:
        """Raise ModelError if a key asks for what is not implemented."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, harmless)
        if (value != harmless).any() if isinstance(value, np.ndarray) else value != harmless:
            raise ModelError(f"{key} = {value} is not implemented")


readers: dict[str, Callable[[Keys], dict[str, Any]]] = {}  # by architecture: of those that are its own


def read_experts(keys: Keys) -> dict[str, Any]:
    """Return what shapes the experts of architectures that have shared ones next to them."""
    n_ff_exp = keys.count("expert_feed_forward_length")
    return {
        "n_ff_exp": n_ff_exp,
        "n_ff_shexp": n_ff_exp * keys.count("expert_shared_count", most=MAX_EXPERTS),
        "n_layer_dense_lead": keys.count("leading_dense_block_count", 0, least=0, most=MAX_LAYERS),
        "expert_weights_scale": keys.number("expert_weights_scale", 0.0, least=0.0),
    }


def read_n_ff_exp(keys: Keys) -> int:
    """Return the size of one expert, for architectures whose experts share feed_forward_length if no key says it."""
    n_ff_exp = keys.count("expert_feed_forward_length", 0, least=0)
    return n_ff_exp or keys.count("feed_forward_length") // max(keys.count("expert_used_count", 1, least=0), 1)


def _experts(keys: Keys) -> dict[str, Any]:
    n_expert = keys.count("expert_count", 0, least=0, most=MAX_EXPERTS)
    n_expert_used = keys.count("expert_used_count", 0, least=0, most=MAX_EXPERTS)
    if (n_expert > 0) != (n_expert_used > 0) or n_expert_used > n_expert:
        raise ModelError(f"{keys.arch}.expert_used_count = {n_expert_used} does not fit expert_count = {n_expert}")
    if keys.count("expert_group_count", 0, least=0) > 1:
        keys.refuse("expert_group_count")
    return {"n_expert": n_expert, "n_expert_used": n_expert_used}


def _rope(keys: Keys, n_ctx_train: int) -> dict[str, Any]:
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


def read_yarn(keys: Keys) -> dict[str, Any]:
    """Return the rope parameters of architectures that have keys for more of YaRN's."""
    found = _rope(keys, keys.count("context_length", most=1 << 31))
    if found["rope_scaling_type"] == "yarn":
        factor = np.float32(1.0) / np.float32(found["rope_freq_scale"])
        attn_factor = np.float32(keys.number("rope.scaling.attn_factor", 1.0))
        log_mul = keys.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0)
        found["yarn_attn_factor"] = float(_yarn_attn_factor(factor, log_mul) * attn_factor)
    found["yarn_beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0, least=0.0)
    found["yarn_beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0, least=0.0)
    return found


def _yarn_attn_factor(factor: np.float32, log_mul: float = 0.0) -> np.float32:
    """Return YaRN's magnitude scale, divided by the same scale that ggml's rope will multiply by; in F32 steps."""
    one, tenth = np.float32(1.0), np.float32(0.1)
    log = np.float32(math.log(factor))
    wanted = one if factor <= 1.0 else tenth * log + one
    if log_mul != 0.0:
        wanted = wanted / (one if factor <= 1.0 else tenth * np.float32(log_mul) * log + one)
    return wanted * (one / (one + tenth * log))
