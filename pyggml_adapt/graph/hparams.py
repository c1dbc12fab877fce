"""Hyper-parameters of a model, read from GGUF metadata and checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pyggml_adapt.errors import ModelError

MAX_LAYERS = 512
MAX_EXPERTS = 512
MAX_CTX = (1 << 31) - 1  # positions are int32
MAX_ATTN_FACTOR = 1000.0  # of Q and of K: published ones are below 2; their product stays far from F32's limits
MAX_SIZE = 1 << 24  # of any dimension: larger than every published model's, small enough that products fit in 64 bits

ROPE_SCALING_TYPES = ("none", "linear", "yarn", "longrope")
GATING_FUNCS = {1: "softmax", 2: "sigmoid"}


class Window(NamedTuple):
    """How far back tokens see: the last n positions, their own included, or, chunked, from a multiple of n on."""

    n: int
    is_chunked: bool = False

    def sees(self, p0: np.ndarray, p1: np.ndarray | int) -> np.ndarray:
        """Return bool arrays: whether a token at p1 sees p0, as far as that is not later."""
        return p0 >= p1 // self.n * self.n if self.is_chunked else p1 - p0 < self.n

    def first(self, p1: int) -> int:
        """Return the first position that p1 sees."""
        return p1 // self.n * self.n if self.is_chunked else max(p1 - self.n + 1, 0)


class LayerSizes(NamedTuple):
    """What of one layer may differ from the other layers."""

    n_head: int
    n_head_kv: int
    n_ff: int


@dataclass(frozen=True, slots=True)
class HParams:
    """What shapes a model's graph, named as in llama.cpp's llama_hparams; counts in elements.

    Those with a default are read only for the architectures that have them: by Model.read_hparams().  Where layers
    differ in size (layer_sizes), n_head, n_head_kv and n_ff are the largest: of_layer() has each layer's.
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
    n_layer_dense_lead: int = 0  # layers before the first that may have experts
    n_moe_layer_step: int = 1  # every which layer has experts; 0: none
    expert_gating_func: str = "softmax"
    expert_weights_norm: bool = True
    expert_weights_scale: float = 0.0  # 0: none
    f_clamp_kqv: float = 0.0  # 0: no limit
    f_attention_scale: float = 0.0  # 0: 1 / sqrt(n_embd_head_k)
    f_embedding_scale: float = 0.0  # 0: none
    f_residual_scale: float = 0.0  # 0: none
    f_logit_scale: float = 0.0  # 0: none
    f_attn_logit_softcapping: float = 0.0  # 0: none
    f_final_logit_softcapping: float = 0.0  # 0: none
    n_layer_nextn: int = 0  # layers after the n_layer that are computed: they predict further tokens, and are kept only
    window: Window | None = None  # of the layers in swa_layers
    swa_layers: tuple[bool, ...] = ()  # whether each layer attends to a sliding window
    rope_freq_base_swa: float = 0.0  # of these layers; 0: as the others
    rope_freq_scale_swa: float = 0.0  # of these layers; 0: as the others
    yarn_swa: bool = True  # whether YaRN counts for these layers too
    f_attn_temp_scale: float = 0.0  # 0: Q is not scaled by position
    f_attn_temp_offset: float = 0.0
    n_attn_temp_floor_scale: int = 0
    f_max_alibi_bias: float = 0.0  # 0: attention has no bias by distance
    layer_sizes: tuple[LayerSizes, ...] = ()
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

    def is_swa(self, il: int) -> bool:
        """Return whether layer il attends to a sliding window."""
        return bool(self.swa_layers) and self.swa_layers[il]

    def has_experts(self, il: int) -> bool:
        """Return whether layer il of a model with experts has any."""
        step = self.n_moe_layer_step
        return il >= self.n_layer_dense_lead and step > 0 and (il + 1) % step == 0

    def of_layer(self, il: int) -> HParams:
        """Return the hyper-parameters with the sizes of layer il."""
        return replace(self, layer_sizes=(), **self.layer_sizes[il]._asdict()) if self.layer_sizes else self

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], n_vocab: int) -> HParams:
        """Return the hyper-parameters in `metadata`; n_vocab is ne1 of the token embedding.

        Raises: ModelError naming the key that is absent, of a wrong type, or out of range.
        """
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise ModelError("the metadata has no general.architecture")
        keys = Keys(metadata, arch)
        n_embd, sizes = keys.count("embedding_length"), _layer_sizes(keys)
        n_head = sizes[0].n_head
        if n_embd % n_head and f"{arch}.attention.key_length" not in metadata:
            raise ModelError(f"{arch}.embedding_length = {n_embd} is not a multiple of head_count = {n_head}")
        n_embd_head_k = keys.count("attention.key_length", max(n_embd // n_head, 1))
        n_rot = keys.count("rope.dimension_count", n_embd_head_k)
        n_ctx_train = keys.count("context_length", most=MAX_CTX)
        n_embd_head_v = keys.count("attention.value_length", max(n_embd // n_head, 1))
        keys.refuse("rope.dimension_count_swa", n_rot)
        keys.refuse("attention.key_length_swa", n_embd_head_k)
        keys.refuse("attention.value_length_swa", n_embd_head_v)
        n_layer, n_layer_nextn = keys.n_layers()
        keys.refuse("attention.causal", True)
        found = {
            "n_layer": n_layer,
            "n_layer_nextn": n_layer_nextn,
            **LayerSizes(*map(max, zip(*sizes, strict=True)))._asdict(),
            "layer_sizes": sizes if len(sizes) > 1 else (),
            "n_embd_head_k": n_embd_head_k,
            "n_embd_head_v": n_embd_head_v,
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
            raise ModelError(f"{key} must be a whole number, not {_short(value)}")
        if not least <= value <= most:
            raise ModelError(f"{key} = {value} is not from {least} to {most}")
        return value

    def counts(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Return a whole number, which may be 0, for each layer; one number counts as that of all."""
        n_layer, name = sum(self.n_layers()), f"{self.arch}.{key}"
        value = self.metadata.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, (np.ndarray, list)):
            return (self.count(key, least=0),) * n_layer
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.shape != (n_layer,):
            raise ModelError(f"{name} must be a whole number for each of {n_layer} layers, not {_short(value)}")
        for each in array.tolist():
            if not 0 <= each <= MAX_SIZE:
                raise ModelError(f"{name} = {each} is not from 0 to {MAX_SIZE}")
        return tuple(array.tolist())

    def number(
        self, key: str, default: float | None = None, *, least: float = -math.inf, most: float = math.inf
    ) -> float:
        """Return a finite number."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"the metadata has no {key}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"{key} must be a number, not {_short(value)}")
        if not (math.isfinite(value) and value >= least):
            raise ModelError(f"{key} = {value} is not a finite number of at least {least}")
        if value > most:
            raise ModelError(f"{key} = {value} is above {most:g}")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        """Return a finite number above 0, or the default, which may be 0."""
        value = self.number(key, default, least=0.0)
        if value == 0.0 and f"{self.arch}.{key}" in self.metadata:
            raise ModelError(f"{self.arch}.{key} = {value} is not positive")
        return value

    def n_layers(self) -> tuple[int, int]:
        """Return the numbers of layers that are computed, and of those after them that predict further tokens."""
        n_layer = self.count("block_count", most=MAX_LAYERS)
        n_nextn = self.count("nextn_predict_layers", 0, least=0, most=MAX_LAYERS)
        if n_nextn >= n_layer:
            raise ModelError(f"{self.arch}.nextn_predict_layers = {n_nextn} leaves none of block_count = {n_layer}")
        return n_layer - n_nextn, n_nextn

    def flag(self, key: str, default: bool) -> bool:
        """Return whether something is so."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{key} must be true or false, not {_short(value)}")
        return value

    def numbers(self, key: str, n: int) -> tuple[float, ...]:
        """Return n finite numbers, of a key that has no prefix; one number counts as n of it."""
        value = self.metadata.get(key)
        if value is None:
            raise ModelError(f"the metadata has no {key}")
        array = np.asarray(value)
        if array.dtype.kind not in "fiu" or array.shape not in ((), (n,)) or not np.isfinite(array).all():
            raise ModelError(f"{key} must be a finite number for each of {n} layers, not {_short(value)}")
        return tuple(np.broadcast_to(array, n).tolist())

    def refuse(self, key: str, harmless: float = 0) -> None:
        """Raise ModelError if a key asks for what is not implemented."""
        key = f"{self.arch}.{key}"
        value = self.metadata.get(key, harmless)
        array = np.asarray(value)
        if array.size == 0 or (array != harmless).any():
            raise ModelError(f"{key} = {_short(value)} is not implemented")


def _short(value: object) -> str:
    """Return a value as an error shows it: in one line, not whole if it is long."""
    text = " ".join(repr(value.tolist() if isinstance(value, np.ndarray) else value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


readers: dict[str, Callable[[Keys], dict[str, Any]]] = {}  # by architecture: of those that are its own
layered: set[str] = set()  # architectures whose layers may differ in size, or lack a part


def _layer_sizes(keys: Keys) -> tuple[LayerSizes, ...]:
    """Return the sizes of each layer; where the architecture's layers do not differ, of one."""
    if keys.arch in layered:
        n_head = keys.counts("attention.head_count")
        n_head_kv = keys.counts("attention.head_count_kv", n_head)
        sizes = tuple(map(LayerSizes, n_head, n_head_kv, keys.counts("feed_forward_length")))
        if not n_head[0]:
            raise ModelError(f"{keys.arch}.attention.head_count = 0 in layer 0, whose heads' size is that of all heads")
    else:
        one = keys.count("attention.head_count")
        sizes = (LayerSizes(one, keys.count("attention.head_count_kv", one), keys.count("feed_forward_length")),)
    for of_q, of_kv, _ in sizes:
        if of_kv and (of_q % of_kv or not of_q):
            raise ModelError(f"{keys.arch}.attention.head_count = {of_q} is not a multiple of head_count_kv = {of_kv}")
    return sizes


def read_experts(keys: Keys) -> dict[str, Any]:
    """Return what shapes the experts of architectures that have shared ones next to them."""
    n_ff_exp = keys.count("expert_feed_forward_length")
    return {
        "n_ff_exp": n_ff_exp,
        "n_ff_shexp": n_ff_exp * keys.count("expert_shared_count", most=MAX_EXPERTS),
        "n_layer_dense_lead": keys.count("leading_dense_block_count", 0, least=0, most=MAX_LAYERS),
        "expert_weights_scale": keys.number("expert_weights_scale", 0.0, least=0.0),
    }


def read_gating_func(keys: Keys, default: int | None = None) -> str:
    """Return the name of what turns the router's logits into probabilities; 0 stands for the default, if any."""
    gating = keys.count("expert_gating_func", default, least=0) or default or 0
    if gating not in GATING_FUNCS:
        raise ModelError(
            f"{keys.arch}.expert_gating_func = {gating} is not implemented; implemented are 1 and 2: "
            f"{' and '.join(GATING_FUNCS.values())}"
        )
    return GATING_FUNCS[gating]


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
    if not isinstance(kind, str) or kind not in ROPE_SCALING_TYPES:
        raise ModelError(
            f"{keys.arch}.rope.scaling.type = {_short(kind)} is not implemented; "
            f"implemented are {', '.join(ROPE_SCALING_TYPES)}"
        )
    freq_scale = np.float32(1.0) if kind == "none" else _freq_scale(keys)
    freq_base = keys.positive("rope.freq_base", 10000.0)
    attn_factor = np.float32(keys.number("rope.scaling.attn_factor", 1.0, least=0.0, most=MAX_ATTN_FACTOR))
    if kind == "yarn":
        attn_factor *= _yarn_attn_factor(np.float32(1.0) / freq_scale)
    return {
        "rope_freq_base": freq_base,
        "rope_freq_scale": float(freq_scale),
        "rope_scaling_type": kind,
        "n_ctx_orig_yarn": keys.count("rope.scaling.original_context_length", n_ctx_train, most=MAX_CTX),
        "yarn_ext_factor": 1.0 if kind == "yarn" else 0.0,
        "yarn_attn_factor": float(attn_factor),
    }


def _freq_scale(keys: Keys) -> np.float32:
    """Return what positions are multiplied with."""
    factor = keys.number("rope.scaling.factor", 0.0, least=0.0)
    if f"{keys.arch}.rope.scaling.factor" not in keys.metadata:
        factor = keys.number("rope.scale_linear", 0.0, least=0.0)
    return np.float32(1.0) / np.float32(factor or 1.0)


def read_yarn(keys: Keys) -> dict[str, Any]:
    """Return the rope parameters of architectures that have keys for more of YaRN's."""
    found = _rope(keys, keys.count("context_length", most=MAX_CTX))
    if found["rope_scaling_type"] == "yarn":
        factor = np.float32(1.0) / np.float32(found["rope_freq_scale"])
        attn_factor = np.float32(keys.number("rope.scaling.attn_factor", 1.0, least=0.0, most=MAX_ATTN_FACTOR))
        log_mul = keys.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0)
        found["yarn_attn_factor"] = float(_yarn_attn_factor(factor, log_mul) * attn_factor)
    found["yarn_beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0, least=0.0)
    found["yarn_beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0, least=0.0)
    return found


def read_swa(keys: Keys, n_pattern: int, *, n_swa: int, is_chunked: bool = False) -> dict[str, Any]:
    """Return which layers attend to a window of n_swa positions: all but every n_pattern-th, if no key says else.

    Their rope is as the other layers', unless a key says else; a factor counts even if rope.scaling.type is none.
    """
    n_layer, key = keys.n_layers()[0], f"{keys.arch}.attention.sliding_window_pattern"
    pattern = np.asarray(keys.metadata.get(key, n_pattern))
    if pattern.ndim:
        if pattern.dtype.kind not in "biu" or len(pattern) < n_layer:
            raise ModelError(f"{key} must be true or false for each of {n_layer} layers, not {_short(pattern)}")
        swa_layers = tuple(bool(each) for each in pattern[:n_layer])
    else:
        n_pattern = keys.count("attention.sliding_window_pattern", n_pattern, least=0, most=MAX_LAYERS)
        swa_layers = tuple(n_pattern == 0 or il % n_pattern < n_pattern - 1 for il in range(n_layer))
    return {
        "window": Window(n_swa, is_chunked),
        "swa_layers": swa_layers,
        "rope_freq_base_swa": keys.positive("rope.freq_base_swa", 0.0),
        "rope_freq_scale_swa": float(_freq_scale(keys)),
    }


def _yarn_attn_factor(factor: np.float32, log_mul: float = 0.0) -> np.float32:
    """Return YaRN's magnitude scale, divided by the same scale that ggml's rope will multiply by; in F32 steps."""
    one, tenth = np.float32(1.0), np.float32(0.1)
    log = np.float32(math.log(factor))
    wanted = one if factor <= 1.0 else tenth * log + one
    if log_mul != 0.0:
        wanted = wanted / (one if factor <= 1.0 else tenth * np.float32(log_mul) * log + one)
    return wanted * (one / (one + tenth * log))
