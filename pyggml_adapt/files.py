"""AtomicFile: an output file that appears under its name whole, or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable
from types import TracebackType

from pyggml_adapt.errors import FileAccessError, OverwriteError, StrPath

_COPY_NBYTES = 8 << 20
_WRITE_NBYTES = 1 << 20  # at a time: for more, Linux looks for larger pages, and takes twice as long to find them
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


def refuse_overwrite(path: StrPath) -> None:
    """Raise OverwriteError if something is at `path`."""
    if os.path.lexists(path):
        raise OverwriteError(f"{os.fspath(path)}: the file exists already; replacing it needs --force (force=True)")


class AtomicFile:
    """Own a temporary file in the directory of `path`, which takes that name in `commit()`.

    Where the file system can, the temporary file has no name, so that not even SIGKILL leaves it behind.
    Raises: OverwriteError if `path` exists and not `overwrite`; FileAccessError.
    """

    def __init__(self, path: StrPath, *, overwrite: bool = False):
        self.path = os.fsdecode(path)
        self.overwrite = overwrite
        self.nbytes = 0
        self._fd = -1
        self._temp = ""  # the temporary file's name, if it has one
        self._directory = os.path.dirname(os.path.abspath(self.path))
        if os.path.isdir(self.path):
            raise FileAccessError.of(self.path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
        if not overwrite:
            refuse_overwrite(self.path)
        self._open()

    def _open(self) -> None:
        try:
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                self._fd = os.open(self._directory, flags, 0o666)
            except (AttributeError, OSError) as exc:
                if isinstance(exc, OSError) and exc.errno not in _NO_TMPFILE:
                    raise
                name = self._new_name()
                self._fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
                self._temp = name
        except (OSError, ValueError) as exc:  # of a NUL in the path
            raise FileAccessError.of(self.path, exc) from exc

    def _new_name(self) -> str:
        return os.path.join(self._directory, f".{os.path.basename(self.path)[:64]}.{secrets.token_hex(6)}.tmp")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all bytes of `data`."""
        view = memoryview(data).cast("B")
        try:
            while view:
                n = os.write(self._fd, view[:_WRITE_NBYTES])
                self.nbytes += n
                view = view[n:]
        except OSError as exc:
            raise FileAccessError.of(self.path, exc) from exc

    def copy(self, fd: int, offset: int, nbytes: int, path: StrPath) -> None:
        """Append `nbytes` bytes of the open file `fd` from `offset` on, inside the kernel where it can.

        path: the name of that file, for messages.
        """
        end = offset + nbytes
        try:
            while offset < end:
                n = self._copy_some(fd, offset, min(end - offset, _COPY_NBYTES))
                if not n:
                    raise FileAccessError(f"{os.fspath(path)}: the file became shorter while it was read")
                self.nbytes += n
                offset += n
        except OSError as exc:
            if isinstance(exc, FileAccessError):
                raise
            raise FileAccessError.of(self.path, exc) from exc

    def _copy_some(self, fd: int, offset: int, nbytes: int) -> int:
        n = 0
        try:
            n = os.copy_file_range(fd, self._fd, nbytes, offset)
        except (AttributeError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno not in _NO_COPY:
                raise
        if n:  # some file systems copy nothing and call it success
            return n
        data = os.pread(fd, nbytes, offset)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        return len(data)

    def sync(self) -> None:
        """Have the bytes written so far reach the disk."""
        try:
            os.fsync(self._fd)
        except (OSError, ValueError) as exc:  # of a file that was closed
            raise FileAccessError.of(self.path, exc) from exc

    def commit(self) -> None:
        """Sync, then give the file its name."""
        commit_all([self])

    def _publish(self) -> None:
        if not self._temp and self.overwrite:
            self._name_it(self._new_name())
        if self.overwrite:
            os.replace(self._temp, self.path)
            self._temp = ""
        elif self._temp:
            os.link(self._temp, self.path)  # unlike rename, fails if the name is taken
        else:
            self._name_it(self.path)
            self._temp = ""
        self.close()
        _sync_directory(self._directory)

    def _name_it(self, name: str) -> None:
        # with a directory descriptor, Python calls linkat, which follows the link that names our descriptor
        os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=self._fd, follow_symlinks=True)
        self._temp = name

    def close(self) -> None:
        """Discard what was not committed; closing twice is allowed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._temp:
            os.unlink(self._temp)
            self._temp = ""

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def commit_all(files: Iterable[AtomicFile]) -> None:
    """Sync all files, then give each its name; if that fails for one, those that were new are taken back."""
    files = list(files)
    for file in files:
        file.sync()
    new: list[str] = []
    try:
        for file in files:
            existed = os.path.lexists(file.path)
            _publish(file)
            if not existed:
                new.append(file.path)
    except BaseException:
        for path in new:
            os.unlink(path)
        raise


def _publish(file: AtomicFile) -> None:
    try:
        file._publish()
    except FileExistsError as exc:
        raise OverwriteError(f"{file.path}: the file came into being while its replacement was written") from exc
    except (OSError, ValueError) as exc:
        raise FileAccessError.of(file.path, exc) from exc


def _sync_directory(path: str) -> None:
    """Have a new name reach the disk, where directories can be synced."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)
