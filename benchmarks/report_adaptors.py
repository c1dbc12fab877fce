"""Tables on kinds of adaptors, on forks, and on many adaptors in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from markdown_table import table

Results = dict[str, Any]
MB = 1e6
ENGINES = ("ours, base", "ours, whole", "ours, low-rank", "llama.cpp, base", "llama.cpp, low-rank")
PAIRS = (
    ("ours, low-rank", "llama.cpp, low-rank"),
    ("ours, low-rank", "ours, whole"),
    ("ours, base", "llama.cpp, base"),
)
FORK_LIMIT = 0.68  # 0.625 is what is left to compute of four tasks that share the lower half of the layers


def _ratio(case: Results, what: str, one: str, other: str) -> float:
    return median(case["rates"][one][what]) / median(case["rates"][other][what])


def _speed_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["lowrank"].items():
        for what in ("decode", "prefill"):
            rates = (f"{median(case['rates'][engine][what]):.1f}" for engine in ENGINES)
            yield [f"{name}, {what}", *rates, *(f"**{_ratio(case, what, *pair):.2f}**" for pair in PAIRS)]


def _size_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["lowrank"].items():
        low, whole = case["nbytes"]["low-rank"] / MB, case["nbytes"]["whole"] / MB
        yield [name, f"{low:.1f}", f"{whole:.1f}", f"{low / whole:.3f}"]


def _switch_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, case in results["lowrank"].items():
        for what, ms in case["switch"].items():
            total = ms["switch"] + max(ms["extra"], 0.0)
            figures = (ms["switch"], ms["extra"], total, ms["switch"] + ms["token after"])
            yield [f"{name}: {what}", *(f"{1e3 * figure:.0f}" for figure in figures)]


def low_rank(results: Results) -> str:
    """Return the section on low-rank tasks."""
    equal = all(case["equal_logits"] for case in results["lowrank"].values())
    header = ["tokens/s", *ENGINES, "ours / llama.cpp, low-rank", "low-rank / whole", "ours / llama.cpp, base"]
    return "\n".join(
        [
            "## Low rank beside whole tensors",
            "",
            "One task twice: as a LoRA of rank 16 on all linears, F16, and baked into whole tensors of the base's "
            "types. Prompts and flags as above; all take turns in one process.",
            "",
            table(header, _speed_rows(results)),
            "",
            f"Logits of ours and of llama.cpp under the LoRA are {'equal' if equal else '**not** equal'} bit for bit.",
            "",
            table(["adaptor, MB", "low-rank", "whole tensors", "ratio"], _size_rows(results)),
            "",
            "So why not just LoRA? It is a fraction of the bytes, and costs a part of the speed with every token; "
            "whole tensors cost no speed. Where only some tensors were tuned, whole tensors are small as well.",
            "",
            "Going from one task to another and decoding a token. The extra is how much longer that token took than "
            "the same one without a switch; below zero it is noise, and counts as nothing. Whole: attention in half of "
            "the layers. llama.cpp: `llama_set_adapters_lora`, and loading another whole model (mmap).",
            "",
            table(
                ["microseconds", "switch", "next token, extra", "together", "until the next token"],
                _switch_rows(results),
            ),
            "",
            "![Cost of going to another task](benchmarks/switch.svg)",
            "",
        ]
    )


def _fork_rows(results: Results) -> Iterable[Sequence[str]]:
    for name, cases in results["fork"].items():
        for n, case in cases.items():
            prefills, forks = median(case["prefills"]), median(case["forks"])
            each = [b / a for a, b in zip(case["prefills"], case["forks"], strict=True)]
            yield [
                f"{name}, {n} tokens",
                f"{prefills:.0f}",
                f"{forks:.0f}",
                f"**{forks / prefills:.3f}** ({min(each):.3f} to {max(each):.3f})",
                f"{case['boundary_nbytes'] / MB:.1f}",
                f"{case['kv_nbytes'] / MB:.1f}",
                "yes" if case["equal_logits"] else "**no**",
            ]


def fork(results: Results) -> str:
    """Return the section on forks."""
    header = ["", "4 prefills, ms", "1 prefill and 3 forks, ms", "ratio", "kept states, MB", "KV, MB", "equal logits"]
    return "\n".join(
        [
            "## One document under four tasks",
            "",
            "Four tasks changed the attention in the upper half of the layers. The document is evaluated under the "
            "first, and the session is forked to the others, which compute the upper half only; 0.625 is the limit "
            "that arithmetic sets. Medians of rounds that take turns; in brackets the lowest and highest of one round.",
            "",
            table(header, _fork_rows(results)),
            "",
        ]
    )


def soak(results: Results) -> str:
    """Return the section on many adaptors in little memory."""
    found = results["soak"]
    samples, ms = found["samples"], sorted(found["ms"])
    highest = max(sample["nbytes"] for sample in samples)
    pages = max(sample["pages"] for sample in samples)
    third = samples[len(samples) // 3]
    rows = [
        ("adaptors registered", f"{found['n_adaptors']}, one in five of whole tensors, the others LoRAs of rank 16"),
        ("requests, threads", f"{found['n_requests']} on {found['n_threads']} threads, tasks by Zipf's law"),
        ("wrong answers", str(len(found["wrong"]))),
        ("limit, MB", f"{found['budget'] / MB:.1f}, room for {found['room']} of the largest"),
        ("most in memory, MB", f"{highest / MB:.1f}; {pages / MB:.1f} in pages resident, headers included"),
        ("requests/s", f"{found['n_requests'] / found['seconds']:.1f}"),
        ("hit rate", f"{100 * found['hit_rate']:.1f} %"),
        ("ms of a request, median and 99 %", f"{median(ms):.1f}, {ms[int(0.99 * len(ms))]:.1f}"),
        ("resident after a third, at the end, MB", f"{third['rss'] / MB:.1f}, {samples[-1]['rss'] / MB:.1f}"),
        ("open files after a third, at the end", f"{third['n_files']}, {samples[-1]['n_files']}"),
    ]
    return "\n".join(
        [
            "## Many adaptors in little memory",
            "",
            f"{found['case']}. Each request opens a session with a random task, evaluates its prompt of 8 to 16 "
            "tokens, and decodes 4; its logits are compared bit for bit with those of a host that holds only this "
            f"adaptor. Memory is sampled {len(samples)} times.",
            "",
            table(["", "found"], rows),
            "",
            "![Memory while it runs](benchmarks/soak.svg)",
            "",
        ]
    )


def verdicts(results: Results) -> Iterable[tuple[str, str, str, bool]]:
    """Yield what is promised of adaptors, the limit, what was found, and whether it holds."""
    for name, case in results["lowrank"].items():
        for what in ("decode", "prefill"):
            ratio = _ratio(case, what, "ours, low-rank", "llama.cpp, low-rank")
            yield f"{what} under a LoRA, of llama.cpp, {name}", ">= 1.00 x", f"{ratio:.2f} x", ratio >= 0.995
        ms = case["switch"]["ours, low to low"]
        us = 1e3 * (ms["switch"] + max(ms["extra"], 0.0))
        yield f"swap between LoRAs, next token's extra included, {name}", "< 200 us", f"{us:.0f} us", us < 200
    for name, cases in results["fork"].items():
        for n, case in cases.items():
            ratio = median(case["forks"]) / median(case["prefills"])
            limit = f"<= {FORK_LIMIT:.2f} x"
            yield f"{n} tokens under 4 tasks by forks, {name}", limit, f"{ratio:.3f} x", ratio <= FORK_LIMIT
    found = results["soak"]
    most = max(sample["nbytes"] for sample in found["samples"])
    yield (
        "soak: adaptors in memory, of the limit",
        "<= 1.00 x",
        f"{most / found['budget']:.2f} x",
        most <= found["budget"],
    )
    yield "soak: wrong answers", "0", str(len(found["wrong"])), not found["wrong"]
