"""merge: write the model again that an adaptor was split from, byte for byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pyggml_adapt.errors import FileFormatError, ParameterError, StrPath
from pyggml_adapt.ggml.atomic import AtomicFile
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.tools.layout import Original, original
from pyggml_adapt.tools.source import Progress, beside, ticker
from pyggml_adapt.tools.split import check_outputs
from pyggml_adapt.tools.verify import LORA, check_digests
from pyggml_adapt.weights.identity import LOW_RANK, AdaptorIdentity, blocks, check_pair, layout_of


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


def _write(
    file: AtomicFile,
    base: GGUFReader,
    own: GGUFReader,
    identity: AdaptorIdentity,
    source: Original,
    tick: Callable[[int], None],
) -> str:
    """Write the model and return its SHA-256; hashing runs beside writing."""
    sha = hashlib.sha256()
    with ThreadPoolExecutor(1) as pool:
        for block in _blocks(base, own, identity, source):
            pending = beside(pool, sha.update, block)
            file.write(block)
            pending.result()
            tick(len(block))
    return sha.hexdigest()


def _blocks(base: GGUFReader, own: GGUFReader, identity: AdaptorIdentity, source: Original) -> Iterator[memoryview]:
    """Yield the source's bytes; each block is valid until the next."""
    yield memoryview(source.header)
    at = len(source.header)
    last = next(reversed(list(identity.tensors)), None)
    for name in identity.tensors:
        reader = own if name in identity.own else base
        info = reader.tensors[name]
        yield from blocks(reader, info.offset, info.nbytes)
        at += info.nbytes
        end = source.nbytes if name == last else at + -at % source.alignment
        yield from (memoryview(piece) for piece in source.gap(at, end))
        at = max(at, end)
    if last is None:
        yield from (memoryview(piece) for piece in source.gap(at, source.nbytes))
