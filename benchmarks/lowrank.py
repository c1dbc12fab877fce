"""A low-rank task beside the same task as whole tensors, and beside llama.cpp with the same files."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from engines import MMAP, N_CTX, N_THREADS, N_UBATCH, Llama
from speed import N_DECODE, N_PREFILL, N_PROMPT
from switching import reload

import pyggml_adapt as pga


class Adapted(Llama):
    """llama.cpp with low-rank files, one of which counts at a time."""

    def __init__(self, model: str, loras: list[str], n_ctx: int = N_CTX):
        super().__init__(model, options=MMAP, n_ctx=n_ctx)
        self.name = "llama.cpp"
        self._loras = [llama_cpp.llama_adapter_lora_init(self.model, path.encode()) for path in loras]

    def use(self, i: int | None) -> None:
        """Let file i count from now on, or none."""
        n = 0 if i is None else 1
        pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._loras[i or 0])
        if llama_cpp.llama_set_adapters_lora(self.ctx, pointers, n, (ctypes.c_float * 1)(1.0)):
            raise RuntimeError("llama.cpp does not use the low-rank file")


def _rates(eval: Callable[[list[int]], object], reset: Callable[[], None], ids: list[int]) -> tuple[float, float]:
    """Return decode and prefill tokens/s."""
    reset()
    eval(ids[:N_PROMPT])
    start = time.perf_counter()
    for token in ids[N_PROMPT : N_PROMPT + N_DECODE]:
        eval([token])
    decode = N_DECODE / (time.perf_counter() - start)
    reset()
    start = time.perf_counter()
    eval(ids)
    return decode, len(ids) / (time.perf_counter() - start)


def lowrank_speed(base: str, lora: str, baked: str, rounds: int) -> dict[str, Any]:
    """Return tokens/s of each round: of the base, of the low-rank task, and of it as whole tensors; engines take turns.

    baked: the overlay adaptor that `bake` made of `lora`.
    """
    host = pga.Host(base, {"low-rank": lora, "whole": baked}, n_threads=N_THREADS, n_ubatch=N_UBATCH)
    llama = Adapted(base, [lora]).start()
    sessions = {task: host.session(task, n_ctx=N_CTX) for task in ("base", "low-rank", "whole")}
    ids = np.random.default_rng(1).integers(259, sessions["base"].n_vocab, N_PREFILL).tolist()
    calls: dict[str, Callable[[], tuple[float, float]]] = {}
    for task, session in sessions.items():
        calls[f"ours, {task}"] = lambda s=session: _rates(s.eval, lambda: s.rewind(0), ids)  # type: ignore[misc]
    for name, i in (("llama.cpp, base", None), ("llama.cpp, low-rank", 0)):

        def of_llama(i: int | None = i) -> tuple[float, float]:
            llama.use(i)
            return _rates(llama.eval, llama.reset, ids)

        calls[name] = of_llama
    llama.use(0)
    equal = bool(np.array_equal(sessions["low-rank"].eval(ids), llama.eval(ids)))
    found: dict[str, Any] = {name: {"decode": [], "prefill": []} for name in calls}
    for i in range(-1, rounds):  # the first round warms up
        names = list(calls)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            decode, prefill = calls[name]()
            if i >= 0:
                found[name]["decode"].append(decode)
                found[name]["prefill"].append(prefill)
    sizes = {adaptor.name: adaptor.nbytes for adaptor in host.adaptors}
    host.close()
    llama.close()
    return {"rates": found, "equal_logits": equal, "nbytes": sizes}


def _turns(rounds: int, switch: Callable[[int], None], decode: Callable[[int], None]) -> dict[str, float]:
    """Return ms of a switch, of the token after it, of the same token without one, and what the switch costs in all."""
    laps: dict[str, list[float]] = {"switch": [], "token after": [], "token without": []}
    for i in range(rounds):
        for name, call in (("switch", switch), ("token after", decode), ("token without", decode)):
            start = time.perf_counter()
            call(i)
            laps[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in laps.items()}
    pairs = zip(laps["token after"], laps["token without"], strict=True)
    return medians | {"extra": statistics.median(after - without for after, without in pairs)}


def lowrank_switch(
    base: str, loras: list[str], whole: list[str], full: dict[str, str], rounds: int
) -> dict[str, dict[str, float]]:
    """Return ms of going from one task to another and decoding a token, for pairs of tasks of each kind.

    loras: two low-rank files of one rank.  whole: two overlay adaptors.  full: the whole models of these.  llama.cpp
    goes between the low-rank files, between one of them and none, and from one whole model to the other.
    """
    found: dict[str, dict[str, float]] = {}
    adaptors = {"low0": loras[0], "low1": loras[1], "whole0": whole[0], "whole1": whole[1]}
    prompt = list(range(300, 308))
    with pga.Host(base, adaptors, n_threads=N_THREADS, n_ubatch=N_UBATCH) as host:
        sessions = {task: host.session(task, n_ctx=256) for task in host.tasks}
        for session in sessions.values():
            session.eval(prompt)
            session.eval(prompt[:1])
        cases = {
            "whole to whole": ("whole0", "whole1"),
            "low to low": ("low0", "low1"),
            "base to low": ("base", "low0"),
        }
        for name, tasks in cases.items():

            def decode(i: int, tasks: tuple[str, str] = tasks) -> None:
                sessions[tasks[i % 2]].rewind(len(prompt))
                sessions[tasks[i % 2]].eval(prompt[:1])

            def switch(i: int, tasks: tuple[str, str] = tasks) -> None:
                host.activate(tasks[i % 2])

            found[f"ours, {name}"] = _turns(rounds, switch, decode)
    llama = Adapted(base, loras, n_ctx=256).start()
    memory = llama_cpp.llama_get_memory(llama.ctx)
    llama.eval(prompt)

    def decode_one(i: int) -> None:
        llama_cpp.llama_memory_seq_rm(memory, 0, len(prompt), -1)
        llama.eval(prompt[:1])

    for name, which in (("low to low", (0, 1)), ("base to low", (None, 0))):
        llama.use(which[1])
        decode_one(0)
        found[f"llama.cpp, {name}"] = _turns(rounds, lambda i, which=which: llama.use(which[i % 2]), decode_one)
    llama.close()
    reloads = reload(full, max(rounds // 20, 3))
    ms = {"switch": reloads[f"{MMAP.name}: reload"], "token after": reloads[f"{MMAP.name}: token after"]}
    without = found["llama.cpp, base to low"]["token without"]
    found["llama.cpp, reload"] = ms | {"token without": without, "extra": ms["token after"] - without}
    return found
