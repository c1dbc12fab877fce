"""Small models with random weights, written from the architectures' own tensor tables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyggml_adapt.ggml import Type, quantize
from pyggml_adapt.ggml.gguf import GGUFWriter
from pyggml_adapt.models import HParams, TensorSpec, model_class

BOS, EOS = 1, 2
N_SPECIAL = 3
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
WORDS = ("▁", "e", "t", "a", "o", "he", "▁t", "▁the", "in", "▁a", "é", "世", "▁Once", "upon", "▁upon", "ing", "er")

EXPERTS = {"expert_count": 4, "expert_used_count": 2}
SHARED = {**EXPERTS, "expert_feed_forward_length": 96, "expert_shared_count": 2}
WINDOW = {"attention.sliding_window": 24}
KEYS: Mapping[str, Mapping[str, object]] = {  # that an architecture must have, or without which it is another one
    "apertus": {"xielu.alpha_n": [0.5, 0.7] * 64, "xielu.alpha_p": 0.8, "xielu.beta": 0.5, "xielu.eps": -1e-6},
    "cohere2": {**WINDOW, "logit_scale": 0.0625},
    "bailingmoe": {**SHARED, "expert_weights_norm": True},
    "deci": {"attention.head_count": [4, 8] * 64, "attention.head_count_kv": [2, 8] * 64,
             "feed_forward_length": [192, 96] * 64},
    "deepseek": {**SHARED, "leading_dense_block_count": 1},
    "dots1": {**SHARED, "leading_dense_block_count": 1, "expert_gating_func": 2, "attention.head_count_kv": 4},
    "ernie4_5-moe": {**EXPERTS, "expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 64,
                     "interleave_moe_layer_step": 1, "leading_dense_block_count": 1},
    "gemma2": WINDOW,
    "gemma3": WINDOW,
    "gpt-oss": {**EXPERTS, **WINDOW, "expert_feed_forward_length": 96},
    "glm4moe": {**SHARED, "leading_dense_block_count": 1},
    "granite": {"logit_scale": 8.0, "residual_scale": 0.25, "embedding_scale": 12.0, "attention.scale": 0.015625},
    "granitemoe": {**EXPERTS, "logit_scale": 6.0, "residual_scale": 0.25, "embedding_scale": 12.0},
    "hunyuan-moe": {**EXPERTS, "expert_feed_forward_length": 192, "expert_shared_feed_forward_length": 96},
    "llama4": {**EXPERTS, "expert_feed_forward_length": 96, "interleave_moe_layer_step": 2, "block_count": 4},
    "olmoe": {**EXPERTS, "attention.head_count_kv": 4},
    "phimoe": EXPERTS,
    "qwen2moe": {**EXPERTS, "expert_feed_forward_length": 96, "expert_shared_feed_forward_length": 160},
    "qwen3moe": {**EXPERTS, "expert_feed_forward_length": 96},
}  # fmt: skip


def layer_sizes(*layers: tuple[int, int, int]) -> dict[str, object]:
    """Return what of Tiny gives deci layers of so many heads, heads of K and V, and elements of ffn_up."""
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return {"n_layer": len(layers), "metadata": dict(zip(keys, map(list, zip(*layers, strict=True)), strict=True))}


LINEAR, NO_ATTENTION, NOTHING = (4, 0, 160), (0, 0, 64), (0, 0, 0)  # layers without attention over tokens
NEMOTRON = layer_sizes((4, 2, 192), (8, 8, 64), LINEAR, NO_ATTENTION, NOTHING, (4, 1, 96))


@dataclass(frozen=True)
class Tiny:
    """What a random model is like.

    type: of all matrices.  types: regular expression -> type of the tensors it is found in.  optional: a regular
    expression for the optional tensors that the model has.  changed: regular expression -> seed of the tensors it is
    found in, so that two models differ in these only.  metadata: more keys, without the architecture's prefix.
    """

    arch: str = "llama"
    type: str = "F32"
    types: Mapping[str, str] = field(default_factory=dict)
    n_layer: int = 2
    n_embd: int = 128
    n_ff: int = 192
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int | None = None
    n_expert: int = 0
    n_expert_used: int = 0
    n_ctx_train: int = 1024
    optional: str = r"^output\.weight|_exps"
    seed: int = 0
    changed: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    tokenizer: bool = True

    def all_metadata(self) -> dict[str, object]:
        """Return the metadata, its tokenizer aside."""
        keys: dict[str, object] = {
            "context_length": self.n_ctx_train,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5,
            "vocab_size": n_vocab(),
        }
        if self.head_dim:
            keys |= {
                "attention.key_length": self.head_dim,
                "attention.value_length": self.head_dim,
                "rope.dimension_count": self.head_dim,
            }
        if self.n_expert:
            keys |= {"expert_count": self.n_expert, "expert_used_count": self.n_expert_used}
        keys |= {**KEYS.get(self.arch, {}), **self.metadata}
        prefixed = {
            key if key.startswith("xielu.") else f"{self.arch}.{key}": value[: self.n_layer]
            if isinstance(value, list)
            else value
            for key, value in keys.items()
            if value is not None
        }
        return {"general.architecture": self.arch, "general.name": "tiny", **prefixed}

    def tensors(self) -> list[TensorSpec]:
        """Return the tensors that the model has, from its architecture's table."""
        model = model_class(self.arch)(HParams.from_gguf(self.all_metadata(), n_vocab()))
        specs = {s.name: s for s in model.all_tensors() if s.required or re.search(self.optional, s.name)}
        for name, spec in list(specs.items()):
            if spec.unless in specs:
                del specs[name]
        return list(specs.values())

    def type_of(self, spec: TensorSpec) -> Type:
        """Return the type of a tensor: vectors and routers are F32, as llama.cpp's quantiser leaves them."""
        if len(spec.ne) == 1 or re.search(r"ffn_gate_inp|_norm\.|\.bias$", spec.name):
            return Type.F32
        return Type[next((type for pattern, type in self.types.items() if re.search(pattern, spec.name)), self.type)]

    def data(self, spec: TensorSpec) -> np.ndarray:
        """Return random weights, F32 in NumPy's order; they depend on the name and the seed only."""
        seed = next((seed for pattern, seed in self.changed.items() if re.search(pattern, spec.name)), self.seed)
        digest = hashlib.sha256(f"{spec.name} {seed}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        values = rng.standard_normal(spec.ne[::-1], dtype=np.float32)
        if spec.name.startswith(("rope_freqs", "rope_factors")):
            return np.abs(values) + 0.5
        if "ffn_gate_inp_shexp" in spec.name:
            return values / np.float32(np.sqrt(spec.ne[0]))
        if len(spec.ne) == 1 or "_norm." in spec.name:
            return 0.1 * values + (0.0 if spec.name.endswith("bias") else 1.0)
        return values if spec.name.startswith("token_embd") else values * np.float32(1.5 / np.sqrt(spec.ne[0]))


def vocab() -> tuple[list[str], list[float], list[int]]:
    """Return texts, scores and types of a small SentencePiece vocabulary with byte fallback."""
    letters = [chr(c) for c in range(0x21, 0x7F)]
    words = [word for word in WORDS if word not in letters]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *words]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(letters) + len(words))
    return texts, [0.0] * (N_SPECIAL + 256) + [-float(i) for i in range(len(letters) + len(words))], types


def n_vocab() -> int:
    """Return the number of tokens of vocab()."""
    return len(vocab()[0])


def _set_tokenizer(writer: GGUFWriter) -> None:
    texts, scores, types = vocab()
    writer.set("tokenizer.ggml.model", "llama", "str")
    writer.set("tokenizer.ggml.tokens", texts, "str")
    writer.set("tokenizer.ggml.scores", scores, "f32")
    writer.set("tokenizer.ggml.token_type", types, "i32")
    writer.set("tokenizer.ggml.bos_token_id", BOS, "u32")
    writer.set("tokenizer.ggml.eos_token_id", EOS, "u32")


def _set(writer: GGUFWriter, key: str, value: object) -> None:
    first = value[0] if isinstance(value, list) else value
    kind = {bool: "bool", int: "u32", float: "f32", str: "str"}[type(first)]
    writer.set(key, value, "i32" if kind == "u32" and first < 0 else kind)


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[Type, tuple[int, ...], object]],
    *,
    tokenizer: bool = True,
) -> Path:
    """Write a GGUF file; tensors: name -> (type, ne, bytes)."""
    writer = GGUFWriter()
    for key, value in metadata.items():
        _set(writer, key, value)
    if tokenizer:
        _set_tokenizer(writer)
    else:
        writer.set("tokenizer.ggml.model", "no_vocab", "str")
    for name, (type, ne, _) in tensors.items():
        writer.add_tensor(name, type, ne)
    writer.write(path, {name: data for name, (_, _, data) in tensors.items()}, overwrite=True)
    return path


def tensors_of(tiny: Tiny) -> dict[str, tuple[Type, tuple[int, ...], object]]:
    """Return the model's tensors as write_gguf takes them."""
    return {
        spec.name: (tiny.type_of(spec), spec.ne, quantize(tiny.data(spec), tiny.type_of(spec)))
        for spec in tiny.tensors()
    }


def write_tiny(path: Path, tiny: Tiny) -> Path:
    """Write the model and return the path."""
    return write_gguf(path, tiny.all_metadata(), tensors_of(tiny), tokenizer=tiny.tokenizer)


def random_ids(n: int, seed: int = 0) -> list[int]:
    """Return token ids: BOS, then n - 1 that are not special."""
    rng = np.random.default_rng(seed)
    return [BOS, *rng.integers(N_SPECIAL, n_vocab(), n - 1).tolist()]
