"""pyggml-adapt perplexity: how well each task's model predicts a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from rich.markup import escape

from pyggml_adapt.cli.console import tables
from pyggml_adapt.cli.options import add_host_options, open_host
from pyggml_adapt.cli.run import read_text

if TYPE_CHECKING:
    from pyggml_adapt.evals.perplexity import Perplexity
    from pyggml_adapt.host.host import Host


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "perplexity",
        parents=[common],
        help="say how well each task predicts a text",
        description="Compute the perplexity of a text under each task, as llama-perplexity does: lower is better.",
    )
    add_host_options(parser)
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="a task; repeatable (default: all that are loaded)"
    )
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="the text, - for standard input")
    parser.add_argument(
        "-c", "--ctx-size", type=int, default=512, metavar="N", help="tokens of each piece of the text (%(default)s)"
    )
    parser.add_argument("--chunks", type=int, default=-1, metavar="N", help="pieces to take, -1 for all (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table with the perplexity of each task, or a JSON object; what is known so far goes to stderr."""
    text = read_text(args.file, "the text")
    with open_host(args) as host:
        results = [_measure(args, host, task, text) for task in args.task or host.tasks]
    if args.json:
        print(json.dumps({"tasks": [dataclasses.asdict(result) for result in results]}))
        return 0
    from rich.table import Table

    table = Table("task", "perplexity", "+/-", "tokens", "pieces")
    for each in results:
        numbers = f"{each.value:.4f}", f"{each.error:.5f}", f"{each.n_tokens:,}", str(each.n_chunks)
        table.add_row(escape(each.task), *numbers)
    tables().print(table)
    return 0


def _measure(args: argparse.Namespace, host: Host, task: str, text: str) -> Perplexity:
    from pyggml_adapt.evals.perplexity import perplexity

    def show(done: int, total: int, value: float) -> None:
        print(f"\r{task}: {done} of {total} pieces, perplexity {value:.4f}", end="", file=sys.stderr, flush=True)

    is_shown = sys.stderr.isatty()
    max_chunks = None if args.chunks == -1 else args.chunks
    try:
        return perplexity(
            host, text, task=task, n_ctx=args.ctx_size, max_chunks=max_chunks, on_chunk=show if is_shown else None
        )
    finally:
        if is_shown:
            print(file=sys.stderr)
