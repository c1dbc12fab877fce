"""pyggml-adapt inspect: say what GGUF files are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyggml_adapt.tools import FileInfo


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        parents=[common],
        help="say what GGUF files are",
        description="Tell foundations, adaptors and models apart, from their headers.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="GGUF files of any kind")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table of the files."""
    import json

    from pyggml_adapt.tools import inspect

    found = inspect(*args.files)
    if args.json:
        print(json.dumps({"files": [info.to_json() for info in found]}))
        return 0
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    from pyggml_adapt.cli.console import tables

    table = Table(
        Column("file", overflow="fold", min_width=32),
        "kind",
        "task",
        "architecture",
        "tensors",
        "bytes",
        "types",
        "foundation id",
    )
    for info in found:
        kind = f"{info.kind} ({info.layout})" if info.layout else info.kind
        types = " ".join(f"{name}:{n}" for name, n in info.types.items())
        texts = (info.path, kind, info.task, info.architecture, str(info.n_tensors), decimal(info.nbytes), types)
        table.add_row(*map(escape, texts), info.foundation_id[:12])
    console = tables()
    console.print(table)
    for info in found:
        if info.n_pairs or info.n_whole:
            console.print(f"{info.path}: {_low_rank(info)}", soft_wrap=True, markup=False)
    return 0


def _low_rank(info: FileInfo) -> str:
    ranks = ", ".join(f"rank {rank}: {n}" for rank, n in info.ranks.items())
    absent = "alphas that differ" if info.kind == "peft" else "no alpha"
    alpha = absent if info.alpha is None else f"alpha {info.alpha:g}"
    error = "" if info.max_error is None else f", largest error of a pair {info.max_error:.2g}"
    return (
        f"{info.n_pairs} low-rank pairs{f' ({ranks})' if ranks else ''}, {info.n_whole} whole tensors, {alpha}{error}"
    )
