"""Every exception that this package raises on purpose.

Each class derives from `Error` and from the built-in that fits, so that both `except pga.Error` and
`except ValueError` work.  A message is one sentence that names the file, tensor, key or task at fault.
"""

from __future__ import annotations

import os

StrPath = str | os.PathLike[str]


class Error(Exception):
    """Base of every exception of this package."""


class GGMLError(Error):
    """ggml refused a call, or would have aborted on it."""


class AllocError(GGMLError, MemoryError):
    """ggml could not allocate memory."""


class ShapeError(GGMLError, ValueError):
    """Operand shapes that an op does not accept; names the op and the shapes."""


class IndexRangeError(GGMLError, IndexError):
    """An input of a graph names a row or expert that does not exist; ggml would end the process."""


class DTypeError(GGMLError, TypeError):
    """Operand types that an op or a buffer does not accept; names the op and the types."""


class ClosedError(GGMLError, ValueError):
    """The object, or the owner that it borrows from, has been closed."""


class BusyError(GGMLError, RuntimeError):
    """What a computation uses cannot be closed, written, or computed with a second time, until it has ended."""


class BackendError(GGMLError, RuntimeError):
    """A device or backend that is absent, or that failed."""


class ComputeAborted(GGMLError, RuntimeError):
    """A graph computation was stopped by its abort flag; its results are undefined."""


class FileFormatError(Error, ValueError):
    """A file that is not what it should be.

    path: the file.  offset: byte position of the fault, if known.  key: metadata key or tensor name, if known.
    """

    def __init__(self, message: str, *, path: StrPath, offset: int | None = None, key: str | None = None):
        where = os.fspath(path)
        if offset is not None:
            where += f", byte {offset}"
        super().__init__(f"{where}: {message}")
        self.path = os.fspath(path)
        self.offset = offset
        self.key = key


class FileAccessError(Error, OSError):
    """A file that cannot be opened, read or written (missing, a directory, permission, disk full, ...)."""

    @classmethod
    def of(cls, path: StrPath, exc: BaseException) -> FileAccessError:
        """Return the error that says, in one sentence, why `exc` keeps `path` from being used; it keeps the errno."""
        reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        error = cls(f"{os.fspath(path)}: {reason[:1].lower()}{reason[1:]}")
        error.errno = getattr(exc, "errno", None)
        return error


class OverwriteError(Error, FileExistsError):
    """An output file exists and overwriting was not asked for."""


class SourceMismatchError(Error, ValueError):
    """Models given to `split` that do not belong together; names the key or tensor."""


class ModelError(Error, ValueError):
    """A model that cannot be built: architecture, hyper-parameter or tensor; the message names it."""


class TokenizerError(Error, ValueError):
    """Text cannot be tokenized: the model has no tokenizer, or one that is not supported."""


class TokenError(Error, ValueError):
    """A token id outside the vocabulary, or a batch that is empty."""


class ContextFullError(Error, ValueError):
    """More tokens than the session's context can hold; nothing was evaluated."""


class ParameterError(Error, ValueError):
    """A parameter outside its range; names it."""


class AdaptorError(Error, KeyError):
    """An adaptor or task that is unknown, mismatched, in use or too large.

    code: one of `adaptor_not_found`, `adaptor_exists`, `adaptor_base_mismatch`, `adaptor_invalid`, `adaptor_in_use`,
    `adaptor_changed`, `adaptor_byte_limit_exceeded`, `foundation_changed`, `tensor_not_found`.
    """

    def __init__(self, message: str, *, code: str):
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr
