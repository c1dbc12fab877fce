"""Tokens per second of one model beside llama.cpp with the same flags, near the start and past a sliding window."""

from __future__ import annotations

from typing import Any

import numpy as np
from engines import Engine, Llama, Ours
from speed import N_PREFILL, prefill, seconds, tokens

DEPTHS = (128, 700)  # tokens in the cache when decoding begins: within gemma3's window of 512, and past it
N_TURN = 16  # tokens that one engine decodes before the other does the same: so short that both meet the same machine
N_CTX = 2048


def _turn(engine: Engine, ids: list[int]) -> float:
    """Return tokens/s of single tokens."""
    return len(ids) / seconds(lambda: [engine.eval([token]) for token in ids])


def _decode(engines: list[Engine], prompt: list[int], ids: list[int], found: dict[str, list[float]]) -> None:
    """Add the tokens/s of each turn to `found`; the engines decode `ids` after a prompt, in turns."""
    for engine in engines:
        engine.reset()
        engine.eval(prompt)
        engine.eval(ids[:1])  # so that the first turn finds its graph
    for i, start in enumerate(range(1, len(ids), N_TURN)):
        for engine in engines[:: 1 - i % 2 * 2]:
            found[engine.name].append(_turn(engine, ids[start : start + N_TURN]))


def architecture(path: str, rounds: int) -> dict[str, Any]:
    """Return tokens/s of each turn by engine, of decoding after each of DEPTHS and of prefill, and if logits are equal.

    rounds: turns of decoding; of prefill, which takes longer, there are a third.
    """
    engines: list[Engine] = [Ours(path, n_ctx=N_CTX), Llama(path, n_ctx=N_CTX).start()]
    ids = tokens(engines[0].session.n_vocab, N_CTX)
    found: dict[str, Any] = {}
    equal = []
    for depth in DEPTHS:
        rates = found[f"decode after {depth}"] = {engine.name: [] for engine in engines}
        _decode(engines, ids[:depth], ids[depth : depth + 1 + N_TURN * rounds], rates)
        equal.append(np.array_equal(*(engine.eval(ids[:1]) for engine in engines)))
    rates = found["prefill"] = {engine.name: [] for engine in engines}
    for i in range(rounds // 3):
        for engine in engines[:: 1 - i % 2 * 2]:
            rates[engine.name].append(prefill(engine, ids[:N_PREFILL]))
    equal.append(np.array_equal(*(engine.eval(ids[:1]) for engine in engines)))
    for engine in engines:
        engine.close()
    return found | {"equal_logits": all(equal)}
