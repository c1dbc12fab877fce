"""bake: turn a low-rank adaptor into whole tensors, an overlay of the foundation that it was made for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyggml_adapt.errors import DTypeError, ParameterError, StrPath
from pyggml_adapt.ggml import GGUFReader, GGUFWriter, Tensor, Type, dequantize, quantize
from pyggml_adapt.models import architectures, model_of
from pyggml_adapt.models.hf import hf_target
from pyggml_adapt.tools.layout import is_of_the_file
from pyggml_adapt.tools.lowrank import read_rows
from pyggml_adapt.tools.plan import FileReport
from pyggml_adapt.tools.source import Progress, Source, ticker
from pyggml_adapt.tools.split import SplitJob, check_outputs
from pyggml_adapt.tools.spool import Spool
from pyggml_adapt.tools.svd import energy
from pyggml_adapt.weights.adaptor import Adaptor, open_adaptor
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.identity import BLOCK_NBYTES, LOW_RANK, blocks, text
from pyggml_adapt.weights.lowrank import EMBEDDING, HEAD
from pyggml_adapt.weights.peft import is_peft
from pyggml_adapt.weights.task import Component, TaskWeights

KEEP = "keep"


@dataclass(frozen=True, slots=True)
class BakedTensor:
    """What became of one tensor of the model.

    kind: "merged" if a pair was added to it; "replaced" or "added" if the adaptor has it whole.
    error: of requantising a merged tensor: norm of the difference to the exact sum over the norm of that sum; else 0.
    nbytes: of the whole tensor.
    """

    name: str
    kind: Literal["merged", "replaced", "added"]
    type: str
    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class BakeReport:
    """What bake wrote.  n_tensors, nbytes: of the file, in which merged tensors that came out as they were are not."""

    path: str
    task: str
    n_tensors: int
    nbytes: int
    tensors: tuple[BakedTensor, ...]


def bake(
    foundation: StrPath,
    adaptor: StrPath,
    output: StrPath,
    *,
    type: str = KEEP,
    task: str | None = None,
    scale: float = 1.0,
    force: bool = False,
    progress: Progress | None = None,
) -> BakeReport:
    """Write an overlay adaptor with the weights that a low-rank adaptor makes of a whole model.

    foundation: a complete model.  adaptor: a low-rank file of ours, a LoRA GGUF of llama.cpp, or a directory of PEFT's.
    type: of the tensors that pairs are added to, as "F16" or "Q8_0"; "keep" for the type that each has, which those
    keep anyway whose rows are no multiple of the type's blocks.
    task: by default the adaptor's own, or its file's name.  scale: what the pairs count with.  force: replace a file.
    Raises: AdaptorError if the two do not belong together or the adaptor is not sound; ParameterError; ModelError;
    OverwriteError, FileAccessError, FileFormatError.
    """
    if not math.isfinite(scale):
        raise ParameterError(f"scale must be a finite number, not {scale}")
    wanted, output = _type(type), os.fsdecode(output)
    with ExitStack() as stack:
        base = Foundation(foundation)
        stack.callback(base.close)
        if not base.is_complete:
            raise ParameterError(f"{base.path}: baking needs a complete model as the foundation")
        reader = None if is_peft(adaptor) else stack.enter_context(GGUFReader(adaptor))
        check_outputs([output], [base.reader, *([reader] if reader else [])], force)
        own = open_adaptor(
            task or "adaptor",
            adaptor,
            base,
            target_of=_no_target if reader else hf_target(model_of(base.metadata, base.tensors, base.path)),
        )
        if not own.is_low_rank:
            raise ParameterError(f"{own.path}: the adaptor has whole tensors already, nothing of low rank to bake")
        own.bring_in()
        stack.callback(own.let_go)
        name = task or _own_task(own, reader)
        merged = _Merged(base, own, TaskWeights(name, base, (Component(own, scale),)), wanted)
        file = stack.enter_context(Spool(output))
        _write(file, merged, base.reader, reader if own.kind == LOW_RANK else None, progress)
        written = _overlay(file, base.path, output, name, force, progress)
    return BakeReport(output, name, written.n_tensors, written.nbytes, tuple(merged.reports))


def _type(name: str) -> Type | None:
    if name == KEEP:
        return None
    if name.upper() not in Type.__members__:
        raise ParameterError(f"type {name!r} is not known; use {KEEP!r}, F32, F16, BF16, Q8_0, ...")
    return Type[name.upper()]


def _no_target(module: str) -> None:
    """Stand for the names of Hugging Face's modules, which a GGUF file has none of."""


def _own_task(own: Adaptor, reader: GGUFReader | None) -> str:
    if own.kind == LOW_RANK and reader is not None:
        return text(reader, "task")
    return os.path.basename(os.path.abspath(own.path)).removesuffix(".gguf")


class _Merged:
    """The model that foundation and adaptor make together, tensor by tensor.

    wanted: the type of tensors that pairs are added to; None for the type that each has.
    """

    def __init__(self, base: Foundation, own: Adaptor, weights: TaskWeights, wanted: Type | None):
        self.reports: list[BakedTensor] = []
        self.types: dict[str, tuple[Type, tuple[int, int, int, int]]] = {}  # of the tensors, in order
        self._base, self._own, self._weights = base, own, weights
        if base.metadata.get("general.architecture") in architectures():
            model_of(base.metadata, base.tensors, base.path).check_tensors(weights.tensors)
        for name, tensor in weights.tensors.items():
            type = tensor.type if name not in weights.pairs else _usable(name, tensor, wanted)
            self.types[name] = (type, tensor.ne)
        # a pair on the embedding acts on the embedding alone, so a head that was tied to it becomes a tensor of its own
        self.is_untied = EMBEDDING in weights.pairs and HEAD not in weights.tensors
        if self.is_untied:
            embd = base.tensors[EMBEDDING]
            self.types[HEAD] = (embd.type, embd.ne)

    def data(self, name: str) -> Iterator[memoryview | np.ndarray]:
        """Yield the bytes of a tensor; each piece is valid until the next."""
        type, _ = self.types[name]
        if name in self._weights.pairs:
            yield from self._sum(name)
            return
        if name in self._own.whole:
            tensor = self._own.tensor(name)
            kind: Literal["replaced", "added"] = "replaced" if name in self._base.tensors else "added"
            self.reports.append(BakedTensor(name, kind, type.name, tensor.nbytes, 0.0))
            yield from _pieces(tensor)
            return
        source = name
        if name == HEAD and self.is_untied:
            source = EMBEDDING
            nbytes = self._base.tensors[EMBEDDING].nbytes
            self.reports.append(BakedTensor(name, "added", type.name, nbytes, 0.0))
        info = self._base.reader.tensors[source]
        yield from blocks(self._base.reader, info.offset, info.nbytes)

    def _sum(self, name: str) -> Iterator[np.ndarray]:
        """Yield a tensor of the foundation with its pairs added."""
        info = self._base.reader.tensors[name]
        type, ne = self.types[name]
        left = total = 0.0
        for i in range(ne[2]):
            products = [self._factors(name, pair.a, pair.b, pair.scale, i) for pair in self._weights.pairs[name]]
            for rows, values in read_rows(self._base.reader, info, i):
                for b, a in products:
                    values += b[rows] @ a
                data = self._quantize(name, values, type)
                left += energy(values - dequantize(data, type, ne[0]))
                total += energy(values)
                yield data
        nbytes = type.row_size(ne[0]) * ne[1] * ne[2]
        self.reports.append(BakedTensor(name, "merged", type.name, nbytes, math.sqrt(left / total) if total else 0.0))

    def _quantize(self, name: str, values: np.ndarray, type: Type) -> np.ndarray:
        """Return the bytes of rows in a type, if it can hold them."""
        bound = float(np.finfo(np.float16).max) if type == Type.F16 else float(np.finfo(np.float32).max)
        if not (np.abs(values) <= bound).all():
            raise ParameterError(f"tensor {name!r}: the sum of weights and pair does not fit the type {type.name}")
        try:
            return quantize(values, type)
        except ParameterError as exc:
            raise ParameterError(f"tensor {name!r} with its pair: {exc}") from exc

    def _factors(self, name: str, a: str, b: str, scale: float, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return b [ne1, rank] and a [rank, ne0] of expert i, whose product is to be added."""
        left, right = (_matrix(self._weights.factors[factor], i) for factor in (a, b))
        if name != EMBEDDING:  # whose a has a row for each token
            return right, left * np.float32(scale)
        return left, right.T * np.float32(scale)


def _usable(name: str, tensor: Tensor, wanted: Type | None) -> Type:
    """Return the wanted type; the tensor's own if none is wanted, or if its rows are no multiple of the type's block.

    Raises: ParameterError if ggml does not convert to that type.
    """
    type = tensor.type if wanted is None or tensor.ne[0] % wanted.blck_size else wanted
    if not type.is_quantized and type not in (Type.F32, Type.F16, Type.BF16):
        raise ParameterError(f"tensor {name!r} cannot be {type.name}; ask for another type (--type)")
    try:
        quantize(np.zeros(type.blck_size, np.float32), type)
    except DTypeError as exc:
        raise ParameterError(f"tensor {name!r} cannot be {type.name} ({exc}); ask for another type (--type)") from exc
    return type


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(tensor.nbytes, BLOCK_NBYTES)))
    for offset in range(0, tensor.nbytes, len(buffer)):
        yield tensor.get_data(buffer[: tensor.nbytes - offset], offset)


def _matrix(tensor: Tensor, i: int) -> np.ndarray:
    """Return expert i of a factor, F32 [ne1, ne0]."""
    nbytes = tensor.type.row_size(tensor.ne[0]) * tensor.ne[1]
    return dequantize(tensor.get_data(bytearray(nbytes), i * nbytes), tensor.type, tensor.ne[0])


def _write(
    file: Spool, merged: _Merged, base: GGUFReader, carrier: GGUFReader | None, progress: Progress | None
) -> None:
    """Write the merged model.  carrier: a low-rank file of ours, whose metadata of the task goes before the base's."""
    writer = GGUFWriter(alignment=base.alignment)
    carried = [] if carrier is None else [key for key in carrier.metadata if not is_of_the_file(key)]
    for key in base.metadata:
        if key not in carried:
            writer.copy_kv(base, key)
        elif carrier is not None:
            writer.copy_kv(carrier, key)
    for key in carried:
        if carrier is not None and key not in base.metadata:
            writer.copy_kv(carrier, key)
    for name, (type, ne) in merged.types.items():
        writer.add_tensor(name, type, ne)
    tick = ticker(sum(writer.tensors.values()), "merging", progress)
    writer.write_to(file, lambda name: _counted(merged.data(name), tick))


def _counted(
    pieces: Iterator[memoryview | np.ndarray], tick: Callable[[int], None]
) -> Iterator[memoryview | np.ndarray]:
    for piece in pieces:
        yield piece
        tick(piece.nbytes)


def _overlay(
    file: Spool, foundation: str, output: str, task: str, force: bool, progress: Progress | None
) -> FileReport:
    """Split the merged model, in a file without a name, from the foundation."""
    with Source(f"/proc/self/fd/{file.fileno()}") as model, Source(foundation) as base:
        job = SplitJob({task: model}, base, {task: output}, foundation, "")
        job.plan((), None, progress)
        job.make_headers(None, progress)
        job.write(force, progress)
        return job.report(False).adaptor_files[0]
