"""Adaptors: what a task has of its own, checked once, and in memory only between bring_in() and let_go()."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import NamedTuple

import numpy as np

from pyggml_adapt.errors import AdaptorError, FileAccessError, StrPath
from pyggml_adapt.ggml import GGUFReader, Tensor, TensorInfo
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.identity import (
    COMPLEMENT,
    LOW_RANK,
    OVERLAY,
    PREFIX,
    blocks,
    check_pair,
    digest,
    layout_of,
    mismatch,
    own_entries,
    small_metadata,
)
from pyggml_adapt.weights.lowrank import A, B, check_base, check_finite, read_low_rank
from pyggml_adapt.weights.mapping import MappedFile, Place, Stamp, TensorMemory, private_memory, stamp_of
from pyggml_adapt.weights.peft import Array, PeftAdaptor, Target, is_peft, read_peft

PEFT = "peft"
_NOT_A_TASKS = ("general.type", "general.architecture", "adapter.", "split.", PREFIX)  # keys of the file, not the model
_REPOSITORIES = ("repo_url", "huggingface.repository")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")  # owner and name; other bases are folders
_ALIGNMENT = 64  # bytes between tensors in private memory


class Pair(NamedTuple):
    """A low-rank pair in memory: see graph.builder.Pair; alpha as llama.cpp's."""

    a: Tensor
    b: Tensor
    alpha: float


class AdaptorInfo(NamedTuple):
    """An adaptor as it is now.

    kind: "complement", "overlay", "low-rank", "lora" or "peft".  nbytes: of its tensors.  resident: whether they are in
    memory now.  pinned: whether they stay there.  n_sessions: that use it now.
    """

    name: str
    kind: str
    path: str
    nbytes: int
    resident: bool
    pinned: bool
    n_sessions: int
    content_id: str


class Adaptor:
    """One adaptor of a foundation.

    kind: "complement", "overlay" (whole tensors), "low-rank" (ours), "lora" (llama.cpp's) or "peft" (a directory).
    whole: names of the tensors that replace the foundation's or are added.  alphas: of its low-rank pairs, by the
    weight that they are on.  names: of all tensors of its model; None if these are whatever is below it.
    content_id: 64 hexadecimal digits that change with the content.  digests: SHA-256 of its whole tensors, if known.
    nbytes: of all its tensors.
    """

    name: str
    path: str
    kind: str
    content_id: str
    nbytes: int
    whole: Set[str]
    alphas: Mapping[str, float]
    names: tuple[str, ...] | None = None
    digests: Mapping[str, bytes] = {}
    metadata: Mapping[str, object] = {}

    stamp: Stamp | None = None  # of its file when it was checked

    def __init__(self) -> None:
        self.is_pinned = False
        self.n_users = 0  # sessions, and whoever else must not lose it
        self._memory: TensorMemory | None = None

    @property
    def is_resident(self) -> bool:
        """Return whether its tensors are in memory."""
        return self._memory is not None

    @property
    def is_low_rank(self) -> bool:
        """Return whether it needs a whole model below it."""
        return self.names is None

    def info(self) -> AdaptorInfo:
        """Return what it is and where."""
        return AdaptorInfo(
            self.name,
            self.kind,
            self.path,
            self.nbytes,
            self.is_resident,
            self.is_pinned,
            self.n_users,
            self.content_id,
        )

    @property
    def memory(self) -> TensorMemory:
        """Return its tensors' memory.  Raises: AdaptorError (adaptor_not_found) when it is not in memory."""
        if self._memory is None:
            raise AdaptorError(f"adaptor {self.name!r} is not in memory", code="adaptor_not_found")
        return self._memory

    def tensor(self, name: str) -> Tensor:
        """Return one of its whole tensors."""
        return self.memory.tensors[name]

    def pair(self, target: str) -> Pair:
        """Return its low-rank pair on the weight `target`."""
        tensors = self.memory.tensors
        return Pair(tensors[target + A], tensors[target + B], self.alphas[target])

    def bring_in(self) -> None:
        """Bring its tensors into memory, unless they are there.

        Raises: FileAccessError, FileFormatError; AdaptorError (adaptor_changed) if the file is another one by now.
        """
        if self._memory is None:
            self._memory = self._load()

    def let_go(self) -> None:
        """Give its memory back."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def check_unchanged(self) -> None:
        """Raise AdaptorError (adaptor_changed) if its mapped file was written to: its tensors may be anything then."""
        if isinstance(self._memory, MappedFile) and self._memory.has_changed():
            raise self._changed("was written to while it was in use")

    def full_metadata(self) -> dict[str, object]:
        """Return all metadata of the task that it carries, large arrays included."""
        return {}

    def check_data(self) -> None:
        """Raise AdaptorError (adaptor_changed) unless the file has the bytes that its content_id stands for."""

    def _load(self) -> TensorMemory:
        raise NotImplementedError

    def _changed(self, detail: str) -> AdaptorError:
        return AdaptorError(
            f"{self.path}: the file of adaptor {self.name!r} {detail}; reload_adaptor() takes it as it is now",
            code="adaptor_changed",
        )

    def __repr__(self) -> str:
        where = "in memory" if self.is_resident else "not in memory"
        return f"<Adaptor {self.name!r}, {self.kind}, {self.nbytes} bytes, {where}>"


class FileAdaptor(Adaptor):
    """An adaptor in one GGUF file; see Adaptor."""

    def __init__(self, name: str, path: StrPath, foundation: Foundation, *, use_mmap: bool, use_mlock: bool):
        super().__init__()
        self.name = name
        self._foundation, self._options = foundation, {"use_mmap": use_mmap, "use_mlock": use_mlock}
        with GGUFReader(path) as reader:
            self.path = reader.path
            self._read(reader)

    def _read(self, reader: GGUFReader) -> None:
        """Check the file against the foundation, and keep what is needed to bring it in."""
        self.kind = layout_of(reader)
        self.stamp = stamp_of(reader.fileno())
        self._infos: list[TensorInfo] = list(reader.tensors.values())
        self.nbytes = sum(info.nbytes for info in self._infos)
        if self.kind in (COMPLEMENT, OVERLAY):
            identity = check_pair(self._foundation.reader, reader)
            own = [identity.tensors[info.name] for info in self._infos]
            self.names, self.alphas = tuple(identity.tensors), {}
            self.metadata = small_metadata(reader)
        else:
            low_rank = read_low_rank(reader)
            check_base(self._foundation.reader, reader)
            _check_repository(self._foundation, self.path, _repositories(reader.metadata, "general.base_model."))
            own = list(own_entries(reader).values()) if self.kind == LOW_RANK else []
            check_finite(reader, self._infos)
            self.names, self.alphas = None, {target: pair.alpha for target, pair in low_rank.pairs.items()}
            if self.kind == LOW_RANK:
                self.metadata = _tasks_own(small_metadata(reader))
        # our headers hold the digests of all tensors, so that they stand for the whole file
        self.content_id = _sha256(reader, reader.data_offset if own else reader.file_nbytes)
        halves = {half for target in self.alphas for half in (target + A, target + B)}
        self.whole = dict.fromkeys(info.name for info in self._infos if info.name not in halves).keys()
        self._entries = own
        self.digests = {entry.name: entry.digest for entry in own if entry.name in self.whole}

    def _load(self) -> TensorMemory:
        while True:
            self._check_replaced()
            memory = MappedFile(self.path, self._infos, **self._options)
            if memory.stamp == self.stamp:
                return memory
            memory.close()  # replaced since it was looked at

    def _check_replaced(self) -> None:
        """Raise AdaptorError (adaptor_changed) if the file is another one by now, unless its content is the same."""
        try:
            if stamp_of(self.path) == self.stamp:
                return
        except OSError as exc:
            raise FileAccessError.of(self.path, exc) from exc
        now = FileAdaptor(self.name, self.path, self._foundation, **self._options)
        if now.content_id != self.content_id:
            raise self._changed("has other content than when it was loaded")
        now.check_data()
        self.stamp, self._infos = now.stamp, now._infos

    def check_data(self) -> None:
        """Raise AdaptorError (adaptor_changed) unless the file has the bytes that its content_id stands for."""
        with GGUFReader(self.path) as reader:
            for entry in self._entries:  # none for a LoRA file, whose content_id is of all its bytes
                if digest(reader, reader.tensors[entry.name]) != entry.digest:
                    raise self._changed(f"has other bytes in tensor {entry.name!r} than its header says")

    def full_metadata(self) -> dict[str, object]:
        """Return all metadata of the task that it carries, read again from the file with its large arrays."""
        if self.names is None and self.kind != LOW_RANK:
            return {}
        with GGUFReader(self.path) as reader:
            if stamp_of(reader.fileno()) != self.stamp:
                raise self._changed("is another one than when it was loaded")
            metadata = dict(reader.metadata)
        return metadata if self.names is not None else _tasks_own(metadata)


class DirectoryAdaptor(Adaptor):
    """What PEFT's save_pretrained() wrote; its factors are in memory in GGUF's orientation, as F32.  See Adaptor."""

    kind = PEFT

    def __init__(self, name: str, path: StrPath, foundation: Foundation, target_of: Callable[[str], Target | None]):
        super().__init__()
        self.name, self.path = name, os.fsdecode(path)
        self._foundation, self._target_of = foundation, target_of
        found = self._read()
        _check_repository(
            foundation, self.path, {_last_part(found.base)} if _REPOSITORY.fullmatch(found.base) else set()
        )
        self.content_id = found.content_id
        self.alphas = {target: pair.alpha for target, pair in found.pairs.items()}
        self.whole = dict.fromkeys(found.whole).keys()
        self.nbytes = sum(array.data.nbytes for _, array in _arrays(found))

    def _read(self) -> PeftAdaptor:
        return read_peft(self.path, self._target_of, self._bias)

    def _bias(self, name: str) -> np.ndarray | None:
        """Return a bias of the foundation's, F32."""
        self._foundation.check_unchanged()
        tensor = self._foundation.tensors.get(name)
        return None if tensor is None else tensor.to_numpy().copy()

    def _load(self) -> TensorMemory:
        found = self._read()
        if found.content_id != self.content_id:
            raise self._changed("has other content than when it was loaded")
        places, end = [], 0
        for name, array in _arrays(found):
            places.append(Place(name, array.type, array.ne, end))
            end += array.data.nbytes + -array.data.nbytes % _ALIGNMENT
        view = memoryview(private_memory(end))
        for place, (_, array) in zip(places, _arrays(found), strict=True):
            view[place.offset : place.offset + array.data.nbytes] = array.data.reshape(-1).view(np.uint8).data
        return TensorMemory(self.path, view.toreadonly(), places)


def open_adaptor(
    name: str,
    path: StrPath,
    foundation: Foundation,
    *,
    target_of: Callable[[str], Target | None],
    use_mmap: bool = True,
    use_mlock: bool = False,
) -> Adaptor:
    """Return an adaptor of this foundation, whatever its kind; it is not in memory yet.

    target_of: of the foundation's architecture, for PEFT directories.
    Raises: FileAccessError, FileFormatError, AdaptorError (adaptor_invalid, adaptor_base_mismatch).
    """
    if is_peft(path):
        return DirectoryAdaptor(name, path, foundation, target_of)
    return FileAdaptor(name, path, foundation, use_mmap=use_mmap, use_mlock=use_mlock)


def _arrays(found: PeftAdaptor) -> Iterable[tuple[str, Array]]:
    for target, pair in found.pairs.items():
        yield target + A, pair.a
        yield target + B, pair.b
    yield from found.whole.items()


def _tasks_own(metadata: Mapping[str, object]) -> dict[str, object]:
    """Return the metadata of a low-rank file that the task has in place of the foundation's."""
    return {key: value for key, value in metadata.items() if not key.startswith(_NOT_A_TASKS)}


def _sha256(reader: GGUFReader, nbytes: int) -> str:
    """Return the SHA-256 of the first bytes of a file."""
    sha = hashlib.sha256()
    for block in blocks(reader, 0, nbytes):
        sha.update(block)
    return sha.hexdigest()


def _last_part(repository: str) -> str:
    return repository.rstrip("/").rpartition("/")[2].lower()


def _repositories(metadata: Mapping[str, object], start: str) -> set[str]:
    """Return the last parts of the names of the repositories that the keys below `start` name."""
    keys = [key for key in metadata if key.startswith(start) and key.endswith(_REPOSITORIES)]
    return {_last_part(str(metadata[key])) for key in keys}


def _check_repository(foundation: Foundation, path: str, wanted: set[str]) -> None:
    """Raise AdaptorError (adaptor_base_mismatch) if both sides name a model's repository, and no name is the same."""
    known = _repositories(foundation.metadata, "general.")  # its own, and those that it was made from
    if wanted and known and not wanted & known:
        detail = f"it was made for {', '.join(sorted(wanted))}, and that comes from {', '.join(sorted(known))}"
        raise mismatch(f"{path}: the adaptor", foundation.path, detail)
