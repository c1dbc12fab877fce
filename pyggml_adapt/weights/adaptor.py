"""One adaptor: what a task has of its own, checked against its foundation."""

from __future__ import annotations

from pyggml_adapt.errors import StrPath
from pyggml_adapt.ggml import GGUFReader
from pyggml_adapt.weights.foundation import Foundation
from pyggml_adapt.weights.identity import check_pair
from pyggml_adapt.weights.mapping import MappedFile


class Adaptor(MappedFile):
    """The whole tensors of one task, mapped."""

    def __init__(
        self, task: str, path: StrPath, foundation: Foundation, *, use_mmap: bool = True, use_mlock: bool = False
    ):
        """Raises: FileAccessError, FileFormatError; AdaptorError (adaptor_invalid, adaptor_base_mismatch)."""
        with GGUFReader(path) as reader:
            self.identity = check_pair(foundation.reader, reader)
            super().__init__(reader, use_mmap=use_mmap, use_mlock=use_mlock)
        self.task = task
