"""What it costs to load, and to go from one task to another."""

from __future__ import annotations

import statistics
import time
from typing import Any

from engines import DEFAULT, MMAP, N_THREADS, N_UBATCH, Llama

import pyggml_adapt as pga

PROMPT = list(range(300, 308))


class _Clock:
    """Collect milliseconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, list[float]] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin a lap."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap and begin the next."""
        now = time.perf_counter()
        self.laps.setdefault(name, []).append((now - self._last) * 1e3)
        self._last = time.perf_counter()

    def medians(self) -> dict[str, float]:
        """Return the median of each name's laps."""
        return {name: statistics.median(laps) for name, laps in self.laps.items()}


def swap(foundation: str, adaptors: dict[str, str], rounds: int) -> dict[str, float]:
    """Return ms of activate(), of the first token after it, and of the same token without a swap before it.

    The tasks' sessions take turns, so the first token after a swap also goes to another KV cache.
    """
    clock = _Clock()
    with pga.Host(foundation, adaptors, n_threads=N_THREADS, n_ubatch=N_UBATCH) as host:
        tasks = list(adaptors)[:2]
        sessions = {task: host.session(task, n_ctx=256) for task in tasks}
        for session in sessions.values():
            session.eval(PROMPT)
            session.eval(PROMPT[:1])
        for i in range(rounds):
            task = tasks[i % 2]
            session = sessions[task]
            clock.start()
            host.activate(task)
            clock.lap("activate")
            session.eval(PROMPT[:1])
            clock.lap("token after")
            session.rewind(len(PROMPT))
            clock.start()
            session.eval(PROMPT[:1])
            clock.lap("token without")
            session.rewind(len(PROMPT))
    found = clock.medians()
    pairs = zip(clock.laps["token after"], clock.laps["token without"], strict=True)
    extra = [after - without for after, without in pairs]
    return found | {"extra": statistics.median(extra)}


def reload(full: dict[str, str], rounds: int) -> dict[str, float]:
    """Return ms that llama.cpp takes to free a whole model and have another ready, and of the first token then."""
    found = {}
    for options in (MMAP, DEFAULT):
        clock = _Clock()
        paths = list(full.values())[:2]
        engine = Llama(paths[1], options=options, n_ctx=256).start()
        for i in range(rounds):
            clock.start()
            engine.close()
            engine = Llama(paths[i % 2], options=options, n_ctx=256).start()
            clock.lap("reload")
            engine.eval(PROMPT[:1])
            clock.lap("token after")
        engine.close()
        found |= {f"{options.name}: {name}": ms for name, ms in clock.medians().items()}
    return found


def load(foundation: str, adaptor: str, rounds: int) -> dict[str, Any]:
    """Return ms of loading one task: to the model, to its tokenizer, to a first token's logits; engines take turns.

    All load the same bytes: llama.cpp takes foundation and adaptor as the shard set that they are.
    """
    clocks = {"pyggml_adapt": _Clock(), MMAP.name: _Clock(), DEFAULT.name: _Clock()}
    for _ in range(rounds):
        clock = clocks["pyggml_adapt"]
        clock.start()
        host = pga.Host(foundation, {"task": adaptor}, n_threads=N_THREADS, n_ubatch=N_UBATCH)
        clock.lap("model")
        host.tokenize("a")
        clock.lap("tokenizer")
        host.session("task", n_ctx=256).eval(PROMPT[:1])
        clock.lap("first token")
        host.close()
        for options in (MMAP, DEFAULT):
            clock = clocks[options.name]
            clock.start()
            engine = Llama(adaptor, foundation, options=options, n_ctx=256)
            clock.lap("model")
            clock.lap("tokenizer")  # is part of the model
            engine.start().eval(PROMPT[:1])
            clock.lap("first token")
            engine.close()
    return {name: clock.medians() for name, clock in clocks.items()}
