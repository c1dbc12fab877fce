"""The table on calls of ggml from Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from markdown_table import table

Results = dict[str, Any]
LIMIT = 0.4  # of ggml-python's time


def _rows(case: Results) -> Iterable[Sequence[str]]:
    for name, ours in case["ours"].items():
        if name == "n_nodes":
            continue
        theirs = case["theirs"][name]
        each = [a / b for a, b in zip(ours, theirs, strict=True)]
        what = f"graph of {case['ours']['n_nodes'][0]:.0f} nodes" if name == "graph" else f"`{name}`"
        a, b = median(ours), median(theirs)
        yield [what, f"{a:.2f}", f"{b:.2f}", f"**{a / b:.2f}** ({min(each):.2f} to {max(each):.2f})"]


def calls(results: Results) -> str:
    """Return the section on calls, empty if they were not measured."""
    if "ggml_calls" not in results:
        return ""
    return "\n".join(
        [
            "## Calls of ggml from Python",
            "",
            "Microseconds to build the graph that decodes one token of a llama of 32 layers, and to call one op, by "
            "`pyggml_adapt.ggml`, which checks each operand first, and by ggml-python 0.0.45, which is ctypes and "
            "does not. Context and graph are made and freed within the time; nothing is computed. Each is in a process "
            "of its own; they take turns. Medians; in brackets the lowest and highest ratio of one round.",
            "",
            table(["", "pyggml_adapt", "ggml-python", "ratio"], _rows(results["ggml_calls"])),
            "",
        ]
    )


def verdicts(results: Results) -> Iterable[tuple[str, str, str, bool]]:
    """Yield what is promised of calls, the limit, what was found, and whether it holds."""
    case = results.get("ggml_calls", {"ours": {}})
    for name, ours in case["ours"].items():
        if name != "n_nodes":
            ratio = median(ours) / median(case["theirs"][name])
            what = "a graph built" if name == "graph" else f"a call of {name}"
            yield f"{what}, of ggml-python's time", f"<= {LIMIT:.2f} x", f"{ratio:.2f} x", ratio <= LIMIT
