"""Norms against NumPy in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, Type, ops

RNG = np.random.default_rng(13)


def norm(x, eps, axis=-1):
    x = x - x.mean(axis, keepdims=True)
    return x / np.sqrt((x**2).mean(axis, keepdims=True) + eps)


def rms_norm(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def l2_norm(x, eps):
    return x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), eps)


def group_norm(x, n_groups, eps):
    groups = np.array_split(x, range(-(-x.shape[-3] // n_groups), x.shape[-3], -(-x.shape[-3] // n_groups)), axis=-3)
    return np.concatenate([norm(each, eps, (-3, -2, -1)) for each in groups], axis=-3)


NORMS = {"norm": norm, "rms_norm": rms_norm, "l2_norm": l2_norm}


# The sums of F32 are kept in F32 or F64: 1e-6 of each row's size, which is about 1 after the norm.
@pytest.mark.parametrize("eps", [0.0, 1e-5, 2.5])
@pytest.mark.parametrize("name", NORMS)
def test_rows(bench, name, eps):
    x = RNG.standard_normal((3, 2, 5, 33), dtype="f") + 1
    a = bench.leaf(x)
    part = ops.view(bench.ctx, a, (31, 4, 2), a.nb[1:3], 8)
    turned = ops.permute(bench.ctx, a, 0, 2, 1, 3)
    outs = [getattr(ops, name)(bench.ctx, each, eps) for each in (a, part, turned)]
    assert outs[0].ne == a.ne and outs[2].ne == (33, 2, 5, 3)
    outs.append(getattr(ops, f"{name}_inplace")(bench.ctx, bench.leaf(x), eps))
    whole, of_part, of_turned, over = bench.compute(*outs)
    d = x.astype("d")
    for got, rows in [(whole, d), (of_part, d[0, :2, :4, 2:]), (of_turned, d.swapaxes(1, 2)), (over, d)]:
        np.testing.assert_allclose(got, NORMS[name](rows, eps), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["norm", "l2_norm"])
def test_rows_that_are_not_contiguous(bench, name):
    x, over = (RNG.standard_normal((4, 7), dtype="f") for _ in range(2))
    a, b = bench.leaf(x), bench.leaf(over)
    got, view = bench.compute(
        getattr(ops, name)(bench.ctx, ops.transpose(bench.ctx, a), 1e-5),
        ops.transpose(bench.ctx, getattr(ops, f"{name}_inplace")(bench.ctx, ops.transpose(bench.ctx, b), 1e-5)),
    )
    np.testing.assert_allclose(got, NORMS[name](x.T.astype("d"), 1e-5), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(view, NORMS[name](over.T.astype("d"), 1e-5).T, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n_groups, n_channels", [(1, 5), (2, 6), (3, 7), (5, 5), (1, 1)])
def test_group_norm(bench, n_groups, n_channels):
    x = RNG.standard_normal((2, n_channels, 3, 7), dtype="f") - 1
    a = bench.leaf(x)
    part = ops.view(bench.ctx, a, (5, 2, n_channels), a.nb[1:3], 4)
    got, of_part, over = bench.compute(
        ops.group_norm(bench.ctx, a, n_groups, 1e-5),
        ops.group_norm(bench.ctx, part, n_groups, 1e-5),
        ops.group_norm_inplace(bench.ctx, bench.leaf(x), n_groups, 1e-5),
    )
    np.testing.assert_allclose(got, group_norm(x.astype("d"), n_groups, 1e-5), rtol=1e-5, atol=2e-6)
    exact = group_norm(x[0, :, :2, 1:6].astype("d"), n_groups, 1e-5)
    np.testing.assert_allclose(of_part.reshape(exact.shape), exact, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(over, got)


def test_rms_norm_back_is_the_slope_of_rms_norm(calc):
    dy, x = RNG.standard_normal((2, 3, 2, 17))
    got = calc(lambda ctx, a, b: ops.rms_norm_back(ctx, a, b, 0.01), dy.astype("f"), x.astype("f"))
    dy, x, step = dy.astype("f").astype("d"), x.astype("f").astype("d"), 1e-5
    for k in range(17):
        move = step * np.eye(17)[k]
        slope = ((rms_norm(x + move, 0.01) - rms_norm(x - move, 0.01)) * dy).sum(-1) / (2 * step)
        np.testing.assert_allclose(got[..., k], slope, rtol=1e-4, atol=1e-5)  # of differences, and of F32


def test_empty_rows(bench):
    a = bench.leaf(np.zeros((3, 0), "f"))
    outs = [
        ops.norm(bench.ctx, a, 1),
        ops.group_norm(bench.ctx, a, 1, 1),
        ops.neg(bench.ctx, bench.leaf(np.ones(1, "f"))),
    ]
    assert [each.shape for each in bench.compute(*outs)] == [(3, 0), (3, 0), (1,)]


def transposed(op):
    return lambda ctx, a, *more: op(ctx, ops.transpose(ctx, a), *more)


def call(name, *args):
    return lambda ctx, *operands: getattr(ops, name)(ctx, *operands, *args)


F = Type.F32
ALL = [(n + end, ()) for n in NORMS for end in ("", "_inplace")] + [("group_norm", (1,)), ("group_norm_inplace", (1,))]
REFUSED = [
    *((call(n, *args, 0), [(Type.F16, (4,))], DTypeError, f"{n}: a must be F32") for n, args in ALL),
    *(
        (call(n, *args, eps), [(F, (4,))], ShapeError, f"{n}: eps {eps} is not a number from 0 up")
        for n, args in ALL
        for eps in (-1.0, float("nan"))
    ),
    *(
        (transposed(call(n, *args, 0)), [(F, (4, 3))], ShapeError, f"{n}: the rows of a must be contiguous")
        for n, args in [ALL[2], ALL[3], ALL[6], ALL[7]]
    ),
    *(
        (
            lambda ctx, a, n=n, args=args: call(n, *args, 0)(ctx, ops.view(ctx, a, (4, 3), (0,))),
            [(F, (12,))],
            ShapeError,
            f"{n}: elements of a share memory: it cannot be written in place",
        )
        for n, args in ALL[1::2]
    ),
    *(
        (call("group_norm", k, 0), [(F, (4, 3, n))], ShapeError, f"group_norm: ne2 cannot be divided into {k} groups")
        for k, n in [(0, 4), (-1, 4), (5, 4), (3, 4), (2, 0), (2**31 - 1, 4), (-(2**31), 4)]
    ),
    (call("rms_norm_back", 0), [(F, (4, 3)), (F, (4,))], ShapeError, "rms_norm_back: shapes differ"),
    (call("rms_norm_back", -1), [(F, (4,))] * 2, ShapeError, "rms_norm_back: eps -1.0 is not a number from 0 up"),
    (call("rms_norm_back", 0), [(F, (4,)), (Type.BF16, (4,))], DTypeError, "rms_norm_back: b must be F32"),
    (
        lambda ctx, a, b: ops.rms_norm_back(ctx, a, ops.transpose(ctx, b), 0),
        [(F, (4, 3)), (F, (3, 4))],
        ShapeError,
        "rms_norm_back: the rows of b must be contiguous",
    ),
]


@pytest.mark.parametrize("op, specs, error, message", REFUSED)
def test_refused(op, specs, error, message):
    ctx = Context(Context.size_for(16))
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        op(ctx, *(ctx.new_tensor(type, ne) for type, ne in specs))
