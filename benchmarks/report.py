"""Tables and plots of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import report_adaptors
import report_ggml
import report_text
from markdown_table import table

Results = dict[str, Any]

OURS, MMAP, DEFAULT = "pyggml_adapt", "llama.cpp, mmap", "llama.cpp, default"
ARCHITECTURE_SPEEDS = ("decode after 128", "decode after 700", "prefill")
MIB = 2**20
LABELS = {
    "pyggml_adapt": OURS,
    "mmap": f"{MMAP}, whole models",
    "default": f"{DEFAULT}, whole models",
    "shards": f"{MMAP}, our split files",
}


def ratios(case: dict[str, Any], what: str, other: str) -> tuple[float, float, float]:
    """Return our median over another engine's, and the lowest and highest ratio of one round."""
    ours, theirs = case[what][OURS], case[what][other]
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return median(ours) / median(theirs), min(each), max(each)


def _speed_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["speed"].items():
        for what in ("decode", "prefill"):
            row = [f"{name}, {what}", *(f"{median(case[what][engine]):.1f}" for engine in (OURS, MMAP, DEFAULT))]
            for other in (MMAP, DEFAULT):
                ratio, low, high = ratios(case, what, other)
                row.append(f"**{ratio:.2f}** ({low:.2f} to {high:.2f})")
            yield row


def speed(results: Results) -> str:
    """Return the section on tokens/s."""
    header = ["tokens/s", "ours", "llama.cpp mmap", "llama.cpp default", "ours / mmap", "ours / default"]
    equal = all(case["equal_logits"][MMAP] for case in results["speed"].values())
    return "\n".join(
        [
            "## Speed",
            "",
            "Decode: 64 tokens, one at a time, after a prompt of 128. Prefill: one prompt of 512 tokens. The "
            "engines take turns in one process; medians, and in brackets the lowest and highest ratio of one "
            "round. `mmap` is `--load-mode mmap --repack 0`, the same flags as ours; `default` repacks weights "
            "into private memory.",
            "",
            table(header, _speed_rows(results)),
            "",
            f"Logits of ours and of llama.cpp with the same flags are {'equal' if equal else '**not** equal'} bit "
            "for bit in every case.",
            "",
        ]
    )


def _architecture_ratio(runs: list[dict[str, Any]], what: str) -> tuple[float, float, float]:
    """Return the median, lowest and highest of the processes' ratios."""
    each = [ratios(run, what, MMAP)[0] for run in runs]
    return median(each), min(each), max(each)


def _architecture_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, runs in results["architectures"].items():
        for what in ARCHITECTURE_SPEEDS:
            rates = (median(median(run[what][engine]) for run in runs) for engine in (OURS, MMAP))
            ratio, low, high = _architecture_ratio(runs, what)
            yield [
                f"{name}, {what}",
                *(f"{rate:.1f}" for rate in rates),
                f"**{ratio:.2f}** ({low:.2f} to {high:.2f})",
            ]


def architectures(results: Results) -> str:
    """Return the section on tokens/s of other architectures than llama."""
    equal = all(run["equal_logits"] for runs in results["architectures"].values() for run in runs)
    return "\n".join(
        [
            "## Architectures",
            "",
            "0.1 B parameters each; qwen3moe has 0.3 B, of which a token uses 0.1 B (8 of 32 experts a layer). gemma3 "
            "keeps 512 tokens in five of six layers, ours and llama.cpp's (`swa_full` off); phi3 has LongRoPE factors. "
            "Single tokens after a prompt of 128 and of 700, in turns of 16; prompts of 512. Flags are the same, "
            "weights mapped. Processes differ by some per cent, so there are several: the median of "
            "their ratios, and in brackets the lowest and the highest.",
            "",
            table(["tokens/s", "ours", "llama.cpp mmap", "ours / mmap"], _architecture_rows(results)),
            "",
            f"Logits are {'equal' if equal else '**not** equal'} bit for bit in every case.",
            "",
        ]
    )


def _overhead_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["overhead"].items():
        yield [
            name,
            *(f"{case[key]:.0f}" for key in ("ours_us", "inside_us", "outside_us", "llama_us")),
            f"{case['ours_us'] / case['llama_us']:.2f}",
        ]


def overhead(results: Results) -> str:
    """Return the section on what a token costs outside ggml."""
    return "\n".join(
        [
            "## A token outside ggml",
            "",
            "`session.eval([token])` in steady state, and the part of it inside `ggml_backend_graph_compute`. "
            "`thin` has 22 layers of 64 dimensions, so that next to nothing is computed. llama.cpp: "
            "`llama_decode` and the logits.",
            "",
            table(
                ["microseconds", "ours, whole", "inside ggml", "outside", "llama.cpp, whole", "ours / llama.cpp"],
                _overhead_rows(results),
            ),
            "",
        ]
    )


def _swap_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["swap"].items():
        ours = case["activate"] + max(case["extra"], 0.0)
        for other in (MMAP, DEFAULT):
            reload = case[f"{other}: reload"]
            yield [
                f"{name}, {other}",
                f"{case['activate'] * 1e3:.0f}",
                f"{case['extra'] * 1e3:.0f}",
                f"{reload * 1e3:.0f}",
                f"{reload / ours:.0f} x",
            ]


def swap(results: Results) -> str:
    """Return the section on swaps."""
    return "\n".join(
        [
            "## Swap between loaded tasks",
            "",
            "`activate()` between two tasks whose attention tensors differ in half of the layers, and how much "
            "longer the next token took than the same token without a swap. llama.cpp has to free one whole "
            "model and load another; its first token then is slower as well, which is not counted.",
            "",
            table(
                ["microseconds", "activate", "next token, extra", "llama.cpp, reload", "reload / swap"],
                _swap_rows(results),
            ),
            "",
        ]
    )


def _load_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["load"].items():
        for engine, ms in case.items():
            with_tokenizer = ms["model"] + ms["tokenizer"]
            ready = with_tokenizer + ms["first token"]
            ours = case[OURS]
            yield [
                f"{name}, {engine}",
                f"{ms['model']:.1f}",
                f"{with_tokenizer:.1f}",
                f"{ready:.1f}",
                f"{(ours['model'] + ours['tokenizer']) / with_tokenizer:.2f}",
                f"{sum(ours.values()) / ready:.2f}",
            ]


def load(results: Results) -> str:
    """Return the section on loading."""
    return "\n".join(
        [
            "## Load, files in the page cache",
            "",
            "One task: foundation, adaptor and a vocabulary of 32 000 tokens; llama.cpp loads the same two files as a "
            "shard set. It builds its tokenizer while it loads the model, we when it is first asked for: compare the "
            "second column. The third adds a context and the logits of a first token.",
            "",
            table(
                [
                    "milliseconds until",
                    "model",
                    "tokenizer",
                    "first token",
                    "ours / this, tokenizer",
                    "ours / this, first token",
                ],
                _load_rows(results),
            ),
            "",
        ]
    )


def _memory_rows(results: Results) -> Iterable[Sequence[str]]:
    for engine, cases in results["memory"]["engines"].items():
        for n, case in cases.items():
            dirty = case["private_dirty"] - case["imports_private_dirty"]
            ours = results["memory"]["engines"][OURS][n]
            yield [
                f"{LABELS[engine]}, {n} task{'s' * (n != '1')}",
                f"{case['pss'] / MIB:.0f}",
                f"{case['weights_pss'] / MIB:.0f}",
                f"{dirty / MIB:.0f}",
                f"{case['pss'] / ours['pss']:.2f}",
            ]


def memory(results: Results) -> str:
    """Return the section on memory."""
    found = results["memory"]
    files = (found["foundation"] + sum(found["adaptors"].values())) / MIB
    return "\n".join(
        [
            "## Memory",
            "",
            f"{found['case']}, MiB, from `/proc/self/smaps_rollup` (mapped weights: `smaps`), each case in a "
            "process of its own after every task decoded 20 tokens; a session or context of 512 tokens per task. "
            "Private: dirty pages, less those after the imports, KV caches included. The last rows are llama.cpp "
            f"over the files that we split, which it can share too. Foundation and all adaptors are {files:.0f} "
            "MiB on disk.",
            "",
            table(["", "PSS", "of it mapped weights", "private", "PSS / ours"], _memory_rows(results)),
            "",
            "![Memory by number of tasks](benchmarks/memory.svg)",
            "",
        ]
    )


def _files_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["files"].items():
        s = case["seconds"]
        for what in ("split", "merge"):
            plain, synced = (s[f"{what}: {cp}"] + s[f"{what}: sha256"] for cp in ("cp", "cp, sync"))
            yield [
                f"{name}, {what}",
                *(f"{s[key]:.2f}" for key in (what, f"{what}: cp", f"{what}: cp, sync", f"{what}: sha256")),
                f"{s[what] / plain:.2f}",
                f"{s[what] / synced:.2f}",
                f"{(case['peak_rss'][what] - case['peak_rss']['imports']) / MIB:.0f}",
            ]


def files(results: Results) -> str:
    """Return the section on split and merge."""
    return "\n".join(
        [
            "## Split and merge",
            "",
            "Four models in, one foundation and four adaptors out; then one model back. `cp` copies the files that are "
            "written, SHA-256 covers the bytes that are read (split) or written (merge). Ours ends with the data "
            "on the disk (fsync), as `cp, sync` does and `cp` does not. Peak: growth of the process's highest RSS.",
            "",
            table(
                [
                    "seconds",
                    "ours",
                    "cp",
                    "cp, sync",
                    "SHA-256",
                    "ours / (cp + hash)",
                    "ours / (cp, sync + hash)",
                    "peak MiB",
                ],
                _files_rows(results),
            ),
            "",
        ]
    )


def verdicts(results: Results) -> str:
    """Return the table of what is promised, what was found, and whether it holds."""
    rows = []
    for what in ("decode", "prefill"):
        for other in (MMAP, DEFAULT):
            name, worst = min(
                ((name, ratios(case, what, other)[0]) for name, case in results["speed"].items()),
                key=lambda pair: pair[1],
            )
            rows.append((f"{what}, of {other}; worst case: {name}", ">= 1.00 x", f"{worst:.2f} x", worst >= 0.995))
    for what in ARCHITECTURE_SPEEDS:
        found = {name: _architecture_ratio(runs, what)[0] for name, runs in results["architectures"].items()}
        name = min(found, key=lambda name: found[name])
        rows.append((f"{what}, of {MMAP}; worst: {name}", ">= 1.00 x", f"{found[name]:.2f} x", found[name] >= 0.995))
    for name, case in results["overhead"].items():
        us = case["outside_us"]
        rows.append((f"token outside ggml, {name}", "< 150 us", f"{us:.0f} us", us < 150))
    for name, case in results["swap"].items():
        us = (case["activate"] + max(case["extra"], 0.0)) * 1e3
        rows.append((f"swap, next token's extra included, {name}", "< 200 us", f"{us:.0f} us", us < 200))
    rows += [*_memory_verdicts(results), *report_adaptors.verdicts(results), *_other_verdicts(results)]
    rows += [*report_text.verdicts(results), *report_ggml.verdicts(results)]
    return table(
        ["promise", "limit", "found", "holds"],
        [(what, limit, found, "yes" if ok else "**no**") for what, limit, found, ok in rows],
    )


def _memory_verdicts(results: Results) -> Iterable[tuple[str, str, str, bool]]:
    found = results["memory"]
    case, disk = found["engines"][OURS]["4"], found["foundation"] + sum(found["adaptors"].values())
    ratio = case["weights_pss"] / disk
    yield "weights of 4 tasks, PSS, of foundation + adaptors", "<= 1.05 x", f"{ratio:.2f} x", ratio <= 1.05
    private = (case["private_dirty"] - case["imports_private_dirty"]) / MIB
    yield "private, what 4 KV caches use included", "< 64 MiB", f"{private:.0f} MiB", private < 64


def _other_verdicts(results: Results) -> Iterable[tuple[str, str, str, bool]]:
    for name, case in results["load"].items():
        ours, theirs = (case[engine]["model"] + case[engine]["tokenizer"] for engine in (OURS, MMAP))
        yield f"load with tokenizer, of llama.cpp's, {name}", "<= 1.00 x", f"{ours / theirs:.2f} x", ours <= theirs
    for name, case in results["files"].items():
        s = case["seconds"]
        for what in ("split", "merge"):
            ratio = s[what] / (s[f"{what}: cp"] + s[f"{what}: sha256"])
            yield f"{what}, of cp + SHA-256, {name}", "<= 2.00 x", f"{ratio:.2f} x", ratio <= 2


def _measured(results: Results) -> Iterable[Sequence[str]]:
    for part, when in results["measured"].items():
        yield [part, when["date"], when["commit"], when["load average"]]


def markdown(results: Results) -> str:
    """Return the whole page."""
    rows = [(key, value) for key, value in results["machine"].items()]
    head = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`benchmarks/run.py`) on the machine below, ours and llama.cpp's in the same run. "
        "Models have random weights: 0.1B is 125 M parameters, 1.1B has TinyLlama's shape. All use 2 threads, "
        "batches of 512 and flash attention.",
        "",
        table(["machine", ""], rows),
        "",
        table(["measured", "UTC", "commit", "load average before"], _measured(results)),
        "",
        "## What is promised",
        "",
        verdicts(results),
        "",
    ]
    parts = [
        speed(results),
        architectures(results),
        overhead(results),
        swap(results),
        report_adaptors.low_rank(results),
        report_adaptors.fork(results),
        report_adaptors.soak(results),
        report_text.tokenizers(results),
        report_text.sampling(results),
        report_text.chats(results),
        report_text.constraints(results),
        report_ggml.calls(results),
        load(results),
        memory(results),
        files(results),
    ]
    return "\n".join([*head, "![Speed beside llama.cpp](benchmarks/speed.svg)", "", *parts]).rstrip() + "\n"


def write(results: Results, docs: Path) -> None:
    """Write benchmarks.md and its plots into docs."""
    import plots

    (docs / "benchmarks").mkdir(parents=True, exist_ok=True)
    plots.memory(results, docs / "benchmarks" / "memory.svg")
    plots.speed(results, docs / "benchmarks" / "speed.svg")
    plots.switch(results, docs / "benchmarks" / "switch.svg")
    plots.soak(results, docs / "benchmarks" / "soak.svg")
    (docs / "benchmarks.md").write_text(markdown(results), encoding="utf-8")
