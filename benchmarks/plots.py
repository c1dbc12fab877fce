"""Plots of the results, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from report import DEFAULT, LABELS, MIB, MMAP, OURS, ratios

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "pyggml_adapt",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
from matplotlib import pyplot as plt  # noqa: E402

_FORMAT = {"format": "svg", "metadata": {"Date": None}, "bbox_inches": "tight"}


def memory(results: dict[str, Any], path: Path) -> None:
    """Draw PSS by number of tasks."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for engine, cases in results["memory"]["engines"].items():
        n = [int(n) for n in cases]
        axes.plot(
            n,
            [case["pss"] / MIB for case in cases.values()],
            marker="o",
            label=LABELS[engine],
            linewidth=3 if engine == OURS else 1.5,
        )
    axes.set(xlabel="tasks", ylabel="PSS, MiB", xticks=n, ylim=(0, None), title=f"Memory, {results['memory']['case']}")
    axes.legend(frameon=False)
    figure.savefig(path, **_FORMAT)
    plt.close(figure)


def speed(results: dict[str, Any], path: Path) -> None:
    """Draw tokens/s over llama.cpp's, by model."""
    names = list(results["speed"])
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, what in zip(both, ("decode", "prefill"), strict=True):
        for shift, other in ((-0.2, MMAP), (0.2, DEFAULT)):
            found = np.array([ratios(results["speed"][name], what, other) for name in names])
            spread = np.abs(found[:, 1:] - found[:, :1]).T
            axes.bar(
                np.arange(len(names)) + shift,
                found[:, 0],
                0.38,
                yerr=spread,
                label=f"of {other}",
                error_kw={"linewidth": 1},
            )
        axes.axhline(1, color="black", linewidth=1)
        axes.set(title=what, xticks=range(len(names)), ylabel="tokens/s, ours / llama.cpp")
        axes.set_xticklabels(names, rotation=30, ha="right")
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.savefig(path, **_FORMAT)
    plt.close(figure)
