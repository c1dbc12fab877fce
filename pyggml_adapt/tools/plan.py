"""Which tensors of several models are shared, which are a task's own, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyggml_adapt.errors import ParameterError, SourceMismatchError
from pyggml_adapt.tools.lowrank import LowRankReport, SizeReport
from pyggml_adapt.weights.identity import LOW_RANK, Entry

FOUNDATION = "the foundation"
Models = Mapping[str, Mapping[str, Entry]]  # task -> tensor's name -> tensor


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What becomes of one tensor.

    reason: "equal" if it is shared; else "bytes", "type", "shape", "missing" (it is in some of the models only) or
    "asked" (task_tensors or shared_tensors).  detail: the same in words.  tasks: whose adaptors hold it.
    nbytes: of its data, in the foundation or in all those adaptors together.
    """

    name: str
    shared: bool
    reason: str
    detail: str
    tasks: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileReport:
    """A file that split wrote, or would write.  nbytes: of the whole file.  task: "" for a foundation."""

    path: str
    n_tensors: int
    nbytes: int
    task: str = ""


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What split did.

    source_nbytes: of all models, an overlay's foundation included.  written_nbytes: of all files written, so without
    an overlay's foundation.
    hints: sentences on how more could be shared.
    sizes: per task, what its tensors take whole and as low-rank pairs.  low_rank: what became of each tensor of each
    task, if low-rank pairs were asked for.
    """

    foundation_file: FileReport
    adaptor_files: tuple[FileReport, ...]
    tensors: tuple[TensorReport, ...]
    hints: tuple[str, ...]
    source_nbytes: int
    written_nbytes: int
    layout: str
    dry_run: bool
    sizes: tuple[SizeReport, ...] = ()
    low_rank: tuple[LowRankReport, ...] = ()

    @property
    def foundation(self) -> str:
        """Return the foundation's path."""
        return self.foundation_file.path

    @property
    def adaptors(self) -> dict[str, str]:
        """Return the adaptors' paths by task."""
        return {file.task: file.path for file in self.adaptor_files}

    def to_json(self) -> dict[str, Any]:
        """Return the report as `split --json` prints it."""
        base = self.foundation_file
        return {
            "foundation": {"path": base.path, "n_tensors": base.n_tensors, "nbytes": base.nbytes},
            "adaptors": [
                {"task": file.task, "path": file.path, "n_tensors": file.n_tensors, "nbytes": file.nbytes}
                for file in self.adaptor_files
            ],
            "source_nbytes": self.source_nbytes,
            "written_nbytes": self.written_nbytes,
            "sizes": [asdict(size) for size in self.sizes],
            **({"low_rank": [asdict(tensor) for tensor in self.low_rank]} if self.layout == LOW_RANK else {}),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for every tensor.  shared: in the first model's order.  own: task -> names."""

    tensors: tuple[TensorReport, ...]
    shared: tuple[Entry, ...]
    own: Mapping[str, frozenset[str]]
    hints: tuple[str, ...]


def make_plan(
    models: Models, base: Mapping[str, Entry] | None, task_tensors: Sequence[str], shared_tensors: str | None
) -> Plan:
    """Decide which tensors are shared: by all models or, with a base, by each model and the base.

    Raises: ParameterError for a bad pattern; SourceMismatchError if shared_tensors asks for what is not equal.
    """
    rules = _Rules(task_tensors, shared_tensors)
    everything = models if base is None else {FOUNDATION: base, **models}
    names = list(dict.fromkeys(name for entries in everything.values() for name in entries))
    rules.check(names)
    own: dict[str, set[str]] = {task: set() for task in models}
    reports = []
    for name in names:
        holders = [task for task in models if name in models[task]]
        compared = {task: entries.get(name) for task, entries in everything.items()}
        if base is not None:  # each model is compared with the base alone
            holders = [task for task in holders if rules.is_asked(name) or models[task][name] != base.get(name)]
            compared = {FOUNDATION: base.get(name)} | {task: models[task][name] for task in holders}
        report = _judge(name, compared, holders, rules)
        for task in report.tasks:
            own[task].add(name)
        reports.append(report)
    first = next(iter(models.values()))
    kept = {report.name for report in reports if report.shared}
    return Plan(
        tensors=tuple(reports),
        shared=tuple(entry for name, entry in first.items() if name in kept) if base is None else (),
        own={task: frozenset(names) for task, names in own.items()},
        hints=(*_tied_head(everything), *(_cheaper_overlay(models, reports) if base is None else ())),
    )


class _Rules:
    """The patterns that a user gave."""

    def __init__(self, task_tensors: Sequence[str], shared_tensors: str | None):
        self.task = [_compile("task_tensors", pattern) for pattern in task_tensors]
        self.shared = None if shared_tensors is None else _compile("shared_tensors", shared_tensors)

    def check(self, names: Sequence[str]) -> None:
        """Raise ParameterError for patterns that contradict each other, or that fit no tensor."""
        for pattern in (*self.task, *([self.shared] if self.shared else [])):
            if not any(pattern.search(name) for name in names):
                raise ParameterError(f"the pattern {pattern.pattern!r} is found in no tensor's name")
        for name in names:
            if self.must_share(name) and any(pattern.search(name) for pattern in self.task):
                raise ParameterError(f"tensor {name!r} is asked for both as shared and as the tasks' own")

    def must_share(self, name: str) -> bool:
        return self.shared is not None and self.shared.search(name) is not None

    def is_asked(self, name: str) -> bool:
        """Return whether the tensor goes to the adaptors in any case."""
        if any(pattern.search(name) for pattern in self.task):
            return True
        return self.shared is not None and not self.must_share(name)


def _compile(what: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise ParameterError(f"{what}: {pattern!r} is not a regular expression: {exc}") from exc


def _judge(name: str, compared: Mapping[str, Entry | None], holders: Sequence[str], rules: _Rules) -> TensorReport:
    """Return the decision for one tensor.  holders: the tasks whose own it becomes unless it is shared."""
    reason, detail = _difference(compared)
    if reason != "equal" and rules.must_share(name):
        raise SourceMismatchError(f"tensor {name!r} cannot be shared as asked: {detail}")
    if reason == "equal" and rules.is_asked(name):
        reason, detail = "asked", "equal, but asked to be each task's own"
    shared = reason == "equal" or not holders
    if shared:
        return TensorReport(name, True, reason, detail, (), max(e.nbytes for e in compared.values() if e))
    nbytes = sum(entry.nbytes for task in holders if (entry := compared[task]))
    return TensorReport(name, False, reason, detail, tuple(holders), nbytes)


def _difference(compared: Mapping[str, Entry | None]) -> tuple[str, str]:
    """Return how the tensors of one name differ, as a reason and in words."""
    absent = [task for task, entry in compared.items() if entry is None]
    there = {task: entry for task, entry in compared.items() if entry is not None}
    if absent:
        return "missing", f"only in {', '.join(there)}" if there else "in none"
    types = {task: entry.type.name for task, entry in there.items()}
    if len(set(types.values())) > 1:
        return "type", "types differ: " + ", ".join(f"{name} in {task}" for task, name in types.items())
    shapes = {task: list(entry.ne) for task, entry in there.items()}
    if len({tuple(ne) for ne in shapes.values()}) > 1:
        return "shape", "shapes differ: " + ", ".join(f"{ne} in {task}" for task, ne in shapes.items())
    if len({entry.digest for entry in there.values()}) > 1:
        return "bytes", "the bytes differ"
    return "equal", "equal in all"


def _cheaper_overlay(models: Models, reports: Sequence[TensorReport]) -> tuple[str, ...]:
    """Return a sentence if one of the models as an overlay's foundation would make the files smaller."""
    now = sum(report.nbytes for report in reports)
    costs = {}
    for task, base in models.items():
        own = [e for entries in models.values() for name, e in entries.items() if base.get(name) != e]
        costs[task] = sum(entry.nbytes for entry in (*base.values(), *own))
    best = min(costs, key=costs.__getitem__)
    if costs[best] >= now:
        return ()
    return (
        f"with the model of {best!r} as an existing foundation (--foundation), the tensors of all files would take "
        f"{costs[best] / 1e6:.1f} MB instead of {now / 1e6:.1f} MB; llama.cpp cannot load adaptors of that kind",
    )


def _tied_head(models: Models) -> tuple[str, ...]:
    """Return a sentence if token_embd probably differs because a quantiser treats tied heads differently."""
    name = "token_embd.weight"
    types = {task: entries[name].type.name for task, entries in models.items() if name in entries}
    tied = [task for task, entries in models.items() if name in entries and "output.weight" not in entries]
    if len(set(types.values())) < 2 or not 0 < len(tied) < len(models):
        return ()
    found = ", ".join(f"{kind} in {task}" for task, kind in types.items())
    return (
        f"{name} has different types ({found}); the head is tied in {', '.join(tied)} only, and quantisers choose "
        "another type for it then: requantising with one type everywhere brings the sharing back",
    )
