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


def switch(results: dict[str, Any], path: Path) -> None:
    """Draw what it costs to go to another task, the token after it included, on a logarithmic scale."""
    cases = results["lowrank"]
    figure, all_axes = plt.subplots(1, len(cases), figsize=(5 * len(cases) + 1, 3.5), squeeze=False, sharey=True)
    for axes, (name, case) in zip(all_axes[0], cases.items(), strict=True):
        kinds = list(case["switch"])
        cost = [1e3 * (ms["switch"] + max(ms["extra"], 0.0)) for ms in case["switch"].values()]
        colours = ["C0" if kind.startswith("ours") else "C1" for kind in kinds]
        axes.barh(kinds[::-1], cost[::-1], color=colours[::-1])
        axes.set(xscale="log", xlim=(10, None), title=name, xlabel="microseconds, switch and next token's extra")
    figure.savefig(path, **_FORMAT)
    plt.close(figure)


def soak(results: dict[str, Any], path: Path) -> None:
    """Draw memory by number of requests done."""
    found = results["soak"]
    done = [sample["n_requests"] for sample in found["samples"]]
    figure, axes = plt.subplots(figsize=(7, 3.5))
    for key, label in (("rss", "process, resident"), ("nbytes", "adaptors in memory")):
        axes.plot(done, [sample[key] / MIB for sample in found["samples"]], label=label)
    axes.axhline(found["budget"] / MIB, color="black", linewidth=1, linestyle="--", label="limit for adaptors")
    axes.set(xlabel="requests", ylabel="MiB", ylim=(0, None), title=f"{found['n_adaptors']} adaptors, {found['case']}")
    axes.legend(frameon=False)
    figure.savefig(path, **_FORMAT)
    plt.close(figure)
