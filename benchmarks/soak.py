"""A host under load: many adaptors, room for few, requests for random tasks on several threads.

Every output is compared with that of a host which holds this one adaptor only.  While it runs, a sampler looks at the
adaptors in memory, at the process's memory and at its open files.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import pyggml_adapt as pga

N_DECODE = 4  # tokens after each prompt
EXPONENT = 1.1  # of Zipf's law: the n-th task is asked for in proportion to n ** -EXPONENT
SECONDS_BETWEEN = 0.2  # two samples


@dataclass
class Sample:
    """What the sampler saw.  nbytes: of adaptors that the host says are in memory.  pages: of them, as measured."""

    n_requests: int
    nbytes: int
    pages: int
    rss: int
    n_files: int


@dataclass
class Soak:
    """What a soak found.  wrong: tasks whose output was another than alone.  ms: of each request, in order."""

    n_adaptors: int
    n_requests: int
    n_threads: int
    budget: int
    seconds: float = 0.0
    loads: int = 0
    wrong: list[str] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Return the share of requests whose adaptor was in memory already."""
        return 1 - self.loads / self.n_requests

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"hit_rate": self.hit_rate}


def answer(host: pga.Host, task: str, prompt: list[int]) -> str:
    """Return a digest of the logits of a prompt and of the tokens that follow it, greedily."""
    sha = hashlib.sha256()
    with host.session(task, n_ctx=64) as session:
        ids = prompt
        for _ in range(1 + N_DECODE):
            logits = session.eval(ids)
            sha.update(logits.tobytes())
            ids = [int(logits.argmax())]
    return sha.hexdigest()


def prompt_of(task: str, n_vocab: int) -> list[int]:
    """Return the prompt that a task is always asked: 8, 12 or 16 tokens."""
    seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).integers(3, n_vocab, 8 + 4 * (seed % 3)).tolist()


def alone(foundation: str, adaptors: Mapping[str, str], say: Callable[[str], None]) -> dict[str, str]:
    """Return each task's answer, from a host that holds only its adaptor."""
    answers = {}
    with pga.Host(foundation, n_threads=1) as host:
        n_vocab = _n_vocab(host)
        for i, (task, path) in enumerate(adaptors.items()):
            if i % 50 == 0:
                say(f"expected answers: {i} of {len(adaptors)} ...")
            host.load_adaptor(task, path)
            answers[task] = answer(host, task, prompt_of(task, n_vocab))
            host.unload_adaptor(task)
    return answers


def _n_vocab(host: pga.Host) -> int:
    with host.session(n_ctx=8) as session:
        return session.n_vocab


def run(
    foundation: str,
    adaptors: Mapping[str, str],
    *,
    budget: int,
    n_requests: int,
    n_threads: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> Soak:
    """Return what random requests on n_threads threads found; budget: max_adaptor_bytes."""
    expected = alone(foundation, adaptors, say)
    result = Soak(len(adaptors), n_requests, n_threads, budget)
    with pga.Host(foundation, adaptors, n_threads=1, max_adaptor_bytes=budget) as host:
        n_vocab, tasks = _n_vocab(host), list(adaptors)
        share = np.arange(1, len(tasks) + 1) ** -EXPONENT
        order = np.random.default_rng(0).choice(len(tasks), n_requests, p=share / share.sum())
        queue, lock, done = iter(order.tolist()), threading.Lock(), threading.Event()

        def work() -> None:
            while True:
                with lock:
                    i = next(queue, None)
                if i is None:
                    return
                task, start = tasks[i], time.perf_counter()
                found = answer(host, task, prompt_of(task, n_vocab))
                with lock:
                    result.ms.append((time.perf_counter() - start) * 1e3)
                    if found != expected[task]:
                        result.wrong.append(task)

        def sample() -> None:
            while not done.wait(SECONDS_BETWEEN):
                result.samples.append(_sample(host, len(result.ms)))
                say(f"{len(result.ms)} of {n_requests} requests ...")

        before, start = host.n_loads, time.perf_counter()
        threads = [threading.Thread(target=work) for _ in range(n_threads)]
        sampler = threading.Thread(target=sample)
        for thread in (*threads, sampler):
            thread.start()
        for thread in threads:
            thread.join()
        result.seconds, result.loads = time.perf_counter() - start, host.n_loads - before
        done.set()
        sampler.join()
        result.samples.append(_sample(host, len(result.ms)))
    return result


def soak(foundation: str, adaptors: dict[str, str], budget: int, n_requests: int) -> dict[str, Any]:
    """Return what run() found, as plain values, and say on stderr how far it is."""
    last = [0.0]

    def say(text: str) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    return run(foundation, adaptors, budget=budget, n_requests=n_requests, say=say).to_json()


def _sample(host: pga.Host, n_requests: int) -> Sample:
    nbytes = sum(adaptor.nbytes for adaptor in host.adaptors if adaptor.resident)
    memory = host.memory()
    pages = sum(pages.resident for pages in memory.adaptors.values())
    return Sample(n_requests, nbytes, pages, memory.process.resident, len(os.listdir("/proc/self/fd")))


def make_adaptors(store: Any, shape: Any, n: int, folder: Path) -> tuple[str, dict[str, str]]:
    """Return a foundation, and n adaptors made for it: every fifth of whole tensors, the others low-rank."""
    from loras import write_lora
    from models import write_model

    base, adaptors = store.model(shape, "Q4_K_M"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        task = f"t{i:03}"
        if i % 5:
            adaptors[task] = str(write_lora(folder / f"{task}-lora.gguf", shape, seed=i))
            continue
        path = folder / f"soak-adaptor-{task}.gguf"
        if not path.exists():
            whole = folder / "whole.gguf"
            whole.unlink(missing_ok=True)
            write_model(whole, shape, "Q4_K_M", task, base)
            pga.split({task: whole}, folder, prefix="soak", foundation=base)
            whole.unlink()
        adaptors[task] = str(path)
    return str(base), adaptors
