"""A model as the tools read it: one GGUF file, or a set of shards taken for the single file that they merge to."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType

from pyggml_adapt.errors import FileAccessError, FileFormatError, ParameterError, SourceMismatchError, StrPath
from pyggml_adapt.ggml.gguf import GGUFReader, GGUFWriter, TensorInfo
from pyggml_adapt.weights.identity import BLOCK_NBYTES, Entry, blocks, kind

Progress = Callable[[int, int, str], None]
"""Called as progress(bytes done, bytes in all, what is being done)."""

GAP_NBYTES_MAX = 32 << 20  # of a stretch that belongs to no tensor; an adaptor has to carry it if it is not zero
_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
_SMALL_NBYTES = 1 << 16  # below this a thread costs more than it saves


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a model's bytes.  name: of the tensor; "" for the bytes between and after tensors."""

    reader: GGUFReader
    offset: int
    nbytes: int
    name: str = ""


@dataclass(slots=True)
class Scan:
    """What one reading of a whole model found.

    sha256: of the (merged) file.  gaps: (offset in that file, bytes) of what lies between tensors and is not zero.
    """

    sha256: str = ""
    nbytes: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    gaps: list[tuple[int, bytes]] = field(default_factory=list)


class Source:
    """Own the readers of one model.

    path: a GGUF file, or the first of a set of shards.
    Raises: FileAccessError, FileFormatError; ParameterError for a file that is no whole model.
    """

    def __init__(self, path: StrPath):
        self.path = os.fsdecode(path)
        self.readers = [GGUFReader(path)]
        try:
            self._check_kind()
            if self.is_sharded:
                self._open_shards()
            self._stats = self._stat()
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, tuple[GGUFReader, TensorInfo]] = {
            name: (reader, info) for reader in self.readers for name, info in reader.tensors.items()
        }

    @property
    def first(self) -> GGUFReader:
        """Return the reader of the file that holds the metadata."""
        return self.readers[0]

    @property
    def is_sharded(self) -> bool:
        """Return whether the model is a set of more than one file."""
        return _shard_number(self.first, "split.count") > 1

    @property
    def keys(self) -> list[str]:
        """Return the metadata keys of the (merged) file, in order."""
        return [key for key in self.first.metadata if not (self.is_sharded and key.startswith("split."))]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the file or files."""
        return sum(reader.file_nbytes for reader in self.readers)

    @property
    def version(self) -> int:
        """Return the GGUF version of the (merged) file."""
        return 3 if self.is_sharded else self.first.version

    def where(self, name: str) -> tuple[int, int, str]:
        """Return where the bytes of a tensor are: descriptor, offset, and the file's name."""
        reader, info = self.tensors[name]
        return reader.fileno(), info.offset, reader.path

    def _check_kind(self) -> None:
        found = kind(self.first)
        if found in ("foundation", "adaptor"):
            article = "an" if found == "adaptor" else "a"
            raise ParameterError(f"{self.path}: the file is {article} {found}, not a whole model; merge the pair first")
        if found != "model":
            raise ParameterError(f"{self.path}: the file is an adapter of type {found}, not a whole model")

    def _open_shards(self) -> None:
        match = _SHARD.fullmatch(os.path.basename(self.path))
        count = _shard_number(self.first, "split.count")
        if match is None or int(match["count"]) != count:
            raise FileFormatError(
                f"one of {count} shards, whose name should end in -00001-of-{count:05}.gguf",
                path=self.path,
                key="split.count",
            )
        if int(match["no"]) != 1 or _shard_number(self.first, "split.no") != 0:
            raise ParameterError(f"{self.path}: give the first shard, {match['stem']}-00001-of-{count:05}.gguf")
        seen = set(self.first.tensors)
        for i in range(1, count):
            name = f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf"
            reader = GGUFReader(os.path.join(os.path.dirname(self.path), name))
            self.readers.append(reader)
            if _shard_number(reader, "split.no") != i:
                raise FileFormatError(f"the file is not shard {i + 1} of {count}", path=reader.path, key="split.no")
            for tensor in reader.tensors:
                if tensor in seen:
                    raise FileFormatError(f"{tensor!r}: tensor is in two shards", path=reader.path, key=tensor)
                seen.add(tensor)
        declared = _shard_number(self.first, "split.tensors.count", len(seen))
        if declared != len(seen):
            raise FileFormatError(
                f"the shards hold {len(seen)} tensors, not {declared}", path=self.path, key="split.tensors.count"
            )

    def header(self) -> bytes:
        """Return the header of the (merged) file as it is or, for shards, as it will be."""
        if self.is_sharded:
            return self.written_header()
        return b"".join(bytes(block) for block in blocks(self.first, 0, self.first.data_offset))

    def written_header(self) -> bytes:
        """Return the header that our writer makes from the metadata and the tensors."""
        writer = GGUFWriter(alignment=self.first.alignment, version=self.version)
        for key in self.keys:
            writer.copy_kv(self.first, key)
        for _, info in self.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        return writer.header()

    def parts(self) -> Iterator[Part]:
        """Yield what follows the header: tensors and, in a single file, the stretches between and after them."""
        for reader in self.readers:
            end = reader.data_offset
            for info in reader.tensors.values():
                if not self.is_sharded and info.offset > end:
                    yield Part(reader, end, info.offset - end)
                yield Part(reader, info.offset, info.nbytes, info.name)
                end = info.offset + info.nbytes
            if not self.is_sharded and end < reader.file_nbytes:
                yield Part(reader, end, reader.file_nbytes - end)

    def scan(self, tick: Callable[[int], None]) -> Scan:
        """Read the whole model once and return its digests.

        tick: called with the number of bytes since its last call.
        Raises: FileAccessError if it changes meanwhile; FileFormatError if too much of it belongs to no tensor.
        """
        found = Scan()
        with ThreadPoolExecutor(1) as pool:
            header = self.header()
            whole = hashlib.sha256(header)
            found.nbytes = len(header)
            done = 0
            for part in self.parts():
                self._scan_part(part, whole, found, pool, tick)
                found.nbytes += part.nbytes
                done += part.nbytes
                if self.is_sharded:
                    padding = bytes(-part.nbytes % self.first.alignment)
                    whole.update(padding)
                    found.nbytes += len(padding)
            tick(self.nbytes - done)
        self.check_unchanged()
        found.sha256 = whole.hexdigest()
        return found

    def _scan_part(
        self, part: Part, whole: hashlib._Hash, found: Scan, pool: ThreadPoolExecutor, tick: Callable[[int], None]
    ) -> None:
        """Hash one part, whose bytes follow the first found.nbytes, and note its digest or what in it is not zero."""
        if not part.name and part.nbytes > GAP_NBYTES_MAX:
            message = f"{part.nbytes} bytes belong to no tensor; this is no plain model file"
            raise FileFormatError(message, path=part.reader.path, offset=part.offset)
        sha = hashlib.sha256()
        gap = bytearray()
        at = start = found.nbytes
        for block in blocks(part.reader, part.offset, part.nbytes):
            pending = beside(pool, whole.update, block)
            if part.name:
                sha.update(block)
            elif gap or bytes(block).strip(b"\0"):
                start = start if gap else at
                gap += block
            at += len(block)
            tick(len(block))
            pending.result()
        if part.name:
            info = part.reader.tensors[part.name]
            found.entries[part.name] = Entry(info.name, info.type, info.ne, sha.digest())
        elif gap:
            found.gaps.append((start + len(gap) - len(gap.lstrip(b"\0")), bytes(gap.strip(b"\0"))))

    def _stat(self) -> list[tuple[int, int]]:
        stats = [os.fstat(reader.fileno()) for reader in self.readers]
        return [(info.st_size, info.st_mtime_ns) for info in stats]

    def check_unchanged(self) -> None:
        """Raise FileAccessError if a file changed since it was opened."""
        for reader, before, now in zip(self.readers, self._stats, self._stat(), strict=True):
            if before != now:
                raise FileAccessError(f"{reader.path}: the file changed while it was read")

    def close(self) -> None:
        """Close all files; closing twice is allowed."""
        for reader in self.readers:
            reader.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _shard_number(reader: GGUFReader, key: str, default: int = 0) -> int:
    value = reader.metadata.get(key, default)
    if not isinstance(value, int):
        raise FileFormatError(f"the key {key!r} is not a number", path=reader.path, key=key)
    return value


def beside(pool: ThreadPoolExecutor, function: Callable[[memoryview], None], data: memoryview) -> Future[None]:
    """Return the future of function(data), run in the pool unless that costs more than it saves."""
    if len(data) > _SMALL_NBYTES:
        return pool.submit(function, data)
    function(data)
    done: Future[None] = Future()
    done.set_result(None)
    return done


def ticker(total: int, what: str, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that adds up bytes and reports them to `progress` at most once per block."""
    done = reported = 0

    def tick(n: int) -> None:
        nonlocal done, reported
        done += n
        if progress is not None and (done - reported >= BLOCK_NBYTES or done >= total):
            reported = done
            progress(done, total, what)

    return tick


def check_same_kind(models: dict[str, Source]) -> None:
    """Raise SourceMismatchError, naming the key, unless the models share architecture, sizes and vocabulary."""
    (first_task, first), *others = models.items()
    for task, model in others:
        for key in _telling_keys(first, model):
            a, b = first.first.metadata.get(key), model.first.metadata.get(key)
            if not equal(a, b):
                raise SourceMismatchError(
                    f"{model.path}: {key} differs: {brief(a)} in {first_task!r}, {brief(b)} in {task!r}; "
                    "these models do not come from one base"
                )


_SIZES = (
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count",
    "expert_feed_forward_length", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length",
)  # fmt: skip


def _telling_keys(a: Source, b: Source) -> list[str]:
    """Return the keys that models of one base agree in."""
    arch = a.first.metadata.get("general.architecture")
    sizes = [f"{arch}.{size}" for size in _SIZES]
    vocabulary = ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"]
    x, y = a.first.metadata, b.first.metadata
    return [
        "general.architecture",
        *(key for key in sizes if key in x and key in y),  # an absent size has a default, which may be the same
        *(key for key in vocabulary if key in x or key in y),
    ]


def equal(a: object, b: object) -> bool:
    """Return whether two values of metadata are equal, and of one type."""
    if hasattr(a, "tolist"):
        a = a.tolist()
    if hasattr(b, "tolist"):
        b = b.tolist()
    return type(a) is type(b) and a == b


def brief(value: object) -> str:
    """Return a value of metadata in few words."""
    if value is None:
        return "absent"
    if isinstance(value, list):
        return f"{len(value)} entries"
    return repr(value) if len(repr(value)) < 60 else "another value"
