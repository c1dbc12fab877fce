"""The steps of a sampling chain: pure functions from candidates to candidates, with llama.cpp's F32 arithmetic.

Sums that llama.cpp adds up one by one in F32 are added up so here (cumsum; sum() would add in pairs), so that the cut
of a step is at the same token.  exp and log are computed in F64 and rounded to F32, as a good expf gives them.

Source: llama.cpp src/llama-sampler.cpp, `llama_sampler_*_apply`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_F32 = np.float32
_MIN_TEMPERATURE = _F32(1e-30)  # logits divided by less overflow
_N_SMALL = 4096
_N_FIRST = 256  # the candidates that top_p sorts first, of many


class Candidates(NamedTuple):
    """Tokens and their logits, F32, in the same order; the largest first if is_sorted."""

    ids: np.ndarray
    logits: np.ndarray
    is_sorted: bool = False

    def take(self, which: np.ndarray | slice, is_sorted: bool | None = None) -> Candidates:
        """Return those at `which`, in its order."""
        return Candidates(self.ids[which], self.logits[which], self.is_sorted if is_sorted is None else is_sorted)

    def sort(self) -> Candidates:
        """Return them with the largest logit first."""
        return self if self.is_sorted else self.take(largest(self.logits, len(self.logits)), True)


def largest(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k largest, the largest first, and equal ones in the order of their indices."""
    if k < len(logits):
        bound = _bound(logits, k)
        above = np.flatnonzero(logits > bound)
        if len(above) < k:
            above = np.concatenate([above, np.flatnonzero(logits == bound)[: k - len(above)]])
        return above[_order(logits[above])[:k]]
    return _order(logits)


def _order(logits: np.ndarray) -> np.ndarray:
    """Return the indices, those of the largest first, and of equal ones in their order."""
    if len(logits) < _N_SMALL:
        return np.argsort(-logits, kind="stable")
    bits = (logits + _F32(0)).view(np.int32)  # + 0: -0.0 and 0.0 are equal
    falling = ~np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # whole numbers in the order of the floats, turned round
    keys = (falling.astype(np.int64) << 32) | np.arange(len(logits))  # one sort of these is twice as fast
    keys.sort()
    return keys & 0xFFFFFFFF


def _bound(logits: np.ndarray, k: int) -> np.floating:
    """Return a number that at least k logits are not below, and not many more.

    Of the largest ones of k columns each is at least as large as the k-th of these: no need to partition all logits.
    """
    n_columns = max(1024, 8 * k)
    n_rows = len(logits) // n_columns
    if n_rows < 4:
        return np.partition(logits, len(logits) - k)[len(logits) - k]
    maxima = logits[: n_rows * n_columns].reshape(n_rows, n_columns).max(axis=0)
    return np.partition(maxima, n_columns - k)[n_columns - k]


def softmax(candidates: Candidates) -> np.ndarray:
    """Return probabilities, F32, in the order of the candidates."""
    weights = _weights(candidates)
    return weights / np.cumsum(weights)[-1]


def final_softmax(candidates: Candidates) -> np.ndarray:
    """Return the probabilities, F32, that a token is drawn with; their sum is added up in F64."""
    weights = _weights(candidates)
    return np.divide(weights, np.cumsum(weights, dtype=np.float64)[-1], dtype=np.float64).astype(_F32)


def _weights(candidates: Candidates) -> np.ndarray:
    logits = candidates.logits
    top = logits[0] if candidates.is_sorted else logits.max()
    return np.exp(logits - top, dtype=np.float64).astype(_F32)


def _log(values: np.ndarray) -> np.ndarray:
    return np.log(values, dtype=np.float64).astype(_F32)


def bias(logits: np.ndarray, pairs: Sequence[tuple[int, float]]) -> np.ndarray:
    """Return logits with what pairs of token id and bias add."""
    logits = logits.copy()
    for token, value in pairs:
        logits[token] += _F32(value)
    return logits


def penalize(logits: np.ndarray, last: Sequence[int], repeat: float, frequency: float, presence: float) -> np.ndarray:
    """Return logits with those of the tokens in `last` made smaller: by a factor, their number, and a constant."""
    ids, counts = np.unique(np.asarray(last, dtype=np.int64), return_counts=True)
    seen = logits[ids]
    seen = np.where(seen <= 0, seen * _F32(repeat), seen / _F32(repeat))
    logits = logits.copy()
    logits[ids] = seen - (counts.astype(_F32) * _F32(frequency) + _F32(presence))
    return logits


def subtract(logits: np.ndarray, ids: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Return logits less the penalties of some tokens."""
    logits = logits.copy()
    logits[ids] -= penalties
    return logits


def top_n_sigma(logits: np.ndarray, n: float) -> np.ndarray:
    """Return logits with -inf for those more than n standard deviations below the largest; n <= 0 changes none."""
    if n <= 0.0 or len(logits) <= 1:
        return logits
    valid = logits if logits.min() > -np.inf else logits[logits > -np.inf]
    n_valid = _F32(len(valid))
    mean = np.cumsum(valid)[-1] / n_valid
    deviations = (valid - mean) ** 2
    sigma = np.sqrt(np.cumsum(deviations)[-1] / n_valid)
    return np.where(logits < valid.max() - _F32(n) * sigma, _F32(-np.inf), logits)


def top_k(candidates: Candidates, k: int) -> Candidates:
    """Return the k with the largest logits, sorted; all as they are for 0."""
    if k == 0:
        return candidates
    if candidates.is_sorted:
        return candidates.take(slice(k))
    return candidates.take(largest(candidates.logits, min(k, len(candidates.ids))), True)


def typical_p(candidates: Candidates, p: float, min_keep: int) -> Candidates:
    """Return those whose surprise is nearest to the entropy, the nearest first, until their sum exceeds p; 1 for all.

    Impossible tokens are left out first: llama.cpp's entropy is not a number where there are any.
    """
    if _F32(p) >= 1.0:
        return candidates
    candidates = candidates.sort()
    probs = softmax(candidates)
    n = int(np.count_nonzero(probs))
    candidates, probs = candidates.take(slice(n)), probs[:n]
    logs = _log(probs)
    entropy = np.cumsum(-probs * logs)[-1]
    order = np.argsort(np.abs(-logs - entropy), kind="stable")
    n = int(np.searchsorted(np.cumsum(probs[order]), _F32(p), side="right")) + 1
    return candidates.take(order[: max(n, min_keep)], False)


def top_p(candidates: Candidates, p: float, min_keep: int) -> Candidates:
    """Return the most probable whose sum reaches p, sorted; all as they are for 1."""
    if _F32(p) >= 1.0:
        return candidates
    probs = softmax(candidates)
    n, n_sorted = len(probs), len(probs)
    if not candidates.is_sorted and n > 4 * _N_FIRST:
        n_sorted = max(_N_FIRST, min(min_keep, n))
    while True:
        order = np.arange(n) if candidates.is_sorted else largest(candidates.logits, n_sorted)
        sums = np.cumsum(probs[order])
        if sums[-1] >= _F32(p) or n_sorted == n:
            n_kept = int(np.searchsorted(sums, _F32(p), side="left")) + 1
            return candidates.take(order[: max(n_kept, min_keep)], True)
        n_sorted = min(16 * n_sorted, n)


def min_p(candidates: Candidates, p: float, min_keep: int) -> Candidates:
    """Return those at least p times as probable as the most probable one; all for 0."""
    if _F32(p) <= 0.0:
        return candidates
    logits = candidates.logits
    least = (logits[0] if candidates.is_sorted else logits.max()) + _F32(math.log(_F32(p)))
    is_kept = logits >= least
    n = int(np.count_nonzero(is_kept))
    if n >= min_keep and not candidates.is_sorted:
        return candidates.take(is_kept)
    return candidates.sort().take(slice(max(n, min_keep)))


def xtc(candidates: Candidates, threshold: float, min_keep: int) -> Candidates:
    """Return them without those at least as probable as the threshold, but with the least probable of these."""
    candidates = candidates.sort()
    n_out = int(np.count_nonzero(softmax(candidates) >= _F32(threshold))) - 1
    if n_out > 0 and len(candidates.ids) - n_out >= min_keep:
        return candidates.take(slice(n_out, None))
    return candidates


def temperature(candidates: Candidates, value: float) -> Candidates:
    """Return them with logits divided by a temperature; for 0 with -inf for all but the first of the largest."""
    if _F32(value) < _MIN_TEMPERATURE:
        logits = np.full_like(candidates.logits, -np.inf)
        best = int(np.argmax(candidates.logits))
        logits[best] = candidates.logits[best]
        return Candidates(candidates.ids, logits)
    return candidates._replace(logits=candidates.logits / _F32(value))


def dynamic_temperature(candidates: Candidates, value: float, delta: float, exponent: float) -> Candidates:
    """Return them with a temperature from value - delta to value + delta, the higher the larger the entropy is."""
    n = len(candidates.ids)
    if n <= 1:
        return candidates
    candidates = candidates.sort()
    probs = softmax(candidates)
    probs = probs[probs > 0]
    entropy = np.cumsum(probs * _log(probs))[-1] / _log(_F32(1) / _F32(n))
    low, high = max(_F32(0), _F32(value) - _F32(delta)), _F32(value) + _F32(delta)
    share = _F32(float(max(entropy, _F32(0))) ** float(_F32(exponent)))
    return temperature(candidates, float(low + (high - low) * share))


def below_surprise(candidates: Candidates, mu: np.floating) -> Candidates:
    """Return those, sorted, before the first whose surprise exceeds mu bits, and at least one."""
    candidates = candidates.sort()
    probs = softmax(candidates)
    surprises = surprise(probs[probs > 0])  # the impossible ones come last: theirs is infinite
    return candidates.take(slice(max(int(np.searchsorted(surprises, mu, side="right")), 1)))


def surprise(probs: np.ndarray) -> np.ndarray:
    """Return -log2 of probabilities over 0, F32."""
    return -np.log2(probs, dtype=np.float64).astype(_F32)
