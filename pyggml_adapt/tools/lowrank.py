"""Low-rank pairs from the difference of two whole models, tensor by tensor; whole tensors where pairs would not do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pyggml_adapt.errors import FileFormatError, ParameterError, SourceMismatchError
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf import GGUFReader, TensorInfo
from pyggml_adapt.ggml.quants import dequantize
from pyggml_adapt.tools.source import Scan, Source, brief, equal
from pyggml_adapt.tools.spool import Spool
from pyggml_adapt.tools.svd import Factors, energy, fit
from pyggml_adapt.weights.identity import BLOCK_NBYTES, Entry, blocks
from pyggml_adapt.weights.lowrank import EMBEDDING, HEAD, A, B

RANK = 16  # of the estimate that split makes without being asked, and alpha where each tensor gets a rank of its own
MAX_ERROR = 0.1  # for "auto", unless another is given
LINEAR = re.compile(
    r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?|ffn_gate_inp))\.weight"
)
_FLOATS = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True, slots=True)
class LowRankReport:
    """What became of one tensor that differs from the foundation's.

    kind: "low-rank"; "whole", with rank 0; or "equal" if only the encoding differs and not the values, so that nothing
    was written.  error: norm of what is left of the difference over the norm of the difference, with the factors as
    written; for a whole tensor, that of the best pair if one was tried, else 0.
    nbytes: of what is written.  whole_nbytes: of the whole tensor.  why: in words.
    """

    task: str
    name: str
    kind: Literal["low-rank", "whole", "equal"]
    rank: int
    error: float
    nbytes: int
    whole_nbytes: int
    why: str


@dataclass(frozen=True, slots=True)
class SizeReport:
    """Bytes of the tensors that a task has of its own, whole and as low-rank pairs where these are smaller.

    rank: at most.  is_measured: whether the pairs were made; if not, nothing is known of their error.
    """

    task: str
    whole_nbytes: int
    low_rank_nbytes: int
    rank: int
    is_measured: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for.  rank: of every pair, the highest one if there is a max_error; None for whatever it takes."""

    rank: int | None
    max_error: float | None

    @classmethod
    def of(cls, low_rank: int | str, max_error: float | None) -> Wanted:
        """Raises: ParameterError for what is neither a rank nor "auto", or an error that is not from 0 to 1."""
        if max_error is not None and not 0.0 < max_error < 1.0:
            raise ParameterError(f"max_error must be between 0 and 1, not {max_error}")
        if low_rank == "auto":
            return cls(None, MAX_ERROR if max_error is None else max_error)
        if not isinstance(low_rank, int) or isinstance(low_rank, bool) or low_rank < 1:
            raise ParameterError(f"low_rank must be a rank of at least 1, or 'auto', not {low_rank!r}")
        return cls(low_rank, max_error)

    @property
    def alpha(self) -> float:
        """Return the file's alpha: the rank asked for, so that a pair's product is scaled by 1."""
        return float(self.rank or RANK)


def factors_nbytes(ne: Sequence[int], rank: int) -> int:
    """Return the bytes of a pair of F16 factors for a tensor of this shape."""
    return 2 * rank * (ne[0] + ne[1]) * ne[2]


def highest_rank(entry: Entry, most: int | None = None) -> int:
    """Return the highest rank, up to `most`, at which a pair is smaller than the tensor; 0 if there is none."""
    smaller = (entry.nbytes - 1) // factors_nbytes(entry.ne, 1)
    return min(smaller, entry.ne[0], entry.ne[1], *([] if most is None else [most]))


def why_whole(entry: Entry, model: Collection[str]) -> str:
    """Return why a tensor can have no low-rank pair, "" if it can.  model: names of all tensors of its model."""
    n_dims = sum(n > 1 for n in entry.ne)
    is_plain = entry.ne[3] == 1 and (entry.ne[2] == 1 or "_exps" in entry.name)
    if not (LINEAR.fullmatch(entry.name) and is_plain):
        return "a vector" if n_dims <= 1 else "not a weight that low rank is added to"
    if entry.name == EMBEDDING and HEAD not in model:
        return "the head is tied to it, and a pair would change the embedding alone"
    if not (entry.type.is_quantized or entry.type in _FLOATS):
        return f"type {entry.type.name}"
    return ""


def estimate(task: str, entries: Mapping[str, Entry], own: Collection[str], shared: Collection[str]) -> SizeReport:
    """Return what the tensors `own` of a model take, and would take with pairs of rank RANK, from their shapes alone.

    entries: all tensors of the model.  shared: names that other models, or the foundation, have too.
    """
    whole = low = 0
    for name in own:
        entry = entries[name]
        rank = min(RANK, *entry.ne[:2])
        whole += entry.nbytes
        if name in shared and not why_whole(entry, entries) and highest_rank(entry) >= rank:
            low += factors_nbytes(entry.ne, rank)
        else:
            low += entry.nbytes
    return SizeReport(task, whole, low, RANK, is_measured=False)


def check_same_model(task: str, source: Source, base: Source) -> None:
    """Raise SourceMismatchError, naming it, for a tensor or hyper-parameter that low rank cannot bridge."""
    hint = "low rank needs the same architecture, whole tensors (no --low-rank) do not"
    for name, (_, info) in base.tensors.items():
        if name not in source.tensors:
            raise SourceMismatchError(f"{source.path}: {task!r} lacks the foundation's tensor {name!r}; {hint}")
        ne = source.tensors[name][1].ne
        if ne != info.ne:
            shapes = f"{list(ne)} in {task!r}, {list(info.ne)} in the foundation"
            raise SourceMismatchError(f"{source.path}: the shape of {name!r} differs: {shapes}; {hint}")
    mine, theirs = source.first.metadata, base.first.metadata
    prefix = f"{theirs.get('general.architecture')}."
    for key in dict.fromkeys((*theirs, *mine)):
        if key.startswith(prefix) and not equal(mine.get(key), theirs.get(key)):
            values = f"{brief(mine.get(key))} in {task!r}, {brief(theirs.get(key))} in the foundation"
            raise SourceMismatchError(f"{source.path}: {key} differs: {values}; {hint}")


class _Difference(Sequence[np.ndarray]):
    """A tensor of one model minus that of another: F32 [ne1, ne0] for each of its experts, made when asked for."""

    def __init__(self, own: tuple[GGUFReader, TensorInfo], base: tuple[GGUFReader, TensorInfo]):
        self._own, self._base = own, base
        self._kept: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._own[1].ne[2]

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self._kept is None or self._kept[0] != i:
            self._kept = None  # before the next is made
            n_columns, n_rows = self._own[1].ne[:2]
            x = np.empty((n_rows, n_columns), np.float32)
            for rows, values in read_rows(*self._own, i):
                x[rows] = values
            for rows, values in read_rows(*self._base, i):
                x[rows] -= values
            self._kept = (i, x)
        return self._kept[1]


def read_rows(reader: GGUFReader, info: TensorInfo, i: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the rows of expert i of a tensor in blocks: which rows, and their values F32 [n_rows, ne0].

    Raises: FileFormatError for a number that is not finite.
    """
    row = info.type.row_size(info.ne[0])
    n = max(BLOCK_NBYTES // row, 1)
    start = info.offset + i * row * info.ne[1]
    for first in range(0, info.ne[1], n):
        last = min(first + n, info.ne[1])
        data = b"".join(bytes(block) for block in blocks(reader, start + first * row, (last - first) * row))
        values = dequantize(data, info.type, info.ne[0])
        if not np.isfinite(values).all():
            message = f"tensor {info.name!r} has elements that are NaN or infinite"
            raise FileFormatError(message, path=reader.path, offset=start, key=info.name)
        yield slice(first, last), values


class Extraction:
    """What one task differs in from the base: a file's tensors, in order, as pairs where these are smaller.

    spool: takes the factors until they are written; None to throw them away.
    """

    def __init__(self, task: str, source: Source, scan: Scan, base: Source, wanted: Wanted, spool: Spool | None):
        self.reports: list[LowRankReport] = []
        self.entries: list[Entry] = []  # of the file to be written
        self.errors: list[float] = []  # of its pairs
        self._task, self._source, self._scan, self._base, self._wanted = task, source, scan, base, wanted
        self._spool = spool
        self._places: dict[str, int] = {}  # factor's name -> its offset in the spool

    def run(self, own: Collection[str], tick: Callable[[int], None]) -> None:
        """Decide for each tensor of `own`, and make the factors.

        Raises: FileFormatError for weights that are not finite; SourceMismatchError if nothing differs.
        """
        for name, entry in self._scan.entries.items():
            if name in own:
                self._add(entry)
                tick(entry.nbytes)
        if not self.entries:
            raise SourceMismatchError(
                f"{self._source.path}: {self._task!r} does not differ from the foundation, so there is nothing to write"
            )

    def size(self) -> SizeReport:
        """Return what the file's tensors take."""
        whole = sum(report.whole_nbytes for report in self.reports)
        rank = max((report.rank for report in self.reports), default=0)
        return SizeReport(self._task, whole, sum(report.nbytes for report in self.reports), rank, is_measured=True)

    def where(self, name: str) -> tuple[int, int, str]:
        """Return where the bytes of one of the file's tensors are: descriptor, offset, and the file's name."""
        if name in self._places and self._spool is not None:
            return self._spool.fileno(), self._places[name], self._spool.path
        return self._source.where(name)

    def _add(self, entry: Entry) -> None:
        why, found = self._decide(entry)
        kind: Literal["low-rank", "whole", "equal"]
        if isinstance(found, Factors):
            kind, rank, error, nbytes = "low-rank", found.rank, found.error, factors_nbytes(entry.ne, found.rank)
            self._keep(entry, found)
        elif found == 0.0:
            kind, rank, error, nbytes = "equal", 0, 0.0, 0
        else:
            kind, rank, error, nbytes = "whole", 0, found or 0.0, entry.nbytes
            self.entries.append(entry)
        self.reports.append(LowRankReport(self._task, entry.name, kind, rank, error, nbytes, entry.nbytes, why))

    def _decide(self, entry: Entry) -> tuple[str, Factors | float | None]:
        """Return why, and the factors; 0.0 if no value differs; the best error, or None, if it is written whole."""
        name, wanted = entry.name, self._wanted
        why = why_whole(entry, self._scan.entries)
        if name not in self._base.tensors:
            why = "not in the foundation"
        if why:
            return why, None
        difference = _Difference(self._source.tensors[name], self._base.tensors[name])
        if not any(energy(x) for x in difference):
            return "the values are equal", 0.0
        most = highest_rank(entry, wanted.rank)
        if most < (1 if wanted.max_error is not None else min(wanted.rank or 1, *entry.ne[:2])):
            return "a pair would not be smaller", None
        found = fit(difference, most, wanted.alpha, wanted.max_error)
        if isinstance(found, float) and not np.isfinite(found):
            return "F16 cannot hold the factors", None
        if wanted.max_error is None:
            return "rank as asked", found
        return f"{'smallest rank' if isinstance(found, Factors) else 'no rank'} for error {wanted.max_error:g}", found

    def _keep(self, entry: Entry, found: Factors) -> None:
        """Put factors into the spool, oriented as llama.cpp wants them."""
        n_in, n_out, n_expert, _ = entry.ne
        sides = {A: (found.a, (n_in, found.rank)), B: (found.b, (found.rank, n_out))}
        if entry.name == EMBEDDING:  # rows of a are looked up by token
            sides = {A: (found.b, (found.rank, n_out)), B: (tuple(a.T for a in found.a), (found.rank, n_in))}
        for suffix, (matrices, ne) in sides.items():
            data = b"".join(np.ascontiguousarray(matrix).tobytes() for matrix in matrices)
            self.entries.append(Entry(entry.name + suffix, Type.F16, (*ne, n_expert, 1), hashlib.sha256(data).digest()))
            if self._spool is not None:
                self._places[entry.name + suffix] = self._spool.nbytes
                self._spool.write(data)
        self.errors.append(found.error)
