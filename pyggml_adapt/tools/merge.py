"""merge: write the model again that an adaptor was split from, byte for byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pyggml_adapt.errors import FileAccessError, FileFormatError, ParameterError, StrPath
from pyggml_adapt.files import AtomicFile
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.tools.layout import Original, original
from pyggml_adapt.tools.source import Progress, ticker
from pyggml_adapt.tools.split import check_outputs
from pyggml_adapt.tools.verify import LORA, check_digests
from pyggml_adapt.weights.identity import LOW_RANK, AdaptorIdentity, check_pair, layout_of

_BLOCK_NBYTES = 1 << 20  # small enough that what was just read is in the caches when it is written and hashed


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merge wrote.

    sha256: of the file.  identical: whether that is the digest of the file that was split; merge fails otherwise.
    n_shards: of the model that was split; if it was more than one file, `identical` compares with their single file.
    """

    path: str
    sha256: str
    identical: bool
    n_tensors: int
    nbytes: int
    n_shards: int


def merge(
    foundation: StrPath, adaptor: StrPath, output: StrPath, *, force: bool = False, progress: Progress | None = None
) -> MergeReport:
    """Write the whole model of a foundation and an adaptor of ours to `output`.

    force: replace a file that exists.
    Raises: AdaptorError if the two do not belong together; ParameterError for a low-rank adaptor; FileFormatError,
    naming a tensor, if the result is not byte-identical to the model that was split: nothing is written then;
    OverwriteError, FileAccessError.
    """
    with GGUFReader(foundation) as base, GGUFReader(adaptor) as own:
        if layout_of(own) in (LORA, LOW_RANK):
            raise ParameterError(
                f"{own.path}: a low-rank adaptor has no model to give back; `pyggml-adapt bake` makes an overlay "
                f"adaptor of it, which merges"
            )
        check_outputs([os.fsdecode(output)], [base, own], force)
        identity = check_pair(base, own)
        source = original(own, identity)
        with AtomicFile(output, overwrite=force) as file:
            found = _write(file, base, own, identity, source, ticker(source.nbytes, "writing", progress))
            if found != source.sha256 or file.nbytes != source.nbytes:
                check_digests(base, identity.shared)
                check_digests(own, [identity.tensors[name] for name in own.tensors])
                message = "the metadata are not those of the model that was split, as the digest of the result shows"
                raise FileFormatError(message, path=own.path)
            file.commit()
    return MergeReport(
        path=file.path,
        sha256=found,
        identical=found == source.sha256,
        n_tensors=len(identity.tensors),
        nbytes=file.nbytes,
        n_shards=source.n_shards,
    )


class _Output:
    """What is written to a file, in blocks of one size; each is hashed while it is written and the next one is read."""

    def __init__(self, file: AtomicFile, pool: ThreadPoolExecutor, tick: Callable[[int], None]):
        """pool: of one thread.  tick: called with the number of bytes written since its last call."""
        self._file, self._pool, self._tick = file, pool, tick
        self._sha = hashlib.sha256()
        self._blocks = [memoryview(bytearray(_BLOCK_NBYTES)) for _ in range(2)]  # the one to fill, the one being hashed
        self._n = 0  # bytes in the block to fill
        self._hashing: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append bytes."""
        view = memoryview(data)
        while view:
            room = self._blocks[0][self._n :][: len(view)]
            room[:] = view[: len(room)]
            self._add(len(room))
            view = view[len(room) :]

    def copy(self, reader: GGUFReader, offset: int, nbytes: int) -> None:
        """Append part of another file.

        Raises: FileAccessError if it cannot be read that far.
        """
        end = offset + nbytes
        while offset < end:
            try:
                n = os.preadv(reader.fileno(), [self._blocks[0][self._n :][: end - offset]], offset)
            except OSError as exc:
                raise FileAccessError.of(reader.path, exc) from exc
            if not n:
                raise FileAccessError(f"{reader.path}: the file became shorter while it was read")
            self._add(n)
            offset += n

    def _add(self, n: int) -> None:
        self._n += n
        if self._n == _BLOCK_NBYTES:
            self._flush()

    def _flush(self) -> None:
        if self._hashing is not None:
            self._hashing.result()
        block = self._blocks[0][: self._n]
        self._hashing = self._pool.submit(self._sha.update, block)
        self._file.write(block)
        self._tick(self._n)
        self._blocks.reverse()
        self._n = 0

    def digest(self) -> str:
        """Write what is left, and return the SHA-256 of everything."""
        self._flush()
        self._pool.shutdown()
        return self._sha.hexdigest()


def _write(
    file: AtomicFile,
    base: GGUFReader,
    own: GGUFReader,
    identity: AdaptorIdentity,
    source: Original,
    tick: Callable[[int], None],
) -> str:
    """Write the model and return its SHA-256."""
    with ThreadPoolExecutor(1) as pool:
        output = _Output(file, pool, tick)
        output.write(source.header)
        at = len(source.header)
        last = next(reversed(list(identity.tensors)), None)
        for name in identity.tensors:
            reader = own if name in identity.own else base
            info = reader.tensors[name]
            output.copy(reader, info.offset, info.nbytes)
            at += info.nbytes
            end = source.nbytes if name == last else at + -at % source.alignment
            for piece in source.gap(at, end):
                output.write(piece)
            at = max(at, end)
        if last is None:
            for piece in source.gap(at, source.nbytes):
                output.write(piece)
        return output.digest()
