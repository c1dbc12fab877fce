"""inspect: what GGUF files are, told from their headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from pyggml_adapt.errors import StrPath
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.weights.identity import PREFIX, kind


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What one file says of itself; fields that do not apply are empty.

    kind: "model", "shard", "foundation", "adaptor", "lora" or another `adapter.type`.  types: type's name -> number of
    tensors.  nbytes: of the file.  foundation_id: that a foundation has, or that an adaptor asks for.
    """

    path: str
    kind: str
    version: int
    architecture: str
    name: str
    n_tensors: int
    nbytes: int
    types: dict[str, int]
    task: str = ""
    layout: str = ""
    foundation_id: str = ""
    source_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `inspect --json` prints them."""
        return asdict(self)


def inspect(*files: StrPath) -> list[FileInfo]:
    """Return what each file is; only headers are read.

    Raises: FileAccessError, FileFormatError for the first file that is no sound GGUF.
    """
    return [_inspect(path) for path in files]


def _inspect(path: StrPath) -> FileInfo:
    with GGUFReader(path) as reader:
        found = kind(reader)
        count = reader.metadata.get("split.count", 0)
        if found == "model" and isinstance(count, int) and count > 1:
            found = "shard"
        return FileInfo(
            path=reader.path,
            kind=found,
            version=reader.version,
            architecture=_text(reader, "general.architecture"),
            name=_text(reader, "general.name"),
            n_tensors=len(reader.tensors),
            nbytes=reader.file_nbytes,
            types=dict(Counter(info.type.name for info in reader.tensors.values()).most_common()),
            task=_text(reader, PREFIX + "task"),
            layout=_text(reader, PREFIX + "layout"),
            foundation_id=_text(reader, PREFIX + "foundation.id"),
            source_sha256=_text(reader, PREFIX + "source.sha256"),
        )


def _text(reader: GGUFReader, key: str) -> str:
    return str(reader.metadata.get(key, ""))
