"""The models that are measured: random weights in real shapes, quantised by ggml, and derivatives of them.

Files are made once and kept in a folder; a second run finds them.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import pyggml_adapt as pga
from pyggml_adapt.ggml import GGUFReader, Type, quantize
from pyggml_adapt.ggml.gguf import GGUFWriter
from pyggml_adapt.models import HParams, Model, model_class

TASKS = ("code", "sum", "class", "chat")
ROWS = 256  # of a tensor, that are made at a time

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Shape:
    """The size of one model, in the names of GGUF's keys.

    head_dim: None for n_embd / n_head.  optional: the names' ends of the optional tensors that it has.  more: keys that
    not every architecture has, without its prefix.
    """

    name: str
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 2048
    arch: str = "llama"
    head_dim: int | None = None
    optional: tuple[str, ...] = ("output.weight",)
    more: Mapping[str, int | float] = field(default_factory=dict)

    def metadata(self) -> dict[str, tuple[object, str]]:
        """Return the keys of the architecture, each with its value and GGUF type."""
        counts = {
            "block_count": self.n_layer,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "context_length": self.n_ctx,
            "rope.dimension_count": self.head_dim or self.n_embd // self.n_head,
        }
        if self.head_dim:
            counts |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        keys: dict[str, tuple[object, str]] = {
            "general.architecture": (self.arch, "str"),
            "general.name": (self.name, "str"),
        }
        numbers = {**counts, "attention.layer_norm_rms_epsilon": 1e-5, **self.more}
        types = {int: "u32", float: "f32"}
        return keys | {f"{self.arch}.{key}": (value, types[type(value)]) for key, value in numbers.items()}

    def model(self) -> Model:
        """Return the model whose table of tensors is written."""
        metadata = {key: value for key, (value, _) in self.metadata().items()}
        return model_class(self.arch)(HParams.from_gguf(metadata, self.n_vocab))


SMALL = Shape("0.1B", n_embd=768, n_layer=12, n_head=12, n_head_kv=4, n_ff=2048)
LARGE = Shape("1.1B", n_embd=2048, n_layer=22, n_head=32, n_head_kv=4, n_ff=5632)  # TinyLlama's
THIN = Shape("thin", n_embd=64, n_layer=22, n_head=2, n_head_kv=1, n_ff=64, n_vocab=512)  # next to nothing to compute
WIDE = replace(THIN, name="thin-152k", n_vocab=151936)  # with a large vocabulary
SHAPES = {shape.name: shape for shape in (SMALL, LARGE, THIN)}
TYPES = ("Q4_K_M", "Q8_0", "F16")

# Four architectures with about 0.1 B parameters, which qwen3moe uses for a token: it has 0.3 B.  Their ways are those
# of the published models: heads wider than n_embd / n_head, five layers with a window before one without, fused
# matrices, rope factors, a head that is tied to the embedding.  llama.cpp wants special tokens of a model whose name
# has phi3 or phi-3 in it.
_QWEN3 = Shape("qwen3", n_embd=768, n_layer=12, n_head=12, n_head_kv=4, n_ff=2048, arch="qwen3", head_dim=128,
               optional=(), more={"rope.freq_base": 1e6})  # fmt: skip
ARCHITECTURES = (
    _QWEN3,
    replace(_QWEN3, name="gemma3", arch="gemma3", n_head=4, n_head_kv=1, head_dim=256,
            more={"rope.freq_base": 1e6, "attention.sliding_window": 512}),
    replace(_QWEN3, name="phi_3", arch="phi3", n_head=8, n_head_kv=8, head_dim=None, n_ctx=131072,
            optional=("output.weight", "attn_qkv.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
            more={"rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.19}),
    replace(_QWEN3, name="qwen3moe", arch="qwen3moe",
            more={"rope.freq_base": 1e6, "expert_count": 32, "expert_used_count": 8,
                  "expert_feed_forward_length": 256}),
)  # fmt: skip


def weights(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and ne of every tensor that the model has."""
    specs = [s for s in shape.model().all_tensors() if s.required or s.name.endswith(shape.optional)]
    names = {spec.name for spec in specs}
    for spec in specs:
        if spec.unless not in names:
            yield spec.name, spec.ne


def tensor_type(name: str, ne: tuple[int, ...], shape: Shape, mixture: str) -> Type:
    """Return the type that llama.cpp's quantiser gives a tensor.

    Source: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl)
    """
    if len(ne) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Type.F32
    if mixture != "Q4_K_M":
        return Type[mixture]
    head = "output.weight" if "output.weight" in shape.optional else "token_embd.weight"  # tied to it
    if name == head:
        return Type.Q6_K
    if name.endswith("attn_qkv.weight"):
        return Type.Q5_K
    if name.endswith(("attn_v.weight", "ffn_down.weight", "ffn_down_exps.weight")):
        il, n = int(name.split(".")[1]), shape.n_layer
        if il < n // 8 or il >= 7 * n // 8 or (il - n // 8) % 3 == 2:
            return Type.Q6_K
    return Type.Q4_K


def is_own(name: str, shape: Shape) -> bool:
    """Return whether a task's fine-tune changed the tensor: attention in the last half of the layers."""
    parts = name.split(".")
    return (
        parts[0] == "blk"
        and int(parts[1]) >= shape.n_layer // 2
        and parts[2] in ("attn_q", "attn_k", "attn_v", "attn_output")
    )


def make_vocab(n_vocab: int) -> dict[str, tuple[object, str]]:
    """Return the keys of a SentencePiece vocabulary: specials, bytes, letters, and pieces of two to four letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["\u2581", *letters, *(f"\u2581{letter}" for letter in letters)]
    known = letters
    while len(pieces) < n_vocab:
        known = [piece + letter for piece in known for letter in letters]
        pieces += known
    n_pieces = n_vocab - 259
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[:n_pieces]]
    scores = [0.0] * 259 + [-float(i) for i in range(n_pieces)]
    types = [2, 3, 3] + [6] * 256 + [1] * n_pieces
    return {
        "tokenizer.ggml.model": ("llama", "str"),
        "tokenizer.ggml.pre": ("default", "str"),
        "tokenizer.ggml.tokens": (tokens, "str"),
        "tokenizer.ggml.scores": (scores, "f32"),
        "tokenizer.ggml.token_type": (types, "i32"),
        "tokenizer.ggml.bos_token_id": (1, "u32"),
        "tokenizer.ggml.eos_token_id": (2, "u32"),
        "tokenizer.ggml.unknown_token_id": (0, "u32"),
    }


def _random_rows(seed: tuple[int, ...], n_rows: int, ne0: int, type: Type) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n_rows, ne0), dtype=np.float32)
    rows *= np.float32(1 / np.sqrt(ne0))  # keeps activations at the size that they came in
    return quantize(rows, type)


def _random_tensor(
    name: str, ne: tuple[int, ...], type: Type, task: str, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor in blocks; they depend on task, name and ne only."""
    if len(ne) == 1:
        yield np.linspace(1, 2 if name.startswith("rope_factors") else 1, *ne, dtype=np.float32)
        return
    seed, n_rows = zlib.crc32(f"{task}/{name}".encode()), math.prod(ne[1:])
    starts = range(0, n_rows, ROWS)
    yield from pool.map(lambda start: _random_rows((seed, start), min(ROWS, n_rows - start), ne[0], type), starts)


def write_model(
    path: Path, shape: Shape, mixture: str, task: str = "", source: Path | None = None, tick: Tick | None = None
) -> None:
    """Write a whole model; with `source`, a fine-tune of it for `task`, which changes its own tensors only."""
    writer = GGUFWriter()
    for key, (value, type) in {**shape.metadata(), **make_vocab(shape.n_vocab)}.items():
        writer.set(key, value, type)
    table = {name: (ne, tensor_type(name, ne, shape, mixture)) for name, ne in weights(shape)}
    for name, (ne, type) in table.items():
        writer.add_tensor(name, type, ne)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reader = GGUFReader(source) if source else None
        mapped = memoryview(reader.map()) if reader else None

        def data(name: str) -> object:
            ne, type = table[name]
            if tick:
                tick(writer.tensors[name])
            if reader is None or mapped is None or is_own(name, shape):
                return _random_tensor(name, ne, type, task, pool)
            info = reader.tensors[name]
            return mapped[info.offset : info.offset + info.nbytes]

        writer.write(path, data)


@dataclass(frozen=True)
class Family:
    """Whole models of several tasks, and what split made of them."""

    full: dict[str, str]
    foundation: str
    adaptors: dict[str, str]


class Store:
    """The folder that models are kept in."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self._say = folder, say
        folder.mkdir(parents=True, exist_ok=True)

    def model(self, shape: Shape, mixture: str, task: str = "") -> Path:
        """Return the path of a model, made if it is not there; `task`: a fine-tune of the one without."""
        path = self.folder / f"{shape.name}-{mixture}{'-' if task else ''}{task}.gguf"
        if not path.exists():
            source = self.model(shape, mixture) if task else None
            total = sum(np.prod(ne) for _, ne in weights(shape))
            self._say(f"making {path.name}: {total / 1e6:.0f} M parameters ...")
            write_model(path, shape, mixture, task, source)
        return path

    def family(self, shape: Shape, mixture: str) -> Family:
        """Return the fine-tunes of all tasks, split into a foundation and adaptors."""
        full = {task: str(self.model(shape, mixture, task)) for task in TASKS}
        prefix = f"{shape.name}-{mixture}"
        foundation = self.folder / f"{prefix}-foundation.gguf"
        adaptors = {task: str(self.folder / f"{prefix}-adaptor-{task}.gguf") for task in TASKS}
        if not foundation.exists():
            self._say(f"splitting {prefix} for {len(TASKS)} tasks ...")
            pga.split(full, self.folder, prefix=prefix)
        return Family(full, str(foundation), adaptors)

    def overlays(self, shape: Shape, mixture: str) -> Family:
        """Return the same fine-tunes as overlays of the model that they were made from."""
        full = {task: str(self.model(shape, mixture, task)) for task in TASKS}
        prefix, base = f"{shape.name}-{mixture}-overlay", self.model(shape, mixture)
        adaptors = {task: str(self.folder / f"{prefix}-adaptor-{task}.gguf") for task in TASKS}
        if not all(Path(path).exists() for path in adaptors.values()):
            self._say(f"splitting {prefix} for {len(TASKS)} tasks ...")
            pga.split(full, self.folder, prefix=prefix, foundation=base, force=True)
        return Family(full, str(base), adaptors)
