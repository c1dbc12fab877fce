"""The foundation: the bytes that all tasks share, mapped once."""

from __future__ import annotations

from collections.abc import Mapping

from pyggml_adapt.errors import AdaptorError, StrPath
from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.weights.identity import kind, small_metadata
from pyggml_adapt.weights.mapping import MappedFile, stamp_of


class Foundation(MappedFile):
    """A `*-foundation.gguf`, or any complete model that adaptors were split from."""

    def __init__(self, path: StrPath, *, use_mmap: bool = True, use_mlock: bool = False):
        """Raises: FileAccessError, FileFormatError; AdaptorError (adaptor_invalid) if the file is an adaptor."""
        self.reader = GGUFReader(path)  # kept: each adaptor is compared with it
        self.metadata: Mapping[str, object] = small_metadata(self.reader)
        found = kind(self.reader)
        if found not in ("foundation", "model"):
            raise AdaptorError(
                f"{self.reader.path}: not a foundation or a complete model, but of the kind {found!r}",
                code="adaptor_invalid",
            )
        if found == "model" and self.reader.metadata.get("split.count", 1) != 1:
            raise AdaptorError(
                f"{self.reader.path}: one shard of a model; a host needs one file: `pyggml-adapt split` reads shard "
                f"sets, and llama.cpp's gguf-split --merge joins them",
                code="adaptor_invalid",
            )
        super().__init__(self.reader.path, self.reader.tensors.values(), use_mmap=use_mmap, use_mlock=use_mlock)
        self.is_complete = found == "model"  # a model by itself, so that it is the task `base` too

    def full_metadata(self) -> dict[str, object]:
        """Return all metadata, read again from the file with its large arrays.

        Raises: FileAccessError; AdaptorError (foundation_changed) if the file is another one by now.
        """
        with GGUFReader(self.path) as reader:
            if stamp_of(reader.fileno()) != self.stamp:
                raise self._changed("is another file than when it was loaded")
            return dict(reader.metadata)

    def check_unchanged(self) -> None:
        """Raise AdaptorError (foundation_changed) if the mapped file was written to."""
        if self.has_changed():
            raise self._changed("was written to while it was in use")

    def _changed(self, detail: str) -> AdaptorError:
        return AdaptorError(f"{self.path}: the foundation {detail}", code="foundation_changed")

    def close(self) -> None:
        """Unmap the file."""
        super().close()
        self.reader.close()
