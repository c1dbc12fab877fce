"""inspect: what GGUF files are, told from their headers."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from pyggml_adapt.errors import StrPath
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.weights.adaptor import PEFT
from pyggml_adapt.weights.identity import LOW_RANK, PREFIX, kind
from pyggml_adapt.weights.lowrank import ALPHA, EMBEDDING, A, B
from pyggml_adapt.weights.peft import Target, is_peft, read_peft


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What one file says of itself; fields that do not apply are empty.

    kind: "model", "shard", "foundation", "adaptor", "lora" or another `adapter.type`, "peft".  types: type's name ->
    number of tensors.  nbytes: of the file.  foundation_id: that a foundation has, or that an adaptor asks for.
    n_pairs, n_whole: low-rank pairs and whole tensors of a low-rank adaptor.  ranks: rank -> number of its pairs.
    alpha: of its pairs.  max_error: the largest error of a pair, as `split --low-rank` measured it.
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
    n_pairs: int = 0
    n_whole: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    alpha: float | None = None
    max_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `inspect --json` prints them."""
        return asdict(self)


def inspect(*files: StrPath) -> list[FileInfo]:
    """Return what each file is; only headers are read.

    files: GGUF files, or directories of PEFT's, whose weights are read.
    Raises: FileAccessError, FileFormatError, AdaptorError for the first file that is not sound.
    """
    return [_inspect_peft(path) if is_peft(path) else _inspect(path) for path in files]


def _inspect_peft(path: StrPath) -> FileInfo:
    found = read_peft(path, _target, lambda name: None)
    alphas = {pair.alpha for pair in found.pairs.values()}
    return FileInfo(
        path=os.fsdecode(path),
        kind=PEFT,
        version=0,
        architecture="",
        name=found.base,
        n_tensors=2 * len(found.pairs) + len(found.whole),
        nbytes=sum(os.path.getsize(file) for file in found.files),
        types={},
        n_pairs=len(found.pairs),
        n_whole=len(found.whole),
        ranks=dict(sorted(Counter(pair.b.ne[0] for pair in found.pairs.values()).items())),
        alpha=alphas.pop() if len(alphas) == 1 else None,
    )


def _target(parameter: str) -> Target:
    """Return a target of the parameter's own name: what model it is of does not count here."""
    return Target(EMBEDDING if "embed_tokens" in parameter else parameter)


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
            **(_low_rank(reader) if found == "lora" or _text(reader, PREFIX + "layout") == LOW_RANK else {}),
        )


def _low_rank(reader: GGUFReader) -> dict[str, Any]:
    """Return what is said of low-rank adaptors alone; the file need not be sound."""
    tensors = reader.tensors
    pairs = [name[: -len(A)] for name in tensors if name.endswith(A) and name[: -len(A)] + B in tensors]
    return {
        "n_pairs": len(pairs),
        "n_whole": sum(not name.endswith((A, B)) for name in tensors),
        "ranks": dict(sorted(Counter(tensors[name + B].ne[0] for name in pairs).items())),
        "alpha": _number(reader, ALPHA),
        "max_error": _number(reader, PREFIX + "low_rank.max_error"),
    }


def _number(reader: GGUFReader, key: str) -> float | None:
    value = reader.metadata.get(key)
    return value if isinstance(value, float) else None


def _text(reader: GGUFReader, key: str) -> str:
    return str(reader.metadata.get(key, ""))
