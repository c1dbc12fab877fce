"""Triangles and diagonals, against NumPy's."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, TriType, Type, ops

RNG = np.random.default_rng(23)
F, H = Type.F32, Type.F16


def some(*shape):
    return RNG.standard_normal(shape, dtype="f")


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_diag(calc, n):
    x = some(2, 3, 1, n)
    np.testing.assert_array_equal(calc(ops.diag, x), x * np.eye(n, dtype="f"))


def test_diag_of_a_view(bench):
    x = some(3, 4, 5)
    t = bench.leaf(x)
    (out,) = bench.compute(ops.diag(bench.ctx, ops.view(bench.ctx, t, (4, 1, 3), (t.nb[1], t.nb[2]), t.nb[1] + 4)))
    np.testing.assert_array_equal(out, x[:, 1:2, 1:] * np.eye(4, dtype="f"))


@pytest.mark.parametrize("n_past", [0, 1, 3, 20, 0x7FFFFFFF])
@pytest.mark.parametrize("op, value", [("diag_mask_inf", -np.inf), ("diag_mask_zero", 0)])
@pytest.mark.parametrize("inplace", ["", "_inplace"])
def test_diag_mask(calc, op, value, inplace, n_past):
    x = some(2, 3, 5, 7)
    exact = np.where(np.arange(7) > n_past + np.arange(5)[:, None], np.float32(value), x)
    np.testing.assert_array_equal(calc(lambda ctx, a: getattr(ops, op + inplace)(ctx, a, n_past), x), exact)


def test_diag_mask_inplace_of_a_view(bench):
    x = some(2, 3, 5, 7)
    t = bench.leaf(x)
    bench.compute(ops.diag_mask_zero_inplace(bench.ctx, ops.view(bench.ctx, t, (6, 4, 3, 2), t.nb[1:], 4), 1))
    x[:, :, :4, 1:] = np.where(np.arange(6) > 1 + np.arange(4)[:, None], 0, x[:, :, :4, 1:])
    np.testing.assert_array_equal(t.to_numpy(), x)


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_tri(calc, n):
    x = some(2, 3, n, n)
    for type, exact in (
        (TriType.LOWER, np.tril(x, -1)), (TriType.LOWER_DIAG, np.tril(x)),
        (TriType.UPPER, np.triu(x, 1)), (TriType.UPPER_DIAG, np.triu(x)),
    ):  # fmt: skip
        np.testing.assert_array_equal(calc(lambda ctx, a, type=type: ops.tri(ctx, a, type), x), exact)


def test_empty():
    ctx = Context(Context.size_for(16))
    empty = ctx.new_tensor(F, (0, 1))
    assert ops.diag(ctx, empty).ne == (0, 0, 1, 1)
    assert ops.diag_mask_inf(ctx, empty, 0).ne == (0, 1, 1, 1)
    assert ops.tri(ctx, ctx.new_tensor(F, (0, 0)), 0).ne == (0, 0, 1, 1)


def mask(op, n_past=0):
    return lambda ctx, a: op(ctx, a, n_past)


@pytest.mark.parametrize(
    "error, message, call, spec",
    [
        (DTypeError, "diag: a must be F32", ops.diag, (H, (4,))),
        (ShapeError, "diag: a must have one row in each matrix, and dimensions that fit in an int", ops.diag,
         (F, (4, 2))),
        (ShapeError, "diag: the result is too large", ops.diag, (F, (1 << 22,))),
        (DTypeError, "diag_mask_inf: a must be F32", mask(ops.diag_mask_inf), (H, (4,))),
        (ShapeError, "diag_mask_zero: n_past -1 is negative", mask(ops.diag_mask_zero, -1), (F, (4,))),
        (ShapeError, "diag_mask_inf: a must be contiguous",
         lambda ctx, a: ops.diag_mask_inf(ctx, ops.view(ctx, a, (4, 2), (32,)), 0), (F, (4, 4))),
        (ShapeError, "diag_mask_zero_inplace: the rows of a must be contiguous",
         lambda ctx, a: ops.diag_mask_zero_inplace(ctx, ops.transpose(ctx, a), 0), (F, (4, 3))),
        (ShapeError, "diag_mask_inf_inplace: the matrices of a must lie at one distance",
         lambda ctx, a: ops.diag_mask_inf_inplace(ctx, ops.permute(ctx, a, 0, 1, 3, 2), 0), (F, (4, 3, 2, 2))),
        (ShapeError, "diag_mask_inf: a dimension is too large", mask(ops.diag_mask_inf), (F, (1 << 31,))),
        (ShapeError, "tri: 4 is not a TriType", lambda ctx, a: ops.tri(ctx, a, 4), (F, (4, 4))),
        (ShapeError, "tri: a must be square matrices, contiguous", lambda ctx, a: ops.tri(ctx, a, 0), (F, (4, 3))),
        (DTypeError, "tri: a must be F32", lambda ctx, a: ops.tri(ctx, a, 0), (H, (4, 4))),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, spec):
    ctx = Context(Context.size_for(16))
    a = ctx.new_tensor(*spec)
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, a)
