"""Time and memory of split and merge, beside copying and hashing the same bytes."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyggml_adapt as pga

BLOCK_NBYTES = 4 << 20


def _seconds(call: Callable[[], object]) -> float:
    os.sync()  # nobody pays for what the one before left to be written
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _hash(paths: list[str]) -> None:
    for path in paths:
        sha = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK_NBYTES):
                sha.update(block)


def _copy(paths: list[str], folder: Path, *, sync: bool) -> None:
    subprocess.run(["cp", *paths, str(folder)], check=True)
    if sync:
        subprocess.run(["sync", *(str(folder / Path(path).name) for path in paths)], check=True)


def files(full: dict[str, str], foundation: str, adaptors: dict[str, str], folder: str, rounds: int) -> dict[str, Any]:
    """Return seconds of split and merge and of cp and SHA-256 of the same bytes, and the peak RSS so far.

    split reads and hashes the whole models and writes foundation and adaptors: `cp` copies what is written, the hash
    covers what is read.  merge writes one whole model, and hashes it.
    """
    out = Path(folder)
    shutil.rmtree(out, ignore_errors=True)
    task, model = next(iter(full.items()))
    sources, written = list(full.values()), [foundation, *adaptors.values()]
    merged = str(out / "merged.gguf")
    jobs: dict[str, Callable[[], object]] = {
        "split": lambda: pga.split(full, out, prefix="x"),
        "split: cp": lambda: _copy(written, out, sync=False),
        "split: cp, sync": lambda: _copy(written, out, sync=True),
        "split: sha256": lambda: _hash(sources),
        "merge": lambda: pga.merge(foundation, adaptors[task], merged),
        "merge: cp": lambda: _copy([model], out, sync=False),
        "merge: cp, sync": lambda: _copy([model], out, sync=True),
        "merge: sha256": lambda: _hash([model]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    imports = _peak_rss()
    peaks: dict[str, int] = {}
    _hash([*sources, *written])  # into the page cache
    for _ in range(rounds):
        for name, job in jobs.items():
            out.mkdir()
            _copy([model], out, sync=False)  # not timed: every job begins after the same, a write and its deletion
            shutil.rmtree(out)
            out.mkdir()
            seconds[name].append(_seconds(job))
            peaks.setdefault(name, _peak_rss())
            shutil.rmtree(out)
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "source_nbytes": sum(os.path.getsize(path) for path in sources),
        "written_nbytes": sum(os.path.getsize(path) for path in written),
        "model_nbytes": os.path.getsize(model),
        "peak_rss": {"imports": imports, "split": peaks["split"], "merge": peaks["merge"]},
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
