"""pyggml-adapt split: models in, a foundation and adaptors out."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pyggml_adapt.tools import LowRankReport, SplitReport, TensorReport


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `split`."""
    parser = subparsers.add_parser(
        "split",
        parents=[common],
        help="split models into what they share and what each has of its own",
        description="Write PREFIX-foundation.gguf, with the tensors that are equal in all models, and for each model "
        "PREFIX-adaptor-NAME.gguf with the rest. The pair merges back to the very same bytes.",
    )
    parser.add_argument("models", nargs="+", metavar="NAME=PATH", help="a task's name and its whole model")
    parser.add_argument("-o", "--out-dir", required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--prefix", default="model", help="what the files' names begin with (default: model)")
    parser.add_argument("--foundation", metavar="PATH", help="use this whole model as it is, and write adaptors only")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--task-tensors", action="append", default=[], metavar="REGEX",
                        help="tensors that go to the adaptors even where they are equal; may be repeated")  # fmt: skip
    parser.add_argument("--shared-tensors", metavar="REGEX", help="share only these tensors, which must be equal")
    parser.add_argument("--low-rank", type=_rank, metavar="R|auto",
                        help="write low-rank adaptors of the --foundation: pairs of rank R, or as low as --max-error "
                        "lets them be")  # fmt: skip
    parser.add_argument("--max-error", type=float, metavar="E",
                        help="the most that a pair may leave of a tensor's difference, norm over norm; what needs more "
                        "than rank R is written whole (default: no limit; with auto 0.1)")  # fmt: skip
    parser.add_argument("--logits-text", metavar="FILE",
                        help="a text to measure low-rank logits on (default: pseudo-random tokens)")  # fmt: skip
    parser.set_defaults(run=run)


def _rank(text: str) -> int | str:
    if text != "auto" and not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank nor auto")
    return text if text == "auto" else int(text)


def run(args: argparse.Namespace) -> int:
    """Split, and print what became of which tensor."""
    import json

    from pyggml_adapt.cli.console import progress_bar
    from pyggml_adapt.cli.options import named_paths
    from pyggml_adapt.errors import ParameterError
    from pyggml_adapt.tools import split

    models = named_paths(args.models)
    if args.logits_text is not None and (args.low_rank is None or args.dry_run):
        raise ParameterError("--logits-text: logits are measured of low-rank adaptors only, when they are written")
    text = None if args.logits_text is None else _read(args.logits_text)
    with progress_bar() as progress:
        report = split(
            models, args.out_dir, prefix=args.prefix, foundation=args.foundation, task_tensors=args.task_tensors,
            shared_tensors=args.shared_tensors, low_rank=args.low_rank, max_error=args.max_error,
            dry_run=args.dry_run, force=args.force, progress=progress,
        )  # fmt: skip
    measured = [] if args.low_rank is None or args.dry_run else _logits(models, report, text)
    if args.json:
        print(json.dumps(report.to_json() | ({"logits": measured} if measured else {})))
    else:
        _show(report)
        _show_logits(measured, args.logits_text)
    return 0


def _read(path: str) -> str:
    from pyggml_adapt.errors import FileAccessError, ParameterError

    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as exc:
        raise FileAccessError.of(path, exc) from exc
    except UnicodeDecodeError as exc:
        raise ParameterError(f"{path}: the text is not UTF-8 at byte {exc.start}") from exc


def _logits(models: dict[str, str], report: SplitReport, text: str | None) -> list[dict[str, Any]]:
    """Return for each task the error of its logits, or why it cannot be measured."""
    from dataclasses import asdict

    from pyggml_adapt.errors import Error
    from pyggml_adapt.evals.compare import logits_error, sample_ids

    found = []
    for task, path in report.adaptors.items():
        try:
            error = logits_error(models[task], report.foundation, path, sample_ids(models[task], text))
        except Error as exc:  # the files are sound, but not every model that can be split can be run
            found.append({"task": task, "why_not": str(exc)})
        else:
            found.append({"task": task, **asdict(error)})
    return found


def _show(report: SplitReport) -> None:
    from rich.filesize import decimal

    from pyggml_adapt.cli.console import tables

    console = tables()
    console.print(_tensor_table(report))
    if report.low_rank:
        console.print(_low_rank_table(report))
    console.print(_file_table(report))
    kept = report.foundation_file.nbytes + sum(file.nbytes for file in report.adaptor_files)
    percent = 100 * kept / report.source_nbytes
    console.print(
        f"Full models: {decimal(report.source_nbytes)} in all. Foundation and adaptors: {decimal(kept)}, "
        f"{percent:.1f} % of that.",
        soft_wrap=True,
    )
    for size in report.sizes:
        how = "by its shapes, error not measured (see --low-rank)" if not size.is_measured else "with the errors above"
        pairs = f"low-rank pairs of rank {size.rank} at most" if size.rank else "low rank, with no pair worth it"
        console.print(
            f"{size.task}: its own tensors take {decimal(size.whole_nbytes)} whole, {decimal(size.low_rank_nbytes)} as "
            f"{pairs}: {how}.",
            soft_wrap=True,
            markup=False,
        )
    for hint in report.hints:
        console.print(f"Hint: {hint}.", soft_wrap=True, markup=False)
    if report.dry_run:
        console.print("Nothing was written (--dry-run).")


def _tensor_table(report: SplitReport) -> Table:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("tensors", overflow="fold"), "count", "bytes", "where", "why")
    for pattern, group in _groups(report).items():
        name, why, tasks = pattern
        where = "adaptors of " + ", ".join(tasks) if tasks else "foundation"
        nbytes = decimal(sum(tensor.nbytes for tensor in group))
        table.add_row(escape(name), str(len(group)), nbytes, escape(where), escape(why))
    return table


def _low_rank_table(report: SplitReport) -> Table:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("task", Column("tensors", overflow="fold"), "kind", "count", "rank", "error", "bytes", "whole", "why")
    groups: dict[tuple[str, str, str, str], list[LowRankReport]] = {}
    for tensor in report.low_rank:
        groups.setdefault((tensor.task, _pattern(tensor.name), tensor.kind, tensor.why), []).append(tensor)
    for (task, name, kind, why), group in groups.items():
        ranks, errors = {tensor.rank for tensor in group} - {0}, [tensor.error for tensor in group]
        table.add_row(
            escape(task), escape(name), kind, str(len(group)),
            "-".join(str(rank) for rank in sorted({min(ranks), max(ranks)})) if ranks else "",
            f"{max(errors):.2g}" if any(errors) else "",
            decimal(sum(tensor.nbytes for tensor in group)), decimal(sum(tensor.whole_nbytes for tensor in group)),
            escape(why),
        )  # fmt: skip
    return table


def _show_logits(measured: list[dict[str, Any]], source: str | None) -> None:
    for found in measured:
        if "why_not" in found:
            print(f"{found['task']}: the error of the logits cannot be measured: {found['why_not']}")
            continue
        print(
            f"{found['task']}: logits against the whole model's, on {found['n_tokens']} "
            f"{'pseudo-random tokens' if source is None else f'tokens of {source}'}: nmse {found['nmse']:.2g}, largest "
            f"difference {found['max_abs']:.2g}, KL divergence {found['kl_mean']:.2g} nats, same top token for "
            f"{100 * found['top1_agreement']:.1f} %"
        )


def _pattern(name: str) -> str:
    """Return a tensor's name without the number of its block."""
    return re.sub(r"^blk\.\d+\.", "blk.*.", name)


def _groups(report: SplitReport) -> dict[tuple[str, str, tuple[str, ...]], list[TensorReport]]:
    """Return the tensors grouped by name without block number, reason and place; shared ones first."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[TensorReport]] = {}
    for tensor in sorted(report.tensors, key=lambda t: not t.shared):
        groups.setdefault((_pattern(tensor.name), tensor.detail, tensor.tasks), []).append(tensor)
    return groups


def _file_table(report: SplitReport) -> Table:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("task", Column("file", overflow="fold"), "tensors", "bytes")
    for file in (report.foundation_file, *report.adaptor_files):
        table.add_row(escape(file.task or "(all)"), escape(file.path), str(file.n_tensors), decimal(file.nbytes))
    return table
