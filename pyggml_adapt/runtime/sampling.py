"""Sampling: pure functions from logits to a token id, in llama.cpp's order.

Source: llama.cpp src/llama-sampler.cpp, common/sampling.cpp (the order of the default chain)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from pyggml_adapt.errors import ParameterError


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """How the next token is drawn; defaults are llama.cpp's.

    temperature: 0 takes the most probable token.  top_k: 0 keeps all.  top_p: 1 keeps all.  min_p: 0 keeps all.
    repeat_penalty: 1 for none.  repeat_last_n: tokens that the penalty looks back at, -1 for all.
    seed: None draws a new one each time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, type[Any], float, float], ...] = (
            ("temperature", Real, 0, 10000),
            ("top_k", Integral, 0, 1 << 30),
            ("top_p", Real, 0, 1),
            ("min_p", Real, 0, 1),
            ("repeat_penalty", Real, 0.0001, 10000),
            ("repeat_last_n", Integral, -1, 1 << 30),
        )
        for name, kind, least, most in limits:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not least <= float(value) <= most:
                what = "a number" if kind is Real else "a whole number"
                raise ParameterError(f"{name} = {value!r} is not {what} from {least} to {most}")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64):
            raise ParameterError(f"seed = {self.seed!r} is not a whole number from 0 to 2**64 - 1")

    def generator(self) -> np.random.Generator:
        """Return a new random generator; the same seed gives the same numbers on every platform."""
        return np.random.Generator(np.random.PCG64(self.seed))


def sample(logits: np.ndarray, params: SamplerParams, recent: Sequence[int], rng: np.random.Generator) -> int:
    """Return the next token id.  logits: F32 [n_vocab], not changed.  recent: the tokens so far."""
    if params.repeat_penalty != 1.0:
        logits = penalize(logits, params, recent)
    if params.temperature == 0.0:
        return int(np.argmax(logits))
    ids, probs = candidates(logits, params)
    return int(ids[np.searchsorted(np.cumsum(probs), rng.random() * probs.sum(), side="right").clip(0, len(ids) - 1)])


def penalize(logits: np.ndarray, params: SamplerParams, recent: Sequence[int]) -> np.ndarray:
    """Return logits with those of recent tokens made smaller by repeat_penalty."""
    window = recent if params.repeat_last_n < 0 else recent[max(len(recent) - params.repeat_last_n, 0) :]
    seen = np.unique(np.asarray(window, dtype=np.int64))
    logits = logits.copy()
    penalty = np.float32(params.repeat_penalty)
    logits[seen] = np.where(logits[seen] <= 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits


def candidates(logits: np.ndarray, params: SamplerParams) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, probabilities) that are left after top-k, top-p, min-p and temperature; most probable first."""
    ids = top_k(logits, params.top_k)
    values = logits[ids].astype(np.float64)
    if params.top_p < 1.0:
        keep = np.cumsum(_softmax(values))
        n = int(np.searchsorted(keep, params.top_p, side="left")) + 1
        ids, values = ids[:n], values[:n]
    if params.min_p > 0.0:
        n = int(np.count_nonzero(values >= values[0] + math.log(params.min_p)))
        ids, values = ids[:n], values[:n]
    return ids, _softmax(values / params.temperature)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest logits (all if k is 0), largest first; equal ones in the order of their ids."""
    if 0 < k < len(logits):
        smallest = np.partition(logits, len(logits) - k)[len(logits) - k]
        ids = np.flatnonzero(logits >= smallest)
    else:
        ids = np.arange(len(logits))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids[:k] if k > 0 else ids


def _softmax(values: np.ndarray) -> np.ndarray:
    exp = np.exp(values - values[0])  # values are sorted: the first is the largest
    return exp / exp.sum()
