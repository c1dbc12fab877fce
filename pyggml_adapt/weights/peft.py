"""LoRA as PEFT's save_pretrained writes it: a directory with adapter_config.json and adapter_model.safetensors.

What comes out has GGUF's names and orientation, so that nothing after this file knows of PEFT.

Source: PEFT 0.21 (tuners/lora/, utils/save_and_load.py, utils/other.py); llama.cpp convert_lora_to_gguf.py, and
llm_graph_context::build_inp_embd for the orientation of an embedding's pair.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import frexp
from typing import NamedTuple

import numpy as np
import safetensors

from pyggml_adapt.errors import FileFormatError, StrPath
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.weights.peft_config import MAX_CONFIG_NBYTES, PeftConfig, invalid, read_regular

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(A\.weight|B\.weight|B\.bias|embedding_A|embedding_B)")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.[^.]+$)")
_DTYPES = {"F32": (Type.F32, np.float32), "F16": (Type.F16, np.float16), "BF16": (Type.BF16, np.uint16)}


class Array(NamedTuple):
    """One tensor to be placed in memory.

    data: contiguous, of ne's shape in NumPy's order; float32, float16, or for BF16 its bits as uint16.
    """

    type: Type
    ne: tuple[int, ...]
    data: np.ndarray


class ArrayPair(NamedTuple):
    """A low-rank change of one tensor: (alpha / rank) * b a, where rank is b.ne[0]; alpha is never 0.

    a: F32 [n_in, rank], b: F32 [rank, n_out]; of stacked experts [n_in, rank, n_expert] and [rank, n_out, n_expert];
    of token_embd.weight a: [rank, n_vocab], b: [rank, n_embd].
    """

    a: Array
    b: Array
    alpha: float


@dataclass(frozen=True, slots=True)
class PeftAdaptor:
    """What a PEFT directory holds, by GGUF tensor name.

    whole: tensors that replace the model's; vectors are F32.  base: base_model_name_or_path, "" if there is none.
    files: the two paths that were read.  content_id: SHA-256 over both files, 64 hexadecimal digits.
    """

    pairs: Mapping[str, ArrayPair]
    whole: Mapping[str, Array]
    base: str
    files: tuple[str, ...]
    content_id: str


class Target(NamedTuple):
    """Where a Hugging Face parameter is in a GGUF file.

    n_head: its rows are permuted in groups of so many heads, 0: they are not.
    expert: which one it is of the n_expert that a stacked tensor holds, -1: not an expert.
    """

    name: str
    n_head: int = 0
    expert: int = -1
    n_expert: int = 0


TargetOf = Callable[[str], Target | None]
BiasOf = Callable[[str], np.ndarray | None]


class _Saved(NamedTuple):
    """A tensor of the file: its key there, type, and data in the shape that PEFT gave it."""

    key: str
    type: Type
    data: np.ndarray


class _Pair(NamedTuple):
    """A pair in NumPy's order: a [rank, n_in], of the embedding [n_vocab, rank]; b [n_out, rank]."""

    key: str
    a: np.ndarray
    b: np.ndarray
    alpha: float


def is_peft(path: StrPath) -> bool:
    """Return whether the path is a directory that PEFT may have written."""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_peft(directory: StrPath, target_of: TargetOf, bias_of: BiasOf | None = None) -> PeftAdaptor:
    """Return what a PEFT directory holds.

    target_of: gets a parameter's path in the Hugging Face model, as "model.layers.0.self_attn.q_proj.weight", and
    returns where it is in a GGUF file, None if nowhere.  bias_of: returns the model's own bias F32 by GGUF name, None
    if the model has none; it is asked only for biases that `lora_bias` adds to, and without it these are refused.
    Raises: FileAccessError; FileFormatError; AdaptorError (adaptor_invalid) naming the setting or tensor.
    """
    paths = tuple(os.path.join(directory, name) for name in (CONFIG, WEIGHTS))
    texts = read_regular(paths[0], most=MAX_CONFIG_NBYTES), _read_weights(directory, paths[1])
    config = PeftConfig.parse(paths[0], texts[0])
    modules, whole = _sort(paths[1], _deserialize(paths[1], texts[1]))
    config.check_patterns(len(modules))
    reader = _Reader(paths[1], config, target_of)
    for module, parts in modules.items():
        reader.add_module(module, parts)
    for parameter, saved in whole.items():
        reader.add_whole(parameter, saved)
    reader.add_biases(bias_of)
    digest = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts))
    return PeftAdaptor(reader.stacked_pairs(), reader.stacked_whole(), config.base, paths, digest.hexdigest())


def _read_weights(directory: StrPath, path: str) -> bytes:
    if not os.path.lexists(path) and os.path.lexists(os.path.join(directory, PICKLED)):
        raise invalid(path, f"the weights are there only as a pickle, {PICKLED}, which can run code when it is read")
    return read_regular(path)


def _deserialize(path: str, text: bytes) -> dict[str, _Saved]:
    """Return the tensors of a safetensors file by name, all of them finite floats."""
    try:
        found = safetensors.deserialize(text)
    except safetensors.SafetensorError as exc:
        raise FileFormatError(f"not a sound safetensors file: {exc}", path=path) from exc
    if not found:
        raise invalid(path, "the file has no tensors")
    tensors = {}
    for key, info in sorted(found, key=lambda item: item[0]):  # they come in no certain order
        if info["dtype"] not in _DTYPES:
            raise invalid(path, f"tensor {key!r} has type {info['dtype']}; LoRA weights are F32, F16 or BF16")
        type, dtype = _DTYPES[info["dtype"]]
        data = np.frombuffer(info["data"], dtype).reshape(info["shape"])
        if not data.size or not 1 <= data.ndim <= 4:
            raise invalid(path, f"tensor {key!r} has the shape {list(data.shape)}, which no weight has")
        if not (((data & 0x7F80) != 0x7F80) if type == Type.BF16 else np.isfinite(data)).all():
            raise invalid(path, f"tensor {key!r} has NaN or infinite values")
        tensors[key] = _Saved(key, type, data)
    return tensors


def _sort(path: str, tensors: Mapping[str, _Saved]) -> tuple[dict[str, dict[str, _Saved]], dict[str, _Saved]]:
    """Return the parts of each LoRA module, and the whole parameters, by their paths in the Hugging Face model."""
    modules: dict[str, dict[str, _Saved]] = {}
    others: dict[str, _Saved] = {}
    for key, saved in tensors.items():
        if not key.startswith(_PREFIX):
            raise invalid(path, f"tensor {key!r} is not one that PEFT saves: its name does not begin with {_PREFIX}")
        name = key.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(name):
            modules.setdefault(match[1], {})[match[2].removesuffix(".weight")] = saved
        elif "lora_magnitude_vector" in name:
            raise invalid(path, f"tensor {key!r} belongs to DoRA, which is not implemented")
        elif ".lora_" in name:
            raise invalid(path, f"tensor {key!r} is of a kind of LoRA that is not implemented")
        else:
            others[name] = saved
    whole: dict[str, _Saved] = {}
    for name, saved in others.items():
        module, _, leaf = name.rpartition(".")
        # PEFT saves a copy of what it wraps and leaves as it was: the base's own, here in the foundation
        if module.endswith(".original_module") or (
            leaf == "weight" and module.endswith(".base_layer") and module.removesuffix(".base_layer") in modules
        ):
            continue
        parameter = _WRAPPERS.sub("", name)
        twin = whole.setdefault(parameter, saved)
        if twin.type != saved.type or not np.array_equal(twin.data, saved.data):
            raise invalid(path, f"tensors {twin.key!r} and {saved.key!r} are one parameter, but differ")
    return modules, whole


class _Reader:
    """Collects what the modules of one file change, by GGUF name and expert."""

    def __init__(self, path: str, config: PeftConfig, target_of: TargetOf):
        self.path, self.config, self._target_of = path, config, target_of
        self._pairs: dict[str, dict[int, _Pair]] = {}
        self._whole: dict[str, dict[int, _Saved]] = {}
        self._biases: dict[str, np.ndarray] = {}
        self._n_expert: dict[str, int] = {}

    def target(self, parameter: str, key: str) -> Target:
        """Return where a parameter is in a GGUF file."""
        target = self._target_of(parameter)
        if target is None:
            raise invalid(self.path, f"tensor {key!r} is for {parameter!r}, which the model does not have")
        self._n_expert[target.name] = target.n_expert if target.expert >= 0 else 0
        return target

    def permute(self, data: np.ndarray, target: Target, key: str) -> np.ndarray:
        """Return rows in GGUF's order: of each head, the two halves that rope turns together, interleaved."""
        if not target.n_head:
            return data
        n = len(data)
        if n % (2 * target.n_head):
            raise invalid(self.path, f"tensor {key!r} has {n} rows, which are not {target.n_head} heads of even size")
        halves = data.reshape(target.n_head, 2, n // target.n_head // 2, *data.shape[1:])
        return halves.swapaxes(1, 2).reshape(data.shape)

    def add_module(self, module: str, parts: Mapping[str, _Saved]) -> None:
        """Add one module's pair, and the bias of its B."""
        is_embedding = any(part.startswith("embedding") for part in parts)
        names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        any_key = next(iter(parts.values())).key
        for part in names:
            if part not in parts:
                raise invalid(self.path, f"tensor {any_key!r} is half of a pair: the module has no lora_{part}")
        if is_embedding and len(parts) > 2:
            raise invalid(self.path, f"tensor {any_key!r} is of a module with two kinds of LoRA")
        target = self.target(f"{module}.weight", any_key)
        if is_embedding != (target.name == "token_embd.weight"):
            kind = "an embedding" if is_embedding else "a linear layer"
            raise invalid(self.path, f"tensor {any_key!r} is LoRA for {kind}, which {target.name} is not")
        if target.expert in self._pairs.setdefault(target.name, {}):
            raise invalid(self.path, f"tensor {any_key!r} is a second pair for {target.name}")
        pair = self._pair(module, parts[names[0]], parts[names[1]], target)
        self._pairs[target.name][target.expert] = pair
        if bias := parts.get("B.bias"):
            self._add_bias(module, bias, pair)

    def _pair(self, module: str, a: _Saved, b: _Saved, target: Target) -> _Pair:
        rank = self.config.rank(module)
        for saved, axis in ((a, 0), (b, 1)):
            if saved.data.ndim != 2:
                raise invalid(self.path, f"tensor {saved.key!r} has the shape {list(saved.data.shape)}, not a matrix's")
            if (found := saved.data.shape[axis]) != rank:
                raise invalid(self.path, f"tensor {saved.key!r} has rank {found}, but {CONFIG} says {rank}")
        left, right = _f32(a), np.ascontiguousarray(self.permute(_f32(b), target, b.key))
        if target.name == "token_embd.weight":
            left = np.ascontiguousarray(left.T)  # a row for each token, to be looked up
        return _Pair(a.key, left, right, self.config.alpha(module, rank))

    def _add_bias(self, module: str, bias: _Saved, pair: _Pair) -> None:
        """Note what B adds to a module's bias: the scaled bias of its own."""
        rank = pair.b.shape[1]
        if bias.data.shape != pair.b.shape[:1]:
            raise invalid(self.path, f"tensor {bias.key!r} has the shape {list(bias.data.shape)}, not its pair's rows")
        target = self.target(f"{module}.bias", bias.key)
        if target.expert >= 0:
            raise invalid(self.path, f"tensor {bias.key!r} is a bias of an expert, which is not implemented")
        with np.errstate(over="ignore", under="ignore"):
            scaled = _f32(bias) * np.float32(pair.alpha / rank)
        if not np.isfinite(scaled).all():
            raise invalid(self.path, f"tensor {bias.key!r} has values too large to be scaled by {pair.alpha / rank:g}")
        self._biases[target.name] = self.permute(scaled, target, bias.key)

    def add_whole(self, parameter: str, saved: _Saved) -> None:
        """Add a tensor that replaces the model's."""
        target = self.target(parameter, saved.key)
        if target.name in self._pairs:
            raise invalid(self.path, f"tensor {saved.key!r} replaces {target.name}, for which there is a pair too")
        if target.expert in self._whole.setdefault(target.name, {}):
            raise invalid(self.path, f"tensor {saved.key!r} is a second one for {target.name}")
        if saved.data.ndim == 1:
            saved = _Saved(saved.key, Type.F32, _f32(saved))
        data = np.ascontiguousarray(self.permute(saved.data, target, saved.key))
        self._whole[target.name][target.expert] = saved._replace(data=data)

    def add_biases(self, bias_of: BiasOf | None) -> None:
        """Add what `lora_bias` adds to the biases, of the file or of the model, as whole ones."""
        for name, change in self._biases.items():
            own = self._whole.get(name)
            if own is None and bias_of is None:
                raise invalid(self.path, f"lora_bias changes {name}, which needs the model's own bias")
            base = own[-1].data if own is not None else bias_of(name) if bias_of is not None else None
            if base is not None and base.shape != change.shape:
                raise invalid(self.path, f"lora_bias changes {name} by {len(change)} values, where {base.size} are")
            total = change if base is None else base + change
            self._whole[name] = {-1: _Saved(name, Type.F32, np.ascontiguousarray(total, np.float32))}

    def stacked_whole(self) -> dict[str, Array]:
        """Return the whole tensors, experts stacked."""
        result = {}
        for name, saved in self._whole.items():
            first = next(iter(saved.values()))
            data = first.data
            if n_expert := self._n_expert[name]:
                if len(saved) != n_expert:
                    raise invalid(self.path, f"tensor {first.key!r} replaces one expert, but not every other of {name}")
                if any((s.type, s.data.shape) != (first.type, data.shape) for s in saved.values()):
                    raise invalid(self.path, f"tensor {first.key!r} has another type or shape than {name}'s other ones")
                data = np.stack([saved[i].data for i in range(n_expert)])
            result[name] = Array(first.type, data.shape[::-1], data)
        return result

    def stacked_pairs(self) -> dict[str, ArrayPair]:
        """Return the pairs, experts stacked."""
        result = {}
        for name, pairs in self._pairs.items():
            n_expert = self._n_expert[name]
            _, a, b, alpha = self._stack(name, pairs, n_expert) if n_expert else pairs[-1]
            if not alpha:  # a scale of 0, but llama.cpp takes an alpha of 0 for a scale of 1
                b, alpha = np.zeros_like(b), float(b.shape[-1])
            result[name] = ArrayPair(Array(Type.F32, a.shape[::-1], a), Array(Type.F32, b.shape[::-1], b), alpha)
        return result

    def _stack(self, name: str, pairs: Mapping[int, _Pair], n_expert: int) -> _Pair:
        """Return the experts' pairs as one.

        An expert without a pair gets zeros, whose product changes nothing.  Zeros fill up smaller ranks as well.  There
        is one alpha for all: a pair of another scale is scaled here if that is exact, by a power of two.
        """
        lead = max(pairs.values(), key=lambda pair: (pair.alpha != 0, pair.b.shape[1]))
        rank = max(pair.b.shape[1] for pair in pairs.values())
        a = np.zeros((n_expert, rank, lead.a.shape[1]), np.float32)
        b = np.zeros((n_expert, lead.b.shape[0], rank), np.float32)
        scale = lead.alpha / lead.b.shape[1]
        for expert, pair in pairs.items():
            n = pair.b.shape[1]
            if (pair.a.shape[1], pair.b.shape[0]) != (lead.a.shape[1], lead.b.shape[0]):
                raise invalid(self.path, f"tensor {pair.key!r} has another shape than {name}'s other experts")
            if not pair.alpha:
                continue
            ratio = pair.alpha / n / scale
            if frexp(abs(ratio))[0] != 0.5:
                detail = f"{pair.alpha / n:g}, of others {scale:g}"
                raise invalid(self.path, f"tensor {pair.key!r}: the experts of {name} differ in scale, here {detail}")
            with np.errstate(over="ignore", under="ignore"):
                scaled = pair.b * np.float32(ratio)
            if not np.array_equal(scaled / np.float32(ratio), pair.b):
                raise invalid(self.path, f"tensor {pair.key!r} has values too large or small to be scaled by {ratio:g}")
            a[expert, :n], b[expert, :, :n] = pair.a, scaled
        return _Pair(lead.key, a, b, lead.alpha * (rank / lead.b.shape[1]))


def _f32(saved: _Saved) -> np.ndarray:
    """Return the values as float32, which holds all three types exactly."""
    if saved.type == Type.BF16:
        return (saved.data.astype(np.uint32) << 16).view(np.float32)
    return saved.data.astype(np.float32, copy=False)
