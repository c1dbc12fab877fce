"""Low-rank factors of a matrix, or of several at one rank: truncated SVD with NumPy, and the error that they leave.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011, algorithms 4.4 and 5.1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyggml_adapt.weights.lowrank import scale_of

OVERSAMPLING, N_ITERATIONS = 10, 4  # of the subspace iteration: within 0.2 % of the best error on any spectrum tried
_FIRST_RANK, _GROWTH = 16, 4  # ranks tried for a given error
_MARGIN = 1.5  # singular values of a flat spectrum come out too small
_BLOCK = 1 << 20  # elements worked on at a time beside the matrix

Svd = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Factors:
    """What takes the place of one or more matrices [m, n]: each is about alpha / rank * b @ a.

    a: F16 [rank, n] of each matrix.  b: F16 [m, rank] of each.
    error: norm of what is left over the norm of the matrices, all together, with the factors as rounded here.
    """

    rank: int
    error: float
    a: tuple[np.ndarray, ...]
    b: tuple[np.ndarray, ...]


def energy(x: np.ndarray) -> float:
    """Return the sum of the squares of a matrix's elements, added up in F64."""
    rows = max(_BLOCK // x.shape[1], 1)
    return float(sum(np.square(x[i : i + rows], dtype=np.float64).sum() for i in range(0, len(x), rows)))


def truncated_svd(x: np.ndarray, k: int) -> Svd:
    """Return u [m, k], s [k] and v [k, n] such that u * s @ v is close to the best approximation of x at rank k.

    x: F32 [m, n].  Equal input gives equal output, for one NumPy and one number of threads.
    """
    k = min(k, *x.shape)
    if 3 * (k + OVERSAMPLING) >= min(x.shape):
        u, s, v = np.linalg.svd(x, full_matrices=False)
    else:
        start = np.random.default_rng(0).standard_normal((x.shape[1], k + OVERSAMPLING), dtype=np.float32)
        q = np.linalg.qr(x @ start)[0]
        for _ in range(N_ITERATIONS):
            q = np.linalg.qr(x.T @ q)[0]
            q = np.linalg.qr(x @ q)[0]
        u, s, v = np.linalg.svd(q.T @ x, full_matrices=False)
        u = q @ u
    signs = np.sign(
        np.take_along_axis(u, np.abs(u).argmax(axis=0)[None], axis=0)
    )  # the largest of a column is positive
    signs[signs == 0] = 1
    return (u * signs)[:, :k], s[:k], (v * signs.T)[:k]


def fit(matrices: Sequence[np.ndarray], most: int, alpha: float, max_error: float | None) -> Factors | float:
    """Return factors of rank `most` or, for a max_error, of the smallest rank up to `most` that reaches it.

    matrices: F32 [m, n]; each may be made when it is asked for, and is asked for several times.
    Returns the best error found, a float, if no rank up to `most` reaches max_error or F16 cannot hold the factors.
    """
    total = sum(energy(x) for x in matrices)
    k = most if max_error is None else min(most, _FIRST_RANK)
    while True:
        svds = [truncated_svd(x, k) for x in matrices]
        lost = _lost(svds, total)
        if max_error is None:
            found = _rounded(matrices, svds, most, alpha, total)
            return found if np.isfinite(found.error) else found.error
        allowed = max_error**2 * total
        rank = _first(lost, allowed)
        if rank is not None:
            return _reach(matrices, svds, rank, alpha, total, max_error)
        steps = most - k  # each further one takes away no more than the last
        if lost[-1] - steps * _MARGIN * sum(float(s[-1]) ** 2 for _, s, _ in svds) > allowed or k == most:
            return float(np.sqrt(lost[-1] / total))
        k = min(most, _GROWTH * k)


def _lost(svds: Sequence[Svd], total: float) -> np.ndarray:
    """Return the energy that is left at each rank, from 0 on."""
    kept = sum(np.cumsum(np.square(s, dtype=np.float64)) for _, s, _ in svds)
    return np.maximum(total - np.concatenate(([0.0], kept)), 0.0)


def _first(lost: np.ndarray, allowed: float) -> int | None:
    """Return the smallest rank, at least 1, that leaves no more than `allowed`; None if none does."""
    good = np.flatnonzero(lost[1:] <= allowed)
    return int(good[0]) + 1 if good.size else None


def _reach(
    matrices: Sequence[np.ndarray], svds: Sequence[Svd], rank: int, alpha: float, total: float, max_error: float
) -> Factors | float:
    """Return factors of the smallest rank, from `rank` on, whose measured error is max_error at most; else that error.

    What rounding to F16 adds hardly depends on the rank, so it is measured at one rank to choose the next.
    """
    lost = _lost(svds, total)
    while True:
        found = _rounded(matrices, svds, rank, alpha, total)
        if found.error <= max_error:
            return found
        noise = max(found.error**2 * total - lost[rank], 0.0)
        higher = _first(lost, max_error**2 * total - noise) if np.isfinite(noise) else None
        if rank == len(lost) - 1 or higher is None:
            return found.error
        rank = max(rank + 1, higher)


def _rounded(matrices: Sequence[np.ndarray], svds: Sequence[Svd], rank: int, alpha: float, total: float) -> Factors:
    """Return the factors of a rank rounded to F16, with the error that they leave; it is infinite if F16 overflows."""
    a, b, left = [], [], 0.0
    for x, (u, s, v) in zip(matrices, svds, strict=True):
        each = np.sqrt(s[:rank] * np.float32(rank / alpha))  # both factors get the same size, far from F16's limits
        with np.errstate(over="ignore"):
            a.append((each[:, None] * v[:rank]).astype(np.float16))
            b.append((u[:, :rank] * each).astype(np.float16))
        left += _left(x, a[-1], b[-1], scale_of(alpha, rank, 1.0))
    return Factors(rank, float(np.sqrt(left / total)), tuple(a), tuple(b))


def _left(x: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """Return the energy of x - scale * b @ a, infinite if a factor is."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    a = a.astype(np.float32) * np.float32(scale)
    rows = max(_BLOCK // x.shape[1], 1)
    parts = range(0, len(x), rows)
    return sum(energy(x[i : i + rows] - b[i : i + rows].astype(np.float32) @ a) for i in parts)
