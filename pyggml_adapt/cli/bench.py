"""pyggml-adapt bench: speed of every task, cost of a swap, and memory."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

from pyggml_adapt.cli.options import add_host_options, open_host
from pyggml_adapt.errors import ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.host.host import Host

MIB = 2**20


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="measure speed, swaps and memory",
        description="Measure prompt and generation speed of every task, the cost of a swap, and memory.",
    )
    add_host_options(parser)
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="prompt tokens (%(default)s)")
    parser.add_argument("-n", "--n-gen", type=int, default=64, metavar="N", help="generated tokens (%(default)s)")
    parser.add_argument("-r", "--repetitions", type=int, default=3, metavar="N", help="medians of N (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a table with one row per task, or a JSON object."""
    if min(args.n_prompt, args.n_gen, args.repetitions) < 1:
        raise ParameterError("bench: -p, -n and -r must be at least 1")
    with open_host(args) as host:
        host.activate(host.active)  # raises if there is no task at all
        rounds = [
            {task: measure(host, task, args.n_prompt, args.n_gen) for task in host.tasks}
            for _ in range(args.repetitions)
        ]
        tasks = {
            task: {key: statistics.median(each[task][key] for each in rounds) for key in rounds[0][task]}
            for task in host.tasks
        }
        memory = host.memory()
    result = {
        "n_prompt": args.n_prompt,
        "n_gen": args.n_gen,
        "tasks": tasks,
        "foundation_resident": memory.foundation.resident,
        "adaptors_resident": {task: pages.resident for task, pages in memory.adaptors.items()},
        "process_private": memory.process.private,
        "process_pss": memory.process.pss,
    }
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def measure(host: Host, task: str, n_prompt: int, n_gen: int) -> dict[str, float]:
    """Return prompt and generated tokens per second of a task, and the microseconds to swap to it."""
    swap = host.activate(task)
    with host.session(task, n_ctx=n_prompt + n_gen) as session:
        ids = np.random.default_rng(0).integers(0, session.n_vocab, n_prompt)
        start = time.perf_counter()
        token = int(np.argmax(session.eval(ids)))
        middle = time.perf_counter()
        for _ in range(n_gen):
            token = int(np.argmax(session.eval([token])))
        end = time.perf_counter()
    return {
        "prompt_per_second": n_prompt / (middle - start),
        "gen_per_second": n_gen / (end - middle),
        "swap_us": swap.ms * 1e3,
    }


def show(result: dict) -> None:
    """Print the result as tables."""
    from rich.table import Table

    from pyggml_adapt.cli.console import tables

    table = Table(title=f"{result['n_prompt']} prompt tokens, {result['n_gen']} generated, medians")
    for column in ("task", "prompt tok/s", "generated tok/s", "swap us", "resident MiB"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, row in result["tasks"].items():
        resident = result["adaptors_resident"].get(task)
        table.add_row(
            task,
            f"{row['prompt_per_second']:.1f}",
            f"{row['gen_per_second']:.1f}",
            f"{row['swap_us']:.1f}",
            "-" if resident is None else f"{resident / MIB:.1f}",
        )
    console = tables()
    console.print(table)
    console.print(
        f"foundation {result['foundation_resident'] / MIB:.1f} MiB resident; process "
        f"{result['process_private'] / MIB:.1f} MiB private, {result['process_pss'] / MIB:.1f} MiB PSS"
    )
