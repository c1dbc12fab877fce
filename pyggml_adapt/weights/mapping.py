"""One GGUF file in memory: mapped read-only and used in place, or read into memory of our own."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Mapping

import numpy as np

from pyggml_adapt.ggml import Buffer, Context, Device, GGUFReader, Tensor

_logger = logging.getLogger(__name__)
_LARGE = ("tokenizer.", "pyggml_adapt.")  # arrays below these keys are read again when they are asked for


class MappedFile:
    """The tensors of one GGUF file, placed where the file is mapped; close() unmaps it.

    use_mmap: False reads the tensors into private memory instead.  use_mlock: keep the pages in physical memory.
    """

    def __init__(self, reader: GGUFReader, *, use_mmap: bool = True, use_mlock: bool = False):
        self.path: str = reader.path
        self.metadata: Mapping[str, object] = _small_metadata(reader)
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = sum(info.nbytes for info in reader.tensors.values())
        self._ctx = Context(Context.size_for(max(len(reader.tensors), 1)))
        mapping = reader.map()
        start = 0
        if use_mmap:
            self._buffer = Buffer.from_mapping(mapping)
            if hasattr(mmap, "MADV_WILLNEED"):
                mapping.madvise(mmap.MADV_WILLNEED)
        else:
            start = reader.data_offset
            self._buffer = Buffer.allocate(Device.cpu().buffer_type, max(len(mapping) - start, 1))
        for name, info in reader.tensors.items():
            tensor = self.tensors[name] = self._ctx.new_tensor(info.type, info.ne, name)
            self._buffer.place(tensor, info.offset - start)
            if not use_mmap:
                tensor.set_data(memoryview(mapping)[info.offset : info.offset + info.nbytes])
        self.is_mapped = use_mmap
        self._mapping = mapping if use_mmap else None
        if use_mlock:
            _lock(np.frombuffer(mapping, dtype=np.uint8), self.path)

    def full_metadata(self) -> dict[str, object]:
        """Return all metadata, read again from the file with its large arrays."""
        with GGUFReader(self.path) as reader:
            return dict(reader.metadata)

    def address_range(self) -> tuple[int, int]:
        """Return the first and last + 1 address of the mapping, (0, 0) if there is none."""
        if self._mapping is None:
            return 0, 0
        view = np.frombuffer(self._mapping, dtype=np.uint8)
        return view.ctypes.data, view.ctypes.data + view.nbytes

    def close(self) -> None:
        """Unmap the file; tensors that are still held raise ClosedError from then on."""
        self._ctx.close()
        self._buffer.close()
        self._mapping = None


def _small_metadata(reader: GGUFReader) -> dict[str, object]:
    """Return the metadata without large arrays."""
    return {
        key: reader.value(key)
        for key in reader.metadata
        if not (key.startswith(_LARGE) and reader.kv_type(key)[0] == "arr")
    }


def _lock(view: np.ndarray, path: str) -> None:
    """Ask for the pages to stay in physical memory; like llama.cpp, only warn when the limit forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.nbytes)):
        _logger.warning(
            "%s: mlock of %d bytes failed: %s (see ulimit -l)", path, view.nbytes, os.strerror(ctypes.get_errno())
        )
