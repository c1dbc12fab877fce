"""What one document costs under several tasks: by forks of one session, and by a prefill under each."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from engines import N_THREADS, N_UBATCH

import pyggml_adapt as pga


def _prefills(host: pga.Host, tasks: list[str], ids: list[int]) -> list[np.ndarray]:
    """Return the logits of the document's last token under each task, computed from the bottom each time."""
    logits = []
    for task in tasks:
        with host.session(task, n_ctx=len(ids)) as session:
            logits.append(session.eval(ids))
    return logits


def _forks(host: pga.Host, tasks: list[str], ids: list[int], found: dict[str, Any]) -> list[np.ndarray]:
    """Return the same, computed under the first task and forked to the others; `found` gets what forking tells."""
    with host.session(tasks[0], n_ctx=len(ids), forks=tasks[1:]) as session:
        logits = [session.eval(ids)]
        found["kv_nbytes"], found["boundary_nbytes"] = session.kv_nbytes, session.boundary_nbytes
        for task in tasks[1:]:
            with session.fork(task) as forked:
                logits.append(forked.logits)
                found["saved"], found["copied_nbytes"] = forked.fork_report.saved, forked.fork_report.copied_nbytes
    return logits


def fork(foundation: str, adaptors: dict[str, str], n_tokens: list[int], rounds: int) -> dict[str, Any]:
    """Return ms of both ways by length of the document; they take turns, and the first round does not count."""
    cases: dict[str, Any] = {}
    with pga.Host(foundation, adaptors, n_threads=N_THREADS, n_ubatch=N_UBATCH) as host:
        tasks = list(adaptors)
        for n in n_tokens:
            ids = [1, *np.random.default_rng(n).integers(300, 20000, n - 1).tolist()]
            case: dict[str, Any] = {"n_tasks": len(tasks), "prefills": [], "forks": []}
            for i in range(rounds + 1):
                start = time.perf_counter()
                wanted = _prefills(host, tasks, ids)
                between = time.perf_counter()
                logits = _forks(host, tasks, ids, case)
                end = time.perf_counter()
                if i:
                    case["prefills"].append((between - start) * 1e3)
                    case["forks"].append((end - between) * 1e3)
            case["equal_logits"] = all(map(np.array_equal, wanted, logits))
            cases[str(n)] = case
    return cases
