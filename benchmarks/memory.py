"""Memory of a process that serves several tasks.  Each case is measured in a process of its own."""

from __future__ import annotations

import re
from typing import Any

PROMPT = list(range(300, 316))
N_CTX = 512
_HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)")


def rollup() -> dict[str, int]:
    """Return the bytes of each line of /proc/self/smaps_rollup."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as lines:
        found = [line.split() for line in lines if line.rstrip().endswith("kB")]
    return {key.rstrip(":"): int(kb) * 1024 for key, kb, _ in found}


def pss_of_models() -> int:
    """Return the bytes of PSS of the mapped GGUF files."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            header = _HEADER.match(line)
            if header:
                inside = header[1].endswith(".gguf")
            elif inside and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def memory(
    engine: str, full: dict[str, str], foundation: str, adaptors: dict[str, str], n_tasks: int
) -> dict[str, Any]:
    """Return bytes of PSS, of PSS of mapped weights and of private dirty pages, each task having decoded something.

    engine: "pyggml_adapt"; "mmap" or "default", llama.cpp with whole models; "shards", llama.cpp with our split files.
    """
    serve = _ours if engine == "pyggml_adapt" else _llama
    tasks = list(full)[:n_tasks]
    files = [(full[task],) if engine in ("mmap", "default") else (adaptors[task], foundation) for task in tasks]
    before, _serving = serve(engine, tasks, files)  # which must not end before it is measured
    after = rollup()
    return {
        "pss": after["Pss"],
        "weights_pss": pss_of_models(),
        "private_dirty": after["Private_Dirty"],
        "imports_pss": before["Pss"],
        "imports_private_dirty": before["Private_Dirty"],
    }


def _ours(engine: str, tasks: list[str], files: list[tuple[str, ...]]) -> tuple[dict[str, int], list[Any]]:
    import pyggml_adapt as pga

    before = rollup()
    foundation = files[0][1]
    host = pga.Host(foundation, {task: paths[0] for task, paths in zip(tasks, files, strict=True)}, n_threads=2)
    sessions = [host.session(task, n_ctx=N_CTX) for task in tasks]
    for session in sessions:
        session.eval(PROMPT)
        for token in PROMPT[:4]:
            session.eval([token])
    return before, [*sessions, host]


def _llama(engine: str, tasks: list[str], files: list[tuple[str, ...]]) -> tuple[dict[str, int], list[Any]]:
    from engines import DEFAULT, MMAP, Llama

    before = rollup()
    options = DEFAULT if engine == "default" else MMAP
    engines = [Llama(*paths, options=options, n_ctx=N_CTX).start() for paths in files]
    for each in engines:
        each.eval(PROMPT)
        for token in PROMPT[:4]:
            each.eval([token])
    return before, engines
