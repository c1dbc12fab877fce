"""The files that `split` writes: their metadata, and the way back from an adaptor to its source's bytes.

An adaptor keeps its source's keys in order; one that would mean something else in the adaptor is renamed in place to
`pyggml_adapt.source.kv.<key>`.  Our own keys come after them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.errors import FileFormatError
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter
from pyggml_adapt.tools.source import GAP_NBYTES_MAX, Scan, Source, equal
from pyggml_adapt.weights.identity import FORMAT, LOW_RANK, OVERLAY, PREFIX, AdaptorIdentity, Entry, array, get, text
from pyggml_adapt.weights.lowrank import ALPHA

ALIGNMENT_MIN = 32  # so that every file of ours can be used where it is mapped
_KV = PREFIX + "source.kv."
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# what a file says of itself and not of its task, so that a low-rank adaptor does not carry it
_OF_THE_FILE = (
    "general.architecture", "general.alignment", "general.type", "general.file_type", "general.quantization_version",
    "adapter.", "split.", "quantize.", PREFIX,
)  # fmt: skip


def is_of_the_file(key: str) -> bool:
    """Return whether a metadata key says something of its file, and nothing of the task in it."""
    return key.startswith(_OF_THE_FILE)


def _set_split_keys(writer: GGUFWriter, no: int, n_tensors: int) -> None:
    """Make the file shard `no` of two, as llama.cpp counts them."""
    writer.set("split.no", no, "u16")
    writer.set("split.count", 2, "u16")
    writer.set("split.tensors.count", n_tensors, "i32")


def _digests(entries: Iterable[Entry]) -> np.ndarray:
    return np.frombuffer(b"".join(entry.digest for entry in entries), np.uint8)


def foundation_writer(first: Source, entries: Collection[Entry], ident: str, alignment: int, name: str) -> GGUFWriter:
    """Return the header of a complement foundation that holds `entries`, which `first` has too.

    ident: its id.  alignment: in bytes.  name: for general.name.
    """
    writer = GGUFWriter(alignment=max(alignment, ALIGNMENT_MIN))
    for key in ("general.architecture", "general.quantization_version"):
        if key in first.first.metadata:
            writer.copy_kv(first.first, key)
    writer.set("general.type", "model", "str")
    writer.set("general.name", name, "str")
    writer.set(PREFIX + "format", FORMAT, "u32")
    writer.set(PREFIX + "kind", "foundation", "str")
    writer.set(PREFIX + "foundation.id", ident, "str")
    writer.set(PREFIX + "tensors.sha256", _digests(entries), "u8")
    _set_split_keys(writer, 1, len(entries))
    for entry in entries:
        writer.add_tensor(entry.name, entry.type, entry.ne)
    return writer


def adaptor_writer(
    source: Source, scan: Scan, own: Collection[str], *, task: str, layout: str, ident: str, fingerprint: str
) -> GGUFWriter:
    """Return the header of an adaptor that holds the tensors `own` of `source`.

    scan: of that source.  ident, fingerprint: of the foundation; no fingerprint for the complement layout.
    """
    alignment = max(source.first.alignment, ALIGNMENT_MIN)
    writer = GGUFWriter(alignment=alignment)
    for key in source.keys:
        renamed = key.startswith((PREFIX, "split.")) or (layout == OVERLAY and key in ("general.type", "adapter.type"))
        renamed = renamed or (key == "general.alignment" and alignment != source.first.alignment)
        writer.copy_kv(source.first, key, _KV + key if renamed else key)
    writer.set(PREFIX + "format", FORMAT, "u32")
    writer.set(PREFIX + "kind", "adaptor", "str")
    writer.set(PREFIX + "layout", layout, "str")
    writer.set(PREFIX + "task", task, "str")
    writer.set(PREFIX + "foundation.id", ident, "str")
    if layout == OVERLAY:
        writer.set(PREFIX + "foundation.fingerprint", fingerprint, "str")
        writer.set("general.type", "adapter", "str")
        writer.set("adapter.type", OVERLAY, "str")
    else:
        _set_split_keys(writer, 0, len(scan.entries))
    _set_source_keys(writer, source, scan)
    for name in scan.entries:
        if name in own:
            writer.add_tensor(name, scan.entries[name].type, scan.entries[name].ne)
    return writer


def low_rank_writer(
    source: Source, base: Source, entries: Sequence[Entry], errors: Sequence[float], alpha: float,
    *, task: str, ident: str, fingerprint: str,
) -> GGUFWriter:  # fmt: skip
    """Return the header of a low-rank adaptor, which is a LoRA of llama.cpp's too, with the tensors `entries`.

    errors: of its pairs, in order.  ident, fingerprint: of the foundation `base`.  Metadata of `source` in which it
    differs from the foundation is carried under its own names.
    """
    writer = GGUFWriter(alignment=ALIGNMENT_MIN)
    writer.set("general.type", "adapter", "str")
    writer.set("adapter.type", "lora", "str")
    writer.copy_kv(base.first, "general.architecture")
    writer.set(ALPHA, alpha, "f32")
    ours, theirs = source.first.metadata, base.first.metadata
    for key in source.keys:
        if not is_of_the_file(key) and not (key in theirs and equal(ours[key], theirs[key])):
            writer.copy_kv(source.first, key)
    writer.set(PREFIX + "format", FORMAT, "u32")
    writer.set(PREFIX + "kind", "adaptor", "str")
    writer.set(PREFIX + "layout", LOW_RANK, "str")
    writer.set(PREFIX + "task", task, "str")
    writer.set(PREFIX + "foundation.id", ident, "str")
    writer.set(PREFIX + "foundation.fingerprint", fingerprint, "str")
    writer.set(PREFIX + "tensors.sha256", _digests(entries), "u8")
    writer.set(PREFIX + "low_rank.error", np.array(errors, np.float32), "f32")
    writer.set(PREFIX + "low_rank.max_error", max(errors, default=0.0), "f32")
    for entry in entries:
        writer.add_tensor(entry.name, entry.type, entry.ne)
    return writer


def _set_source_keys(writer: GGUFWriter, source: Source, scan: Scan) -> None:
    """Set what is needed to check the source's tensors, and to write its file again byte by byte."""
    entries = scan.entries.values()
    start = PREFIX + "source."
    writer.set(start + "sha256", scan.sha256, "str")
    writer.set(start + "nbytes", scan.nbytes, "u64")
    writer.set(start + "version", source.version, "u32")
    writer.set(start + "alignment", source.first.alignment, "u32")
    writer.set(start + "n_shards", len(source.readers), "u32")
    writer.set(start + "tensors", list(scan.entries), "str")
    writer.set(start + "tensors.type", np.array([e.type for e in entries], np.int32), "i32")
    writer.set(start + "tensors.ne", np.array([e.ne for e in entries], np.int64).reshape(-1), "i64")
    writer.set(start + "tensors.sha256", _digests(entries), "u8")
    header, written = source.header(), source.written_header()
    writer.set(start + "header.sha256", hashlib.sha256(header).hexdigest(), "str")
    if header != written:  # an older writer's habits, such as trailing dimensions of 1
        same = _common_prefix(header, written)
        writer.set(start + "header.offset", same, "u64")
        writer.set(start + "header.data", np.frombuffer(header[same:], np.uint8), "u8")
    if scan.gaps:
        writer.set(start + "gaps.offset", np.array([offset for offset, _ in scan.gaps], np.uint64), "u64")
        writer.set(start + "gaps.nbytes", np.array([len(data) for _, data in scan.gaps], np.uint64), "u64")
        writer.set(start + "gaps.data", np.frombuffer(b"".join(data for _, data in scan.gaps), np.uint8), "u8")


def _common_prefix(a: bytes, b: bytes) -> int:
    """Return how many bytes at the start of a and b are equal."""
    n = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)
    return int(differ.argmax()) if differ.any() else n


@dataclass(frozen=True, slots=True)
class Original:
    """The source of an adaptor, as far as it is not tensors: header, digest, and bytes that are in no tensor."""

    header: bytes
    sha256: str
    nbytes: int
    alignment: int
    n_shards: int
    gaps: Mapping[int, bytes]

    def gap(self, offset: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from offset to end, where no tensor is, in pieces."""
        for start in sorted(start for start in self.gaps if offset <= start < end):
            yield from _zeros(start - offset)
            data = self.gaps[start][: end - start]
            yield data
            offset = start + len(data)
        yield from _zeros(end - offset)


def _zeros(n: int) -> Iterator[bytes]:
    """Yield n zero bytes in pieces; none if n is negative."""
    piece = bytes(max(min(n, 1 << 20), 0))
    while n > 0:
        yield piece[:n]
        n -= len(piece)


def original(adaptor: GGUFReader, identity: AdaptorIdentity) -> Original:
    """Return what an adaptor remembers of its source's file.

    Raises: FileFormatError if its keys are not sound; the digest is not checked here.
    """
    alignment = get(adaptor, "source.alignment", ("u32", None))
    version = get(adaptor, "source.version", ("u32", None))
    try:
        writer = GGUFWriter(alignment=alignment, version=version)
        for key in adaptor.metadata:
            if key.startswith(_KV):
                writer.copy_kv(adaptor, key, key[len(_KV) :])
            elif not _is_ours(key, identity.layout):
                writer.copy_kv(adaptor, key)
        for entry in identity.tensors.values():
            writer.add_tensor(entry.name, entry.type, entry.ne)
    except ValueError as exc:
        raise FileFormatError(f"the adaptor's record of its source is damaged: {exc}", path=adaptor.path) from exc
    header = writer.header()
    if PREFIX + "source.header.offset" in adaptor.metadata:
        offset = get(adaptor, "source.header.offset", ("u64", None))
        header = header[:offset] + array(adaptor, "source.header.data", "u8").tobytes()
    nbytes = get(adaptor, "source.nbytes", ("u64", None))
    if nbytes > len(header) + sum(e.nbytes + alignment for e in identity.tensors.values()) + GAP_NBYTES_MAX:
        message = f"the adaptor's record of its source is damaged: {nbytes} bytes cannot be its size"
        raise FileFormatError(message, path=adaptor.path, key=PREFIX + "source.nbytes")
    return Original(
        header=header,
        sha256=text(adaptor, "source.sha256"),
        nbytes=nbytes,
        alignment=alignment,
        n_shards=get(adaptor, "source.n_shards", ("u32", None)),
        gaps=_gaps(adaptor),
    )


def _is_ours(key: str, layout: str) -> bool:
    added = ("general.type", "adapter.type") if layout == OVERLAY else _SPLIT_KEYS
    return key in added or key.startswith(PREFIX)


def _gaps(adaptor: GGUFReader) -> dict[int, bytes]:
    if PREFIX + "source.gaps.offset" not in adaptor.metadata:
        return {}
    offsets = array(adaptor, "source.gaps.offset", "u64").tolist()
    sizes = array(adaptor, "source.gaps.nbytes", "u64", len(offsets)).tolist()
    data = array(adaptor, "source.gaps.data", "u8", sum(sizes)).tobytes()
    gaps, at = {}, 0
    for offset, nbytes in zip(offsets, sizes, strict=True):
        gaps[offset] = data[at : at + nbytes]
        at += nbytes
    return gaps
