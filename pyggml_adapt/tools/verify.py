"""verify: hash every tensor of a foundation and its adaptors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyggml_adapt.errors import FileFormatError, StrPath
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.tools.layout import original
from pyggml_adapt.tools.source import Progress, ticker
from pyggml_adapt.weights.identity import OVERLAY, Entry, blocks, check_pair, foundation_entries, kind, text


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verify found sound.  tasks: of the adaptors.  n_tensors, nbytes: what was hashed, each tensor once."""

    foundation: str
    tasks: tuple[str, ...]
    n_tensors: int
    nbytes: int


def verify(foundation: StrPath, *adaptors: StrPath, progress: Progress | None = None) -> VerifyReport:
    """Check that the adaptors belong to the foundation, and that all tensors have the bytes they were written with.

    Raises: AdaptorError if files do not belong together; FileFormatError, naming the tensor, if one is damaged.
    """
    readers: list[GGUFReader] = []
    try:
        base, *others = (_open(path, readers) for path in (foundation, *adaptors))
        todo, tasks = _expected(base, others)
        nbytes = sum(reader.tensors[e.name].nbytes for reader, entries in todo for e in entries)
        tick = ticker(nbytes, "verifying", progress)
        for reader, entries in todo:
            check_digests(reader, entries, tick)
    finally:
        for reader in readers:
            reader.close()
    return VerifyReport(base.path, tuple(tasks), sum(len(entries) for _, entries in todo), nbytes)


def _open(path: StrPath, readers: list[GGUFReader]) -> GGUFReader:
    readers.append(GGUFReader(path))
    return readers[-1]


def _expected(base: GGUFReader, others: list[GGUFReader]) -> tuple[list[tuple[GGUFReader, list[Entry]]], list[str]]:
    """Return for each file the tensors that it should hold, and the adaptors' tasks."""
    shared: dict[str, Entry] = {}
    if kind(base) == "foundation":
        shared = foundation_entries(base)
    todo, tasks = [], []
    for reader in others:
        identity = check_pair(base, reader)
        source = original(reader, identity)
        if identity.layout == OVERLAY:
            shared |= {entry.name: entry for entry in identity.shared}
        todo.append((reader, [identity.tensors[name] for name in reader.tensors]))
        tasks.append(identity.task)
        _check_header(reader, source.header)
    if not shared and not others:
        what = "name the foundation first, then its adaptors" if kind(base) == "adaptor" else "it carries no digests"
        raise FileFormatError(f"nothing to verify this {kind(base)} by: {what}", path=base.path)
    return [(base, list(shared.values())), *todo], tasks


def _check_header(adaptor: GGUFReader, header: bytes) -> None:
    if hashlib.sha256(header).hexdigest() != text(adaptor, "source.header.sha256"):
        raise FileFormatError("the metadata are not those of the model that was split", path=adaptor.path)


def check_digests(
    reader: GGUFReader, entries: Iterable[Entry], tick: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Raise FileFormatError for the first tensor whose bytes do not have the digest of its entry."""
    for entry in entries:
        info = reader.tensors[entry.name]
        sha = hashlib.sha256()
        for block in blocks(reader, info.offset, info.nbytes):
            sha.update(block)
            tick(len(block))
        if sha.digest() != entry.digest:
            raise FileFormatError(
                f"tensor {entry.name!r} is damaged: its bytes do not have the digest that it was written with",
                path=reader.path,
                offset=info.offset,
                key=entry.name,
            )
