"""verify: hash every tensor of a foundation and its adaptors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import FileFormatError, StrPath
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, TensorInfo
from pyggml_adapt.ggml.quants import validate
from pyggml_adapt.tools.layout import original
from pyggml_adapt.tools.source import Progress, ticker
from pyggml_adapt.weights.identity import (
    LOW_RANK,
    OVERLAY,
    Entry,
    blocks,
    check_pair,
    foundation_entries,
    foundation_id,
    kind,
    layout_of,
    mismatch,
    own_entries,
    text,
)
from pyggml_adapt.weights.lowrank import all_finite, check_base, check_finite, read_low_rank

LORA = "lora"  # llama.cpp's low-rank adaptors, which say little of themselves


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verify found sound.  tasks: of the adaptors.  n_tensors, nbytes: what was hashed, each tensor once.

    not_finite: path and tensor, where a tensor of an adaptor is as it was written, but has elements that are NaN or
    infinite.
    """

    foundation: str
    tasks: tuple[str, ...]
    n_tensors: int
    nbytes: int
    not_finite: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Adaptor:
    """What an adaptor should hold, and its foundation.  foundation_id: if all of the foundation must be as it was."""

    reader: GGUFReader
    task: str
    own: list[Entry]
    shared: list[Entry]
    foundation_id: str = ""


def verify(foundation: StrPath, *adaptors: StrPath, progress: Progress | None = None) -> VerifyReport:
    """Check that files belong together, and that all tensors have the bytes that they were written with.

    Raises: AdaptorError if files do not belong together; FileFormatError, naming the tensor, if one is damaged, and for
    a file that carries no digests, such as a LoRA of llama.cpp.
    """
    with ExitStack() as stack:
        base, *others = (stack.enter_context(GGUFReader(path)) for path in (foundation, *adaptors))
        found = [_expected(base, reader) for reader in others]
        shared = _shared(base, found)
        names = list(base.tensors) if any(each.foundation_id for each in found) else list(shared)
        n_tensors = len(names) + sum(len(each.own) for each in found)
        nbytes = sum(base.tensors[name].nbytes for name in names)
        nbytes += sum(each.reader.tensors[entry.name].nbytes for each in found for entry in each.own)
        tick = ticker(nbytes, "verifying", progress)
        digests = {}
        for name in names:
            digests[name] = _digest(base, base.tensors[name], tick)
            if name in shared and shared[name].digest != digests[name]:
                raise _damaged(base, base.tensors[name])
        for each in found:
            _check_foundation(base, digests, each)
            check_digests(each.reader, each.own, tick)
        wrong = tuple((each.reader.path, info.name) for each in found for info in _not_finite(each.reader))
    return VerifyReport(base.path, tuple(each.task for each in found), n_tensors, nbytes, wrong)


def _expected(base: GGUFReader, reader: GGUFReader) -> _Adaptor:
    """Return what an adaptor and its foundation should hold, once their headers are found to fit."""
    layout = layout_of(reader)
    if layout in (LORA, LOW_RANK):
        read_low_rank(reader)
        check_base(base, reader)
        if layout == LORA:
            check_finite(reader, reader.tensors.values())
            raise FileFormatError("nothing to verify this lora by: it carries no digests", path=reader.path)
        own = list(own_entries(reader).values())
        return _Adaptor(reader, text(reader, "task"), own, [], text(reader, "foundation.id"))
    identity = check_pair(base, reader)
    header = original(reader, identity).header
    if hashlib.sha256(header).hexdigest() != text(reader, "source.header.sha256"):
        raise FileFormatError("the metadata are not those of the model that was split", path=reader.path)
    own = [identity.tensors[name] for name in reader.tensors]
    return _Adaptor(reader, identity.task, own, identity.shared if layout == OVERLAY else [])


def _shared(base: GGUFReader, found: list[_Adaptor]) -> dict[str, Entry]:
    """Return the tensors of the foundation that a digest is known of.  Raises: FileFormatError if there is nothing."""
    if kind(base) == "foundation":
        return foundation_entries(base)
    if not found:
        what = "name the foundation first, then its adaptors" if kind(base) == "adaptor" else "it carries no digests"
        raise FileFormatError(f"nothing to verify this {kind(base)} by: {what}", path=base.path)
    return {entry.name: entry for each in found for entry in each.shared}


def _check_foundation(base: GGUFReader, digests: dict[str, bytes], adaptor: _Adaptor) -> None:
    """Raise AdaptorError (adaptor_base_mismatch) unless all tensors of the foundation make the id that is asked for."""
    if adaptor.foundation_id:
        entries = (Entry(info.name, info.type, info.ne, digests[info.name]) for info in base.tensors.values())
        if foundation_id(entries) != adaptor.foundation_id:
            who = f"{adaptor.reader.path}: the adaptor {adaptor.task!r}"
            raise mismatch(who, base.path, "its tensors have other bytes")


def _digest(reader: GGUFReader, info: TensorInfo, tick: Callable[[int], None]) -> bytes:
    sha = hashlib.sha256()
    for block in blocks(reader, info.offset, info.nbytes):
        sha.update(block)
        tick(len(block))
    return sha.digest()


def _damaged(reader: GGUFReader, info: TensorInfo) -> FileFormatError:
    return FileFormatError(
        f"tensor {info.name!r} is damaged: its bytes do not have the digest that it was written with",
        path=reader.path,
        offset=info.offset,
        key=info.name,
    )


def check_digests(
    reader: GGUFReader, entries: Iterable[Entry], tick: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Raise FileFormatError for the first tensor whose bytes do not have the digest of its entry."""
    for entry in entries:
        info = reader.tensors[entry.name]
        if _digest(reader, info, tick) != entry.digest:
            raise _damaged(reader, info)


def _not_finite(reader: GGUFReader) -> Iterator[TensorInfo]:
    """Yield the tensors with elements that are NaN or infinite."""
    for info in reader.tensors.values():
        if info.type != Type.Q8_1 and not _is_finite(reader, info):  # a type of activations, which ggml cannot check
            yield info


def _is_finite(reader: GGUFReader, info: TensorInfo) -> bool:
    """Return whether a tensor's elements are finite."""
    rest = b""  # of a block of elements that the pieces of the file cut
    for piece in blocks(reader, info.offset, info.nbytes):
        data = rest + piece
        n = len(data) - len(data) % info.type.type_size
        data, rest = data[:n], data[n:]
        if not data:
            continue
        # floats are looked at here first: of a number that is not finite, validate() has ggml write a line to stderr
        if not (all_finite(np.frombuffer(data, np.uint8), info.type) and validate(data, info.type)):
            return False
    return True
