"""What ties an adaptor to its foundation: ids, digests, and the check that two files belong together.

An adaptor of ours names every tensor of the model it was made from, with type, shape and SHA-256, those that live in
the foundation too.  So a wrong foundation is recognised from two headers, and the first tensor that differs is named.

Source: the keys `pyggml_adapt.*`, which only this file and `tools/` know; the `split.*` keys are llama.cpp's.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyggml_adapt.errors import AdaptorError, FileAccessError, FileFormatError
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, TensorInfo

PREFIX = "pyggml_adapt."
FORMAT = 1  # of the keys below; a reader refuses a higher one
COMPLEMENT, OVERLAY, LOW_RANK = "complement", "overlay", "low-rank"  # layouts
BLOCK_NBYTES = 4 << 20
N_ELEMENTS_MAX = 1 << 42  # of a tensor: as many as ggml.Context.new_tensor takes
_EDGE_NBYTES = 1024  # of each end of a tensor that a fingerprint covers
_LARGE = ("tokenizer.", PREFIX)  # arrays below these keys are read again when they are asked for


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as it should be.  digest: SHA-256 of its bytes."""

    name: str
    type: Type
    ne: tuple[int, int, int, int]
    digest: bytes

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor's data in bytes."""
        return self.type.row_size(self.ne[0]) * self.ne[1] * self.ne[2] * self.ne[3]


@dataclass(frozen=True, slots=True)
class AdaptorIdentity:
    """What an adaptor says of itself.

    layout: "complement" or "overlay".  tensors: those of the whole source model, in its order.
    own: names of those that the adaptor holds; the foundation holds the others.
    fingerprint: of the foundation's file; empty for the complement layout.
    """

    path: str
    task: str
    layout: str
    foundation_id: str
    fingerprint: str
    tensors: Mapping[str, Entry]
    own: frozenset[str]

    @property
    def shared(self) -> list[Entry]:
        """Return the tensors that the foundation holds, in the source model's order."""
        return [entry for name, entry in self.tensors.items() if name not in self.own]


def blocks(reader: GGUFReader, offset: int, nbytes: int) -> Iterator[memoryview]:
    """Yield part of a file in blocks; each is overwritten by the next.

    Raises: FileAccessError if the file cannot be read that far.
    """
    buffer = memoryview(bytearray(min(nbytes, BLOCK_NBYTES)))
    end = offset + nbytes
    while offset < end:
        try:
            n = os.preadv(reader.fileno(), [buffer[: end - offset]], offset)
        except OSError as exc:
            raise FileAccessError.of(reader.path, exc) from exc
        if not n:
            raise FileAccessError(f"{reader.path}: the file became shorter while it was read")
        yield buffer[:n]
        offset += n


def digest(reader: GGUFReader, info: TensorInfo) -> bytes:
    """Return the SHA-256 of a tensor's bytes; the GIL is released while it is computed."""
    sha = hashlib.sha256()
    for block in blocks(reader, info.offset, info.nbytes):
        sha.update(block)
    return sha.digest()


def foundation_id(entries: Iterable[Entry]) -> str:
    """Return the id, 64 hexadecimal digits, of a foundation with these tensors, in whatever order.

    It is the SHA-256 of, for each tensor in the order of names: name, NUL, type (int32), ne (4 x int64), digest.
    """
    sha = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.name.encode()):
        sha.update(entry.name.encode() + b"\0" + struct.pack("<i4q", entry.type, *entry.ne) + entry.digest)
    return sha.hexdigest()


def fingerprint(reader: GGUFReader) -> str:
    """Return a SHA-256 over size, header and the ends of each tensor: cheap, and telling for any other fine-tune."""
    sha = hashlib.sha256(struct.pack("<q", reader.file_nbytes))
    for block in blocks(reader, 0, reader.data_offset):
        sha.update(block)
    for info in reader.tensors.values():
        n = min(info.nbytes, _EDGE_NBYTES)
        for offset in (info.offset, info.offset + info.nbytes - n):
            for block in blocks(reader, offset, n):
                sha.update(block)
    return sha.hexdigest()


def kind(reader: GGUFReader) -> str:
    """Return what a file is: "foundation" or "adaptor" of ours, "lora" or another `adapter.type`, or "model"."""
    ours = reader.metadata.get(PREFIX + "kind")
    if ours is not None:
        return str(ours)
    if reader.metadata.get("general.type") == "adapter":
        return str(reader.metadata.get("adapter.type", "adapter"))
    return "model"


def small_metadata(reader: GGUFReader) -> dict[str, object]:
    """Return the metadata without large arrays."""
    return {
        key: reader.value(key)
        for key in reader.metadata
        if not (key.startswith(_LARGE) and reader.kv_type(key)[0] == "arr")
    }


def get(reader: GGUFReader, name: str, wanted: tuple[str, str | None]) -> Any:
    """Return the value of one of our keys.  Raises: FileFormatError if it is absent or of another type."""
    key = PREFIX + name
    if key not in reader.metadata:
        raise FileFormatError(f"the key {key!r} is missing", path=reader.path, key=key)
    if reader.kv_type(key) != wanted:
        raise FileFormatError(f"the key {key!r} has the wrong type", path=reader.path, key=key)
    return reader.metadata[key]


def text(reader: GGUFReader, name: str) -> str:
    """Return the value of one of our keys that is a string; see `get`."""
    value: str = get(reader, name, ("str", None))
    return value


def array(reader: GGUFReader, name: str, element: str, n: int | None = None) -> np.ndarray:
    """Return the value of one of our keys that is an array, of n elements unless n is None; see `get`."""
    value: np.ndarray = get(reader, name, ("arr", element))
    if n is not None and len(value) != n:
        key = PREFIX + name
        raise FileFormatError(f"the key {key!r} has {len(value)} elements, not {n}", path=reader.path, key=key)
    return value


def _check_format(reader: GGUFReader) -> None:
    found = get(reader, "format", ("u32", None))
    if found != FORMAT:
        key = PREFIX + "format"
        raise FileFormatError(
            f"format {found} of our files is not known here, only {FORMAT}", path=reader.path, key=key
        )


def foundation_entries(reader: GGUFReader) -> dict[str, Entry]:
    """Return the tensors of a foundation of ours, with the digests that it carries; its data is not read.

    Raises: FileFormatError.
    """
    _check_format(reader)
    return own_entries(reader)


def own_entries(reader: GGUFReader) -> dict[str, Entry]:
    """Return a file's tensors with the digests that it carries of them.  Raises: FileFormatError."""
    digests = array(reader, "tensors.sha256", "u8", 32 * len(reader.tensors)).tobytes()
    return {
        name: Entry(name, info.type, info.ne, digests[32 * i : 32 * i + 32])
        for i, (name, info) in enumerate(reader.tensors.items())
    }


def layout_of(reader: GGUFReader) -> str:
    """Return an adaptor's layout: ours, or "lora" for llama.cpp's.

    Raises: AdaptorError(adaptor_invalid) if it is no adaptor, FileFormatError for a layout that is not known.
    """
    found = kind(reader)
    if found == "lora":
        return found
    if found != "adaptor":
        raise AdaptorError(f"{reader.path}: not an adaptor written by `split`, but a {found}", code="adaptor_invalid")
    _check_format(reader)
    layout = text(reader, "layout")
    if layout not in (COMPLEMENT, OVERLAY, LOW_RANK):
        raise FileFormatError(f"unknown layout {layout!r}", path=reader.path, key=PREFIX + "layout")
    return layout


def read_adaptor(reader: GGUFReader) -> AdaptorIdentity:
    """Return what an adaptor of whole tensors says of itself, checked against its own; its data is not read.

    Raises: AdaptorError(adaptor_invalid) if it is none; FileFormatError if its keys are not sound.
    """
    layout = layout_of(reader)
    if layout not in (COMPLEMENT, OVERLAY):
        raise AdaptorError(
            f"{reader.path}: not an adaptor of whole tensors, but {layout}; `pyggml-adapt bake` makes one of it",
            code="adaptor_invalid",
        )
    tensors = _source_entries(reader)
    for info in reader.tensors.values():
        entry = tensors.get(info.name)
        if entry is None or (entry.type, entry.ne) != (info.type, info.ne):
            raise FileFormatError(
                f"{info.name!r}: the tensor is not as the adaptor's own list says", path=reader.path, key=info.name
            )
    return AdaptorIdentity(
        path=reader.path,
        task=text(reader, "task"),
        layout=layout,
        foundation_id=text(reader, "foundation.id"),
        fingerprint=text(reader, "foundation.fingerprint") if layout == OVERLAY else "",
        tensors=tensors,
        own=frozenset(reader.tensors),
    )


def _source_entries(reader: GGUFReader) -> dict[str, Entry]:
    names: list[str] = get(reader, "source.tensors", ("arr", "str"))
    n = len(names)
    digests = array(reader, "source.tensors.sha256", "u8", 32 * n).tobytes()
    types = array(reader, "source.tensors.type", "i32", n).tolist()
    ne = array(reader, "source.tensors.ne", "i64", 4 * n).reshape(n, 4).tolist()
    known = set(Type)
    if any(number not in known for number in types):
        raise FileFormatError("not a tensor type", path=reader.path, key=PREFIX + "source.tensors.type")
    for name, number, shape in zip(names, types, ne, strict=True):
        if min(shape) < 1 or math.prod(shape) > N_ELEMENTS_MAX or shape[0] % Type(number).blck_size:
            raise FileFormatError(
                f"{name!r}: impossible shape {shape}", path=reader.path, key=PREFIX + "source.tensors.ne"
            )
    entries = {
        name: Entry(name, Type(types[i]), tuple(ne[i]), digests[32 * i : 32 * i + 32]) for i, name in enumerate(names)
    }
    if any(not name.isprintable() for name in names):
        raise FileFormatError("a tensor's name is not text", path=reader.path, key=PREFIX + "source.tensors")
    if len(entries) != n:
        raise FileFormatError("a tensor is listed twice", path=reader.path, key=PREFIX + "source.tensors")
    return entries


def check_pair(foundation: GGUFReader, adaptor: GGUFReader) -> AdaptorIdentity:
    """Return the adaptor's identity if it belongs to this foundation.

    For the complement layout two headers are compared.  For the overlay layout the ends of the foundation's tensors
    are read; if they are not as expected all shared tensors are hashed, to name the first that differs.
    Raises: AdaptorError(adaptor_base_mismatch), naming that tensor; AdaptorError(adaptor_invalid); FileFormatError.
    """
    identity = read_adaptor(adaptor)
    if identity.layout == OVERLAY:
        if fingerprint(foundation) != identity.fingerprint:
            _compare(foundation, identity, None)
        return identity
    if kind(foundation) != "foundation":
        raise _mismatch(foundation, identity, f"the file is a {kind(foundation)}, not a foundation")
    entries = foundation_entries(foundation)
    found = foundation_id(entries.values())
    if found != text(foundation, "foundation.id"):
        raise FileFormatError(
            "the foundation's id does not fit its tensors and their digests",
            path=foundation.path,
            key=PREFIX + "foundation.id",
        )
    if found != identity.foundation_id:
        _compare(foundation, identity, entries)
        raise _mismatch(foundation, identity, "it holds tensors that the adaptor's model does not have there")
    if foundation_id(identity.shared) != found:
        raise FileFormatError(
            "the foundation's id does not fit the adaptor's list of tensors",
            path=adaptor.path,
            key=PREFIX + "foundation.id",
        )
    return identity


def _compare(foundation: GGUFReader, identity: AdaptorIdentity, entries: Mapping[str, Entry] | None) -> None:
    """Raise for the first shared tensor that differs; entries: None to hash the foundation's data."""
    for want in identity.shared:
        info = foundation.tensors.get(want.name)
        if info is None:
            raise _mismatch(foundation, identity, f"it has no tensor {want.name!r}")
        if info.type != want.type:
            detail = f"tensor {want.name!r} has type {info.type.name} there, not {want.type.name}"
            raise _mismatch(foundation, identity, detail)
        if info.ne != want.ne:
            detail = f"tensor {want.name!r} has shape {list(info.ne)} there, not {list(want.ne)}"
            raise _mismatch(foundation, identity, detail)
    for want in identity.shared:
        found = digest(foundation, foundation.tensors[want.name]) if entries is None else entries[want.name].digest
        if found != want.digest:
            raise _mismatch(foundation, identity, f"tensor {want.name!r} has other bytes there")


def _mismatch(foundation: GGUFReader, identity: AdaptorIdentity, detail: str) -> AdaptorError:
    return mismatch(f"{identity.path}: the adaptor {identity.task!r}", foundation.path, detail)


def mismatch(adaptor: str, foundation: str, detail: str) -> AdaptorError:
    """Return the error for an adaptor and a foundation that are not made for each other."""
    return AdaptorError(f"{adaptor} does not belong to {foundation}: {detail}", code="adaptor_base_mismatch")
