"""Pooling against plain loops over windows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import OpPool, Type, ops

RNG = np.random.default_rng(65)
F32 = {"rtol": 1e-6, "atol": 1e-6}  # means of up to 12 elements


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def windows(n, k, s, p):
    """Return the elements, of n, that each window covers; of a half padding the larger part is behind."""
    starts = range(-math.floor(p), n + math.ceil(p) - k + 1, s)
    return [[i for i in range(at, at + k) if 0 <= i < n] for at in starts]


def pool_1d(x, op, k, s, p):
    take = np.max if op == OpPool.MAX else np.mean  # padding does not count
    return np.stack([take(x[..., w].astype("d"), axis=-1) for w in windows(x.shape[-1], k, s, p)], axis=-1)


def pool_2d(x, op, k, s, p):
    """Return x [..., H, W] pooled; k, s and p as (width, height)."""
    across, down = windows(x.shape[-1], k[0], s[0], p[0]), windows(x.shape[-2], k[1], s[1], p[1])
    out = np.empty((*x.shape[:-2], len(down), len(across)))
    for j, i in np.ndindex(out.shape[-2:]):
        part = x[..., down[j], :][..., across[i]].astype("d")
        out[..., j, i] = part.max(axis=(-1, -2)) if op == OpPool.MAX else part.sum(axis=(-1, -2)) / (k[0] * k[1])
    return out


@pytest.mark.parametrize("op", OpPool)
@pytest.mark.parametrize("dtype", ["f", "e"])
@pytest.mark.parametrize(("k", "s", "p"), [(1, 1, 0), (2, 2, 0), (3, 1, 1), (4, 3, 3), (11, 5, 0)])
def test_pool_1d(calc, op, dtype, k, s, p):
    x = normal(2, 3, 4, 11).astype(dtype)
    np.testing.assert_allclose(calc(lambda ctx, a: ops.pool_1d(ctx, a, op, k, s, p), x), pool_1d(x, op, k, s, p), **F32)


SIZES = [
    ((1, 1), (1, 1), (0, 0)),
    ((2, 3), (2, 1), (0, 1)),
    ((3, 4), (1, 3), (2, 3)),
    ((2, 2), (1, 1), (0.5, 0.5)),
    ((4, 3), (2, 2), (1.5, 0)),
]


@pytest.mark.parametrize("op", OpPool)
@pytest.mark.parametrize("dtype", ["f", "e"])
@pytest.mark.parametrize("size", SIZES)
def test_pool_2d(calc, op, dtype, size):
    x = normal(2, 3, 7, 9).astype(dtype)
    out = calc(lambda ctx, a: ops.pool_2d(ctx, a, op, *size[0], *size[1], *size[2]), x)
    np.testing.assert_allclose(out, pool_2d(x, op, *size), **F32)


@pytest.mark.parametrize("op", OpPool)
@pytest.mark.parametrize("size", SIZES)
def test_pool_2d_back(calc, op, size):
    x = normal(2, 3, 7, 9)
    grad = normal(*pool_2d(x, op, *size).shape)
    out = calc(lambda ctx, g, f: ops.pool_2d_back(ctx, g, f, op, *size[0], *size[1], *size[2]), grad, x)
    (k0, k1), (s0, s1), (p0, p1) = size
    across, down = windows(9, k0, s0, p0), windows(7, k1, s1, p1)
    expected = np.zeros(x.shape)
    for n, c, j, i in np.ndindex(grad.shape):
        covered = [(y, z) for y in down[j] for z in across[i]]
        if op == OpPool.MAX:
            expected[(n, c, *max(covered, key=lambda at: x[(n, c, *at)]))] += grad[n, c, j, i]
        else:
            for at in covered:
                expected[(n, c, *at)] += grad[n, c, j, i] / (k0 * k1)
    np.testing.assert_allclose(out, expected, **F32)


def new(type, *ne):
    return lambda ctx: ctx.new_tensor(type, ne)


def f32(*ne):
    return new(Type.F32, *ne)


MAX = OpPool.MAX


@pytest.mark.parametrize(("op", "leaves", "error", "message"), [
    (lambda *t: ops.pool_1d(*t, 2, 1, 1, 0), [f32(4)], ShapeError, "pool_1d: 2 is neither OpPool.MAX nor OpPool.AVG"),
    (lambda *t: ops.pool_1d(*t, MAX, 0, 1, 0), [f32(4)], ShapeError, "pool_1d: window 0 and stride 1"),
    (lambda *t: ops.pool_1d(*t, MAX, 1, 0, 0), [f32(4)], ShapeError, "pool_1d: window 1 and stride 0"),
    (lambda *t: ops.pool_1d(*t, MAX, 2, 1, 2), [f32(4)], ShapeError, "or padding 2 not whole"),
    (lambda *t: ops.pool_1d(*t, MAX, 2, 1, -1), [f32(4)], ShapeError, "or padding -1 not whole"),
    (lambda *t: ops.pool_1d(*t, MAX, 5, 1, 0), [f32(4)], ShapeError, "a is smaller than the window 5"),
    (lambda *t: ops.pool_1d(*t, MAX, 1, 1, 0), [f32(2**24 + 1)], ShapeError, "pool_1d: a is too large"),
    (lambda *t: ops.pool_1d(*t, MAX, 1, 1, 0), [new(Type.BF16, 4)], DTypeError, "pool_1d: a must be F32 or F16"),
    (
        lambda ctx, a: ops.pool_1d(ctx, ops.permute(ctx, a, 0, 2, 1, 3), MAX, 1, 1, 0),
        [f32(4, 3, 2)],
        ShapeError,
        "pool_1d: the rows of a must be contiguous, at one distance",
    ),
    *(
        (lambda *t, p=p: ops.pool_2d(*t, MAX, 2, 2, 1, 1, p, 0), [f32(4, 4)], ShapeError, "pool_2d: window 2")
        for p in (math.nan, math.inf, -1, 0.25, 1.5, 1e38)
    ),
    (
        lambda ctx, a: ops.pool_2d(ctx, ops.view(ctx, a, (4, 3), a.nb[1:2]), MAX, 1, 1, 1, 1, 0, 0),
        [f32(5, 3)],
        ShapeError,
        "pool_2d: a must be contiguous, and not empty",
    ),
    (
        lambda ctx, a: ops.pool_2d(ctx, ops.view(ctx, a, (4, 3), (16, 0)), MAX, 1, 1, 1, 1, 0, 0),
        [f32(4, 3)],
        ShapeError,
        "pool_2d: a must be contiguous, and not empty",
    ),
    (lambda *t: ops.pool_2d(*t, MAX, 1, 1, 1, 1, 0, 0), [f32(4, 3, 0)], ShapeError, "pool_2d: a must be contiguous"),
    (
        lambda *t: ops.pool_2d_back(*t, MAX, 2, 2, 2, 2, 0, 0),
        [f32(2, 2), f32(4, 6)],
        ShapeError,
        "pool_2d_back: a has not the shape of af, pooled",
    ),
    (
        lambda *t: ops.pool_2d_back(*t, MAX, 2, 2, 2, 2, 0, 0),
        [f32(2, 2), new(Type.F16, 4, 4)],
        DTypeError,
        "pool_2d_back: a and af must be F32",
    ),
])  # fmt: skip
def test_refused(bench, op, leaves, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, *(leaf(bench.ctx) for leaf in leaves))
