"""pyggml-adapt bake: a low-rank adaptor in, the same task as whole tensors out."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyggml_adapt.tools import BakedTensor, BakeReport


def add_parser(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """Add the sub-command `bake`."""
    parser = subparsers.add_parser(
        "bake",
        parents=[common],
        help="turn a low-rank adaptor into one of whole tensors",
        description="Add a low-rank adaptor to the weights of its foundation, and write an overlay adaptor with the "
        "whole tensors that come out.",
    )
    parser.add_argument("foundation", metavar="FOUNDATION", help="the complete model that the adaptor is for")
    parser.add_argument("adaptor", metavar="ADAPTOR", help="a low-rank adaptor, a LoRA GGUF, or a directory of PEFT's")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the file to write")
    parser.add_argument("--type", default="keep", metavar="TYPE",
                        help="type of the tensors that change: F32, F16, Q8_0, ... (default: keep)")  # fmt: skip
    parser.add_argument("--task", metavar="NAME", help="the task's name (default: the adaptor's)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="what the pairs count with (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Bake, and print what became of which tensor."""
    import json
    from dataclasses import asdict

    from pyggml_adapt.cli.console import progress_bar
    from pyggml_adapt.tools import bake

    with progress_bar() as progress:
        report = bake(
            args.foundation, args.adaptor, args.output,
            type=args.type, task=args.task, scale=args.scale, force=args.force, progress=progress,
        )  # fmt: skip
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        _show(report)
    return 0


def _show(report: BakeReport) -> None:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Column, Table

    from pyggml_adapt.cli.console import tables

    table = Table(Column("tensors", overflow="fold"), "what", "type", "count", "bytes", "requantisation error")
    groups: dict[tuple[str, str, str], list[BakedTensor]] = {}
    for tensor in report.tensors:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
        groups.setdefault((name, tensor.kind, tensor.type), []).append(tensor)
    for (name, kind, type), group in groups.items():
        worst = max(tensor.error for tensor in group)
        nbytes = decimal(sum(tensor.nbytes for tensor in group))
        table.add_row(escape(name), kind, type, str(len(group)), nbytes, f"{worst:.2g}" if kind == "merged" else "")
    console = tables()
    console.print(table)
    console.print(
        f"{report.path}: task {report.task}, {report.n_tensors} tensors, {decimal(report.nbytes)}",
        soft_wrap=True,
        markup=False,
    )
