"""Run four fine-tuned models from one foundation, beside the same four as separate files.

Usage: python examples/tiny/demo.py [--type f16|q8_0] [--words N]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import tasks
from rich.console import Console
from rich.table import Table

import pyggml_adapt as pga

HERE = Path(__file__).parent
KIB = 1024
SHOWN = ("garden", "adaptor", "llama")


def answer(host, task, word):
    """Return what a task writes after the prompt for `word`, greedily."""
    return host.generate(tasks.prompt(word), task=task, max_tokens=2 * tasks.MAX_LETTERS, temperature=0.0)


def right(host, model, task, words):
    """Return the share of `words` that the task `model` answers as `task` would."""
    return sum(tasks.is_right(task, word, answer(host, model, word)) for word in words) / len(words)


def swap_us(host, rounds=50):
    """Return the median microseconds of a swap between loaded tasks, with its graphs kept."""
    for task in host.tasks:
        answer(host, task, SHOWN[0])
    return statistics.median(host.activate(task).ms * 1e3 for _ in range(rounds) for task in host.tasks)


def open_separately(files):
    """Return one host for each full model, and the median milliseconds to load one and be ready."""
    hosts, ms = {}, []
    for task, path in files.items():
        start = time.perf_counter()
        hosts[task] = pga.Host(path, n_threads=1)
        ms.append((time.perf_counter() - start) * 1e3)
        answer(hosts[task], "base", SHOWN[0])
    return hosts, statistics.median(ms)


def show_answers(console, host, words):
    """Print what every task makes of the same prompts, and how often it is right on unseen words."""
    table = Table(title=f"one foundation, four tasks; every prompt is {tasks.prompt('WORD')}")
    table.add_column("task")
    for word in SHOWN:
        table.add_column(word)
    table.add_column(f"right on {len(words)} unseen words", justify="right")
    table.add_column("by another task's rule", justify="right")
    for task in host.tasks:
        others = max(right(host, task, other, words) for other in host.tasks if other != task)
        own = right(host, task, task, words)
        table.add_row(task, *(answer(host, task, word) for word in SHOWN), f"{own:.1%}", f"{others:.1%}")
    console.print(table)


def show_costs(console, host, files, report):
    """Print bytes on disk and in memory, and what changing the task costs, beside separate full models."""
    hosts, load_ms = open_separately(files)
    memory = host.memory()
    shared = memory.foundation.resident + sum(pages.resident for pages in memory.adaptors.values())
    separate = sum(each.memory().foundation.resident for each in hosts.values())
    table = Table(title="beside separate full models")
    for column in ("", "one foundation", "separate", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    disk = Path(report.foundation).stat().st_size + sum(Path(path).stat().st_size for path in report.adaptors.values())
    full = sum(Path(path).stat().st_size for path in files.values())
    swap = swap_us(host)
    table.add_row("files", f"{disk / KIB:.0f} KiB", f"{full / KIB:.0f} KiB", f"{disk / full:.2f}")
    table.add_row(
        "weights resident", f"{shared / KIB:.0f} KiB", f"{separate / KIB:.0f} KiB", f"{shared / separate:.2f}"
    )
    table.add_row("change the task", f"{swap:.0f} us", f"{load_ms * 1e3:.0f} us (load)", f"{swap / load_ms / 1e3:.4f}")
    console.print(table)
    for each in hosts.values():
        each.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--type", choices=("f16", "q8_0"), default="q8_0")
    parser.add_argument("--words", type=int, default=100)
    args = parser.parse_args()
    console = Console(width=max(Console().width, 110))
    files = {task: HERE / f"tiny-{task}-{args.type}.gguf" for task in tasks.TASKS}
    with tempfile.TemporaryDirectory() as out:
        report = pga.split(files, out, prefix="tiny", foundation=files["base"])
        with pga.Host(report.foundation, report.adaptors, n_threads=1) as host:
            show_answers(console, host, tasks.unseen_words(args.words, seed=1))
            show_costs(console, host, files, report)


if __name__ == "__main__":
    main()
