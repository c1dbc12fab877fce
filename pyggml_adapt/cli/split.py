"""pyggml-adapt split: models in, a foundation and adaptors out."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pyggml_adapt.tools import SplitReport, TensorReport


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Split, and print what became of which tensor."""
    import json

    from pyggml_adapt.cli.console import progress_bar
    from pyggml_adapt.cli.options import named_paths
    from pyggml_adapt.tools import split

    models = named_paths(args.models)
    with progress_bar() as progress:
        report = split(
            models, args.out_dir, prefix=args.prefix, foundation=args.foundation, task_tensors=args.task_tensors,
            shared_tensors=args.shared_tensors, dry_run=args.dry_run, force=args.force, progress=progress,
        )  # fmt: skip
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        _show(report)
    return 0


def _show(report: SplitReport) -> None:
    from rich.filesize import decimal

    from pyggml_adapt.cli.console import tables

    console = tables()
    console.print(_tensor_table(report))
    console.print(_file_table(report))
    kept = report.foundation_file.nbytes + sum(file.nbytes for file in report.adaptor_files)
    percent = 100 * kept / report.source_nbytes
    console.print(
        f"Full models: {decimal(report.source_nbytes)} in all. Foundation and adaptors: {decimal(kept)}, "
        f"{percent:.1f} % of that.",
        soft_wrap=True,
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


def _groups(report: SplitReport) -> dict[tuple[str, str, tuple[str, ...]], list[TensorReport]]:
    """Return the tensors grouped by name without block number, reason and place; shared ones first."""
    groups: dict[tuple[str, str, tuple[str, ...]], list[TensorReport]] = {}
    for tensor in sorted(report.tensors, key=lambda t: not t.shared):
        name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
        groups.setdefault((name, tensor.detail, tensor.tasks), []).append(tensor)
    return groups


def _file_table(report: SplitReport) -> Table:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("task", Column("file", overflow="fold"), "tensors", "bytes")
    for file in (report.foundation_file, *report.adaptor_files):
        table.add_row(escape(file.task or "(all)"), escape(file.path), str(file.n_tensors), decimal(file.nbytes))
    return table
