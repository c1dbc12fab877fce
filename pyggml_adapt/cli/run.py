"""pyggml-adapt run: generate text with one task."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING

from rich.markup import escape

from pyggml_adapt.cli.options import (
    add_host_options,
    add_sampling_options,
    decode,
    named_task,
    open_host,
    read_file,
    sampling,
)
from pyggml_adapt.errors import FileAccessError, ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.host.memory import Memory


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "run",
        parents=[common],
        help="generate text with one task",
        description="Print the text that follows a prompt, as it is generated.",
    )
    add_host_options(parser)
    parser.add_argument("--task", metavar="NAME", help="the task; needed if several are loaded")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("-f", "--file", metavar="FILE", help="a file with the prompt, - for standard input")
    parser.add_argument(
        "-n",
        "--predict",
        type=int,
        default=128,
        metavar="N",
        help="most tokens to generate, -1 for as many as fit (%(default)s)",
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=0,
        metavar="N",
        help="size of the context in tokens (default: what the prompt and -n need)",
    )
    parser.add_argument(
        "-r",
        "--reverse-prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="stop before this text is printed; repeatable",
    )
    parser.add_argument("--memory", action="store_true", help="say at the end what memory is used, as measured")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the prompt's continuation as it is generated, or a JSON object at the end."""
    prompt = read_prompt(args)
    start = time.perf_counter()
    with open_host(args) as host:
        load_ms = (time.perf_counter() - start) * 1e3
        swap = host.activate(named_task(args, host))
        ids = host.tokenize(prompt, parse_special=True)
        max_tokens = None if args.predict == -1 else args.predict
        n_ctx = args.ctx_size or (None if max_tokens is None else len(ids) + max(max_tokens, 1))
        with host.session(swap.task, n_ctx=n_ctx) as session:
            generation = session.generate(ids, max_tokens=max_tokens, stop=args.reverse_prompt, **sampling(args))
            text = ""
            for piece in generation:
                text += piece
                if not args.json:
                    print(piece, end="", flush=True)
            memory = host.memory() if args.memory else None
        if not args.json:
            print(flush=True)
            if memory:
                show_memory(memory)
            return 0
        timings = generation.timings
        print(
            json.dumps(
                {
                    "task": swap.task,
                    "prompt_tokens": ids,
                    "tokens": generation.tokens,
                    "text": text,
                    "finish_reason": generation.finish_reason,
                    "timings": {
                        "prompt_n": timings.prompt_n,
                        "prompt_ms": timings.prompt_ms,
                        "predicted_n": timings.predicted_n,
                        "predicted_ms": timings.predicted_ms,
                        "load_ms": load_ms,
                        "swap_ms": swap.ms,
                    },
                    **({"memory": dataclasses.asdict(memory)} if memory else {}),
                }
            )
        )
    return 0


def show_memory(memory: Memory) -> None:
    """Print a table of measured memory on stderr."""
    from rich.table import Table

    from pyggml_adapt.cli.console import tables

    table = Table("bytes", "mapped", "resident", "shared", "private", "share (PSS)")
    rows = {"foundation": memory.foundation}
    rows |= {f"adaptor {name}": pages for name, pages in memory.adaptors.items()}
    for name, pages in (rows | {"process": memory.process}).items():
        numbers = (pages.mapped, pages.resident, pages.shared, pages.private, pages.pss)
        table.add_row(escape(name), *(f"{number:,}" for number in numbers))
    console = tables(stderr=True)
    console.print(table)
    console.print(f"KV caches: {memory.kv:,} bytes. Compute: {memory.compute:,} bytes.")


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt from -p, from the file of -f, or from standard input if that is not a terminal.

    Raises: ParameterError without any, or if it is not UTF-8; FileAccessError.
    """
    if args.prompt is not None:
        if not args.prompt.isprintable() and any("\ud800" <= char <= "\udfff" for char in args.prompt):
            raise ParameterError("-p: the prompt is not UTF-8")
        return args.prompt
    if args.file is None and sys.stdin.isatty():
        raise ParameterError("there is no prompt: use -p TEXT or -f FILE")
    return read_text(args.file or "-", "the prompt")


def read_text(name: str, what: str) -> str:
    """Return the text of a file, or for `-` of standard input.  Raises: as read_file()."""
    if name != "-":
        return read_file(name, what)
    try:
        return decode(sys.stdin.buffer.read(), name, what)
    except OSError as error:
        raise FileAccessError.of(name, error) from error
