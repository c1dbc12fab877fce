"""Tokens per second, and what a token costs outside ggml."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from engines import DEFAULT, MMAP, Engine, Llama, Ours

from pyggml_adapt.ggml import Backend, CGraph, Context

N_PROMPT, N_DECODE, N_PREFILL = 128, 64, 512


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tokens(n_vocab: int, n: int) -> list[int]:
    """Return n random token ids that are not special."""
    return np.random.default_rng(1).integers(259, n_vocab, n).tolist()


def _decode(engine: Engine, ids: list[int], n_decode: int) -> float:
    """Return tokens/s of n_decode single tokens after a prompt."""
    engine.reset()
    engine.eval(ids[:N_PROMPT])
    rest = ids[N_PROMPT : N_PROMPT + n_decode]
    return len(rest) / seconds(lambda: [engine.eval([token]) for token in rest])


def prefill(engine: Engine, ids: list[int]) -> float:
    """Return tokens/s of one prompt."""
    engine.reset()
    return len(ids) / seconds(lambda: engine.eval(ids))


def speed(path: str, rounds: int, n_decode: int = N_DECODE) -> dict[str, Any]:
    """Return decode and prefill tokens/s of each round by engine; they take turns, in another order each round."""
    engines: list[Engine] = [Ours(path), Llama(path, options=MMAP).start(), Llama(path, options=DEFAULT).start()]
    ids = tokens(engines[0].session.n_vocab, N_PREFILL)
    found: dict[str, Any] = {"decode": {e.name: [] for e in engines}, "prefill": {e.name: [] for e in engines}}
    logits = []
    for engine in engines:  # warm up, and show that all do the same work
        engine.reset()
        engine.eval(ids)
        engine.reset()
        engine.eval(ids[:N_PROMPT])
        logits.append(engine.eval(ids[N_PROMPT : N_PROMPT + 1]).copy())
    equal = [bool(np.array_equal(logits[0], other)) for other in logits]
    found["equal_logits"] = dict(zip((e.name for e in engines), equal, strict=True))
    for i in range(rounds):
        for engine in engines[i % 3 :] + engines[: i % 3]:
            found["decode"][engine.name].append(_decode(engine, ids, n_decode))
        for engine in engines[i % 3 :] + engines[: i % 3]:
            found["prefill"][engine.name].append(prefill(engine, ids))
    for engine in engines:
        engine.close()
    return found


class Timed:
    """A CGraph whose computations are timed."""

    def __init__(self, graph: CGraph):
        self._graph = graph
        self.seconds: list[float] = []

    def compute(self, *args: object) -> None:
        """Compute, and note how long it took."""
        start = time.perf_counter()
        self._graph.compute(*args)
        self.seconds.append(time.perf_counter() - start)


def compute_call_us() -> float:
    """Return the microseconds of CGraph.compute for a graph without nodes: what our call around ggml's costs."""
    ctx = Context(Context.size_for(16, 16))
    with Backend(n_threads=1) as backend:
        graph = CGraph(ctx, 16)
        return statistics.median(seconds(lambda: graph.compute(backend)) for _ in range(2000)) * 1e6


def overhead(path: str, n_tokens: int) -> dict[str, float]:
    """Return microseconds per token: whole, inside ggml and outside for us; whole for llama.cpp.

    Inside is the time of our compute(), less that of computing a graph without nodes.
    """
    ours, llama = Ours(path), Llama(path).start()
    ids = tokens(ours.session.n_vocab, 8 + 100)
    for engine in (ours, llama):
        engine.eval(ids)
        engine.eval(ids[:1])
    (program,) = [p for p in ours.host._engine._programs.values() if p.inputs.n_tokens == 1]
    timed = program.graph = Timed(program.graph)
    whole, other = [], []
    for i in range(-(-n_tokens // 100)):
        for engine, times in ((ours, whole), (llama, other)) if i % 2 else ((llama, other), (ours, whole)):
            engine.reset()
            engine.eval(ids[:8])
            times += [seconds(partial(engine.eval, [token])) for token in ids[8:]]
    call = compute_call_us()
    outside = statistics.median(w - t for w, t in zip(whole, timed.seconds, strict=True)) * 1e6 + call
    result = {
        "ours_us": statistics.median(whole) * 1e6,
        "inside_us": statistics.median(timed.seconds) * 1e6 - call,
        "outside_us": outside,
        "call_us": call,
        "llama_us": statistics.median(other) * 1e6,
    }
    ours.close()
    llama.close()
    return result
