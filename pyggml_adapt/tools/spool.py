"""Spool: bytes that wait on disk, in a file without a name, until the file that they are for can be written."""

from __future__ import annotations

import os
import tempfile
from types import TracebackType

from pyggml_adapt.errors import FileAccessError


class Spool:
    """Own a temporary file without a name, in the directory of the output `path`; nothing leaves it behind.

    Raises: FileAccessError, naming `path`.
    """

    def __init__(self, path: str):
        self.path = path
        self.nbytes = 0
        try:
            self._file = tempfile.TemporaryFile(dir=os.path.dirname(path) or ".", buffering=0)  # noqa: SIM115
        except OSError as exc:
            raise FileAccessError.of(path, exc) from exc

    def write(self, data: bytes | memoryview) -> None:
        """Append all bytes of `data`."""
        view = memoryview(data).cast("B")
        try:
            while view:
                n = self._file.write(view) or 0
                self.nbytes += n
                view = view[n:]
        except OSError as exc:
            raise FileAccessError.of(self.path, exc) from exc

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()
