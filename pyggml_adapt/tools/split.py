"""split: write the tensors that models share once, and for each model an adaptor with its own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from pyggml_adapt.errors import FileAccessError, ParameterError, SourceMismatchError, StrPath
from pyggml_adapt.files import AtomicFile, commit_all, refuse_overwrite
from pyggml_adapt.ggml.gguf import HEADER_NBYTES_MAX, GGUFReader, GGUFWriter
from pyggml_adapt.tools.layout import adaptor_writer, foundation_writer, low_rank_writer
from pyggml_adapt.tools.lowrank import Extraction, SizeReport, Wanted, check_same_model, estimate
from pyggml_adapt.tools.plan import FileReport, Plan, SplitReport, make_plan
from pyggml_adapt.tools.source import Progress, Scan, Source, check_same_kind, ticker
from pyggml_adapt.tools.spool import Spool
from pyggml_adapt.weights.identity import COMPLEMENT, LOW_RANK, OVERLAY, fingerprint, foundation_id

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def split(
    models: Mapping[str, StrPath],
    out_dir: StrPath,
    *,
    prefix: str = "model",
    foundation: StrPath | None = None,
    task_tensors: Sequence[str] = (),
    shared_tensors: str | None = None,
    low_rank: int | str | None = None,
    max_error: float | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> SplitReport:
    """Write <prefix>-foundation.gguf and <prefix>-adaptor-<task>.gguf into out_dir, and return what was done.

    models: task -> whole model, the first shard for a set.  prefix: what the files' names begin with.
    foundation: a whole model to use as it is (overlay layout); then only adaptors are written.
    task_tensors: regular expressions; tensors that one is found in go to the adaptors even where they are equal.
    shared_tensors: a regular expression; only tensors that it is found in are shared, and they must be equal.
    low_rank: a rank, or "auto": write low-rank adaptors of the foundation, with a pair of factors for each linear
    weight that differs, and whole tensors where a pair would not be smaller.  max_error: the most that may be left of
    a tensor's difference, norm over norm: each pair gets the smallest rank that reaches it, up to low_rank, and what
    does not reach it is written whole; 0.1 for "auto".
    dry_run: write nothing.  force: replace files that exist.  Memory stays flat; all files appear, or none.
    Raises: SourceMismatchError if the models do not belong together; ParameterError, OverwriteError, FileAccessError,
    FileFormatError.
    """
    _check_names(models, prefix, foundation)
    wanted = _wanted(low_rank, max_error, foundation, (*task_tensors, *([shared_tensors] if shared_tensors else [])))
    start = os.path.join(os.fsdecode(out_dir), prefix)
    paths = {task: f"{start}-adaptor-{task}.gguf" for task in models}
    base_path = f"{start}-foundation.gguf" if foundation is None else os.fsdecode(foundation)
    outputs = [*([base_path] if foundation is None else []), *paths.values()]
    with ExitStack() as stack:
        sources, base = _open(stack, models, foundation)
        readers = [reader for source in (*sources.values(), *([base] if base else [])) for reader in source.readers]
        check_outputs(outputs, readers, force or dry_run)
        job = SplitJob(sources, base, paths, base_path, prefix, wanted)
        job.plan(task_tensors, shared_tensors, progress)
        spool = None
        if wanted is not None and not dry_run:
            _make_directory(outputs[0])
            spool = stack.enter_context(Spool(outputs[0]))
        job.make_headers(spool, progress)
        if not dry_run:
            job.write(force, progress)
        return job.report(dry_run)


class SplitJob:
    """The state of one split: sources, what was found in them, and the headers of the files to be written."""

    def __init__(
        self,
        sources: dict[str, Source],
        base: Source | None,
        paths: dict[str, str],
        base_path: str,
        prefix: str,
        wanted: Wanted | None = None,
    ):
        self.sources, self.base, self.paths, self.base_path, self.prefix = sources, base, paths, base_path, prefix
        self.wanted = wanted
        self.scans: dict[str, Scan] = {}
        self.base_scan: Scan | None = None
        self.decided: Plan
        self.extractions: dict[str, Extraction] = {}
        self.writers: dict[str, GGUFWriter] = {}  # path -> header
        self.nbytes: dict[str, int] = {}  # path -> bytes of the whole file

    def plan(self, task_tensors: Sequence[str], shared_tensors: str | None, progress: Progress | None) -> None:
        """Read all models, and decide for each tensor."""
        models = self.sources if self.base is None else {"the foundation": self.base, **self.sources}
        check_same_kind(models)
        if self.wanted is not None and self.base is not None:
            for task, source in self.sources.items():
                check_same_model(task, source, self.base)
        self._scan(progress)
        entries = {task: scan.entries for task, scan in self.scans.items()}
        base_entries = self.base_scan.entries if self.base_scan else None
        self.decided = make_plan(entries, base_entries, task_tensors, shared_tensors)

    def make_headers(self, spool: Spool | None, progress: Progress | None) -> None:
        """Make the headers of the files and, for the low-rank layout, the factors.

        spool: takes the factors until they are written; None to throw them away.
        """
        if self.base is None or self.base_scan is None:
            self._complement()
        else:
            ident, mark = foundation_id(self.base_scan.entries.values()), fingerprint(self.base.first)
            if self.wanted is None:
                self._adaptors(OVERLAY, ident, mark)
            else:
                self._low_rank(self.base, self.wanted, ident, mark, spool, progress)
        for path, writer in self.writers.items():
            data = sum(n + -n % writer.alignment for n in writer.tensors.values())
            header = len(writer.header())
            if header > HEADER_NBYTES_MAX:  # our own reader would refuse the file
                raise SourceMismatchError(
                    f"{path}: its header would take {header} bytes, more than {HEADER_NBYTES_MAX}"
                )
            self.nbytes[path] = header + data

    def _complement(self) -> None:
        shared = self.decided.shared
        ident = foundation_id(shared)
        alignment = max(source.first.alignment for source in self.sources.values())
        first = next(iter(self.sources.values()))
        self.writers[self.base_path] = foundation_writer(first, shared, ident, alignment, f"{self.prefix} foundation")
        self._adaptors(COMPLEMENT, ident, "")

    def _adaptors(self, layout: str, ident: str, mark: str) -> None:
        for task, source in self.sources.items():
            self.writers[self.paths[task]] = adaptor_writer(
                source, self.scans[task], self.decided.own[task],
                task=task, layout=layout, ident=ident, fingerprint=mark,
            )  # fmt: skip

    def _low_rank(
        self, base: Source, wanted: Wanted, ident: str, mark: str, spool: Spool | None, progress: Progress | None
    ) -> None:
        own = self.decided.own
        total = sum(self.scans[task].entries[name].nbytes for task in own for name in own[task])
        tick = ticker(total, "extracting", progress)
        for task, source in self.sources.items():
            found = self.extractions[task] = Extraction(task, source, self.scans[task], base, wanted, spool)
            found.run(own[task], tick)
            self.writers[self.paths[task]] = low_rank_writer(
                source, base, found.entries, found.errors, wanted.alpha, task=task, ident=ident, fingerprint=mark
            )

    def _scan(self, progress: Progress | None) -> None:
        everything = [*self.sources.values(), *([self.base] if self.base else [])]
        tick = ticker(sum(source.nbytes for source in everything), "reading", progress)
        if self.base is not None:
            self.base_scan = self.base.scan(tick)
        for task, source in self.sources.items():
            self.scans[task] = source.scan(tick)

    def write(self, force: bool, progress: Progress | None) -> None:
        """Write all files, then give all of them their names."""
        if self.base is None and not self.decided.shared:
            raise SourceMismatchError("the models share no tensor, so there is nothing to put into a foundation")
        tick = ticker(sum(self.nbytes.values()), "writing", progress)
        _make_directory(next(iter(self.writers)))
        where = {self.base_path: next(iter(self.sources.values())).where}
        where |= {self.paths[task]: source.where for task, source in self.sources.items()}
        where |= {self.paths[task]: found.where for task, found in self.extractions.items()}
        with ExitStack() as stack:
            files = []
            for path, writer in self.writers.items():
                file = stack.enter_context(AtomicFile(path, overwrite=force))
                _write_tensors(file, writer, where[path], tick)
                files.append(file)
            for source in self.sources.values():
                source.check_unchanged()
            commit_all(files)

    def report(self, dry_run: bool) -> SplitReport:
        """Return what was, or would be, written."""
        adaptors = tuple(
            FileReport(path, len(self.writers[path].tensors), self.nbytes[path], task)
            for task, path in self.paths.items()
        )
        if self.base is not None:
            foundation = FileReport(self.base_path, len(self.base.tensors), self.base.nbytes)
        else:
            writer = self.writers[self.base_path]
            foundation = FileReport(self.base_path, len(writer.tensors), self.nbytes[self.base_path])
        return SplitReport(
            foundation_file=foundation,
            adaptor_files=adaptors,
            tensors=self.decided.tensors,
            hints=self.decided.hints,
            source_nbytes=self._source_nbytes(),
            written_nbytes=sum(self.nbytes.values()),
            layout=COMPLEMENT if self.base is None else OVERLAY if self.wanted is None else LOW_RANK,
            dry_run=dry_run,
            sizes=self._sizes(),
            low_rank=tuple(report for found in self.extractions.values() for report in found.reports),
        )

    def _sizes(self) -> tuple[SizeReport, ...]:
        """Return what each task's tensors take, whole and as low-rank pairs."""
        if self.extractions:
            return tuple(found.size() for found in self.extractions.values())
        linked = {tensor.name for tensor in self.decided.tensors if tensor.reason not in ("missing", "shape")}
        return tuple(
            estimate(task, self.scans[task].entries, names, linked) for task, names in self.decided.own.items()
        )

    def _source_nbytes(self) -> int:
        """Return the bytes of all models; an overlay's foundation counts too, unless it is also given as a task."""
        nbytes = sum(source.nbytes for source in self.sources.values())
        if self.base is None:
            return nbytes
        given = any(os.path.samefile(self.base.path, source.path) for source in self.sources.values())
        return nbytes if given else nbytes + self.base.nbytes


def _write_tensors(
    file: AtomicFile, writer: GGUFWriter, where: Callable[[str], tuple[int, int, str]], tick: Callable[[int], None]
) -> None:
    """Write a file; where: gives for each tensor the descriptor, offset and name of the file that has its bytes."""
    header = writer.header()
    file.write(header)
    tick(len(header))
    for name, nbytes in writer.tensors.items():
        fd, offset, path = where(name)
        file.copy(fd, offset, nbytes, path)
        file.write(bytes(-nbytes % writer.alignment))
        tick(nbytes + -nbytes % writer.alignment)


def _open(
    stack: ExitStack, models: Mapping[str, StrPath], foundation: StrPath | None
) -> tuple[dict[str, Source], Source | None]:
    """Return the models, and the one that is to be the foundation, all of which the stack closes."""
    sources = {task: stack.enter_context(Source(path)) for task, path in models.items()}
    base = stack.enter_context(Source(foundation)) if foundation is not None else None
    if base is not None and base.is_sharded:
        raise ParameterError(f"{base.path}: a foundation must be one file; llama.cpp's gguf-split --merge joins shards")
    return sources, base


def _make_directory(path: str) -> None:
    """Make the directory of a file to be written."""
    directory = os.path.dirname(path) or "."
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as exc:
        raise FileAccessError.of(directory, exc) from exc


def _wanted(
    low_rank: int | str | None, max_error: float | None, foundation: StrPath | None, patterns: Sequence[str]
) -> Wanted | None:
    """Return what is asked of low rank, None if nothing is.

    Raises: ParameterError for options that do not go together.
    """
    if low_rank is None:
        if max_error is not None:
            raise ParameterError("max_error (--max-error) is of low-rank pairs, so it needs low_rank (--low-rank)")
        return None
    if foundation is None:
        raise ParameterError(
            "low_rank (--low-rank) needs a foundation (--foundation) that is a whole model: factors are taken from the "
            "difference to it, and the foundation that split makes holds only what is equal"
        )
    if patterns:
        raise ParameterError(
            f"the pattern {patterns[0]!r} cannot be followed: a low-rank adaptor holds just what differs"
        )
    return Wanted.of(low_rank, max_error)


def _check_names(models: Mapping[str, StrPath], prefix: str, foundation: StrPath | None) -> None:
    if not models:
        raise ParameterError("no model was given to split")
    if len(models) < 2 and foundation is None:
        raise ParameterError("split needs two models at least, or a foundation to compare one with")
    for what, name in (("prefix", prefix), *(("task", task) for task in models)):
        if not _NAME.fullmatch(name):
            raise ParameterError(
                f"{what} {name!r}: it becomes part of a file name, so use letters, digits and _ . + - only"
            )


def check_outputs(outputs: Sequence[str], readers: Sequence[GGUFReader], force: bool) -> None:
    """Raise if an output is one of the inputs, or exists and not `force`."""
    inputs = {(info.st_dev, info.st_ino): r.path for r in readers for info in [os.fstat(r.fileno())]}
    for path in outputs:
        try:
            info = os.stat(path)
        except OSError:
            pass  # it does not exist, or writing it will say why it cannot be reached
        else:
            if (info.st_dev, info.st_ino) in inputs:
                raise ParameterError(f"{path}: the output would replace the input {inputs[info.st_dev, info.st_ino]}")
        if not force:
            refuse_overwrite(path)
