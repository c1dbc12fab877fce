"""Tensors in one block of memory: a file that is mapped read-only and used in place, or memory of our own."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pyggml_adapt.errors import AllocError, FileAccessError
from pyggml_adapt.ggml import Buffer, Context, Tensor, TensorInfo, Type

_logger = logging.getLogger(__name__)


class Stamp(NamedTuple):
    """What tells, without reading it, that a file is the one that was checked: device, inode, size, time of change."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int


def stamp_of(file: int | str) -> Stamp:
    """Return the stamp of an open file, or of the one at a path."""
    info = os.stat(file)
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


class Place(NamedTuple):
    """Where in a block of memory a tensor is.  ne: in ggml order.  offset: in bytes."""

    name: str
    type: Type
    ne: Sequence[int]
    offset: int


class TensorMemory:
    """Tensors that live in one block of memory; close() gives it back.

    memory: an object with the buffer protocol, such as an mmap.  path: for messages.
    """

    def __init__(self, path: str, memory: mmap.mmap | memoryview, places: Iterable[Place]):
        self.path = path
        places = list(places)
        self.tensors: dict[str, Tensor] = {}
        self._ctx = Context(Context.size_for(max(len(places), 1)))
        self._memory: mmap.mmap | memoryview | None = memory
        self._buffer = Buffer.from_mapping(memory)
        for place in places:
            tensor = self.tensors[place.name] = self._ctx.new_tensor(place.type, place.ne, place.name)
            self._buffer.place(tensor, place.offset)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _view(self) -> np.ndarray:
        """Return the bytes, none after close()."""
        return np.empty(0, np.uint8) if self._memory is None else np.frombuffer(self._memory, dtype=np.uint8)

    def address_range(self) -> tuple[int, int]:
        """Return the first and last + 1 address of the block, (0, 0) after close()."""
        view = self._view()
        return (view.ctypes.data, view.ctypes.data + view.nbytes) if view.size else (0, 0)

    def populate(self) -> None:
        """Bring every page into memory; the GIL is released while they are read."""
        view = self._view()
        if view.size:
            view[:: mmap.PAGESIZE].max()

    def lock(self) -> None:
        """Ask for the pages to stay in physical memory; like llama.cpp, only warn when the limit forbids it."""
        view = self._view()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlock(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.nbytes)):
            reason = os.strerror(ctypes.get_errno())
            _logger.warning("%s: mlock of %d bytes failed: %s (see ulimit -l)", self.path, view.nbytes, reason)

    def close(self) -> None:
        """Give the memory back; tensors that are still held raise ClosedError from then on."""
        self._ctx.close()
        self._buffer.close()
        self._memory = None


class MappedFile(TensorMemory):
    """The tensors of one GGUF file, where it is mapped; with use_mmap=False, read into private memory instead.

    tensors: the entries of its header.  use_mlock: keep the pages in physical memory.
    """

    _fd = -1

    def __init__(self, path: str, tensors: Iterable[TensorInfo], *, use_mmap: bool = True, use_mlock: bool = False):
        """Raises: FileAccessError, AllocError."""
        tensors = list(tensors)
        start, end = 0, max((info.offset + info.nbytes for info in tensors), default=1)
        self.is_mapped = use_mmap
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block it
            self.stamp = stamp_of(self._fd)
            if use_mmap:
                memory: mmap.mmap | memoryview = _map(self._fd, self.stamp.nbytes)
            else:
                start = min((info.offset for info in tensors), default=0)
                memory = _read(self._fd, start, end)
        except (OSError, ValueError) as exc:
            raise FileAccessError.of(path, exc) from exc
        if len(memory) < end - start:
            raise FileAccessError(f"{path}: the file became shorter while it was read")
        super().__init__(path, memory, (Place(i.name, i.type, i.ne, i.offset - start) for i in tensors))
        if use_mlock:
            self.lock()

    def has_changed(self) -> bool:
        """Return whether the file was written to since it was mapped: its tensors may then be anything."""
        if not self.is_mapped or self._fd < 0:
            return False
        info = os.fstat(self._fd)
        return info.st_mtime_ns != self.stamp.mtime_ns or info.st_size != self.stamp.nbytes

    def close(self) -> None:
        """Unmap the file; tensors that are still held raise ClosedError from then on."""
        super().close()
        self._close_fd()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self._close_fd()


def private_memory(nbytes: int) -> mmap.mmap:
    """Return zeroed memory that goes back to the system as soon as nothing refers to it.

    It is MAP_SHARED, Python's default: the kernel would merge private mappings with their neighbours, and then could
    not say how much of it is resident.
    Raises: AllocError.
    """
    try:
        return mmap.mmap(-1, max(nbytes, 1))
    except (OSError, OverflowError) as exc:
        raise AllocError(f"no memory for {nbytes} bytes of weights") from exc


def _map(fd: int, nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_WILLNEED"):
        memory.madvise(mmap.MADV_WILLNEED)
    return memory


def _read(fd: int, start: int, end: int) -> memoryview:
    """Return a copy of part of a file, read-only; shorter if the file is."""
    view = memoryview(private_memory(end - start))
    done = 0
    while done < end - start:
        n = os.preadv(fd, [view[done:]], start + done)
        if not n:
            break
        done += n
    return view[: max(done, 1)].toreadonly()
