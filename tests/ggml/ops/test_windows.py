"""Windows and relative positions, against their definitions in NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, Type, ops

RNG = np.random.default_rng(25)
F, H = Type.F32, Type.F16


def some(*shape):
    return RNG.standard_normal(shape, dtype="f")


def parted(x, w):
    """Return the windows of an image [height, width, channels], [windows, w, w, channels]."""
    height, width, channels = x.shape
    x = np.pad(x, [(0, -height % w), (0, -width % w), (0, 0)])
    return x.reshape(x.shape[0] // w, w, -1, w, channels).swapaxes(1, 2).reshape(-1, w, w, channels)


@pytest.mark.parametrize("height, width, w", [(4, 6, 2), (5, 7, 3), (1, 1, 4), (9, 2, 1)])
def test_windows(bench, height, width, w):
    x = some(height, width, 3)
    windows = ops.win_part(bench.ctx, bench.leaf(x), w)
    assert windows.ne == (3, w, w, -(-height // w) * -(-width // w))
    parts, whole = bench.compute(windows, ops.win_unpart(bench.ctx, windows, width, height, w))
    np.testing.assert_array_equal(parts.reshape(-1, w, w, 3), parted(x, w))
    np.testing.assert_array_equal(whole.reshape(x.shape), x)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_get_rel_pos(calc, n):
    table = some(2 * n - 1, 3).astype("e")
    q, k = np.arange(n)[:, None], np.arange(n)
    out = calc(lambda ctx, a: ops.get_rel_pos(ctx, a, n, n), table)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out.reshape(n, n, 3), table[q - k + n - 1])


@pytest.mark.parametrize("op", [ops.add_rel_pos, ops.add_rel_pos_inplace])
@pytest.mark.parametrize("k, w, h, n", [(1, 1, 1, 1), (3, 2, 4, 2), (4, 5, 1, 3)])
def test_add_rel_pos(calc, op, k, w, h, n):
    a, pw, ph = some(n, h * w, k * k), some(n, h, w, k), some(n, h, w, k)
    exact = a.reshape(n, h, w, k, k).astype("d") + pw[..., None, :] + ph[..., None]
    out = calc(op, a, pw, ph)
    # three numbers of up to 4 are added in F32: 2 * 8 * 2^-24
    np.testing.assert_allclose(out.ravel(), exact.ravel(), rtol=0, atol=2e-6)


def test_empty_images():
    ctx = Context(Context.size_for(16))
    assert ops.win_part(ctx, ctx.new_tensor(F, (0, 3, 3)), 2).ne == (0, 2, 2, 4)
    assert ops.win_part(ctx, ctx.new_tensor(F, (2, 3, 0)), 2).ne == (2, 2, 2, 0)
    assert ops.get_rel_pos(ctx, ctx.new_tensor(H, (0, 3)), 2, 2).ne == (0, 2, 2, 1)


def with_numbers(op, *numbers):
    return lambda ctx, a: op(ctx, a, *numbers)


def transposed(op, *numbers):
    return lambda ctx, a: op(ctx, ops.transpose(ctx, a), *numbers)


ADD = ops.add_rel_pos
HUGE = 0x7FFFFFFF


@pytest.mark.parametrize(
    "error, message, call, specs",
    [
        (ShapeError, "win_part: w 0 is less than 1", with_numbers(ops.win_part, 0), [(F, (2, 4, 4))]),
        (DTypeError, "win_part: a must be F32", with_numbers(ops.win_part, 2), [(H, (2, 4, 4))]),
        (ShapeError, "win_part: a must be contiguous", transposed(ops.win_part, 2), [(F, (2, 4, 4))]),
        (ShapeError, "win_part: a must have three dimensions", with_numbers(ops.win_part, 2), [(F, (2, 4, 4, 2))]),
        (ShapeError, f"win_part: too many or too large windows of {HUGE}", with_numbers(ops.win_part, HUGE),
         [(F, (2, 4, 4))]),
        (ShapeError, "win_part: the result is too large", with_numbers(ops.win_part, 1 << 30), [(F, (2, 4, 4))]),
        (ShapeError, "win_unpart: w0 3, h0 0 or w 2 is less than 1", with_numbers(ops.win_unpart, 3, 0, 2),
         [(F, (2, 2, 2, 4))]),
        (ShapeError, "win_unpart: a is not 4 windows of 2 times 2", with_numbers(ops.win_unpart, 3, 4, 2),
         [(F, (2, 2, 2, 3))]),
        (ShapeError, "win_unpart: a is not 1 windows of 3 times 3", with_numbers(ops.win_unpart, 3, 3, 3),
         [(F, (2, 2, 2, 1))]),
        (ShapeError, "win_unpart: a must be contiguous", transposed(ops.win_unpart, 2, 2, 2), [(F, (2, 3, 2, 1))]),
        (DTypeError, "get_rel_pos: a must be F16", with_numbers(ops.get_rel_pos, 2, 2), [(Type.BF16, (4, 3))]),
        (ShapeError, "get_rel_pos: qh 2 and kh 3 must be one number from 1 up", with_numbers(ops.get_rel_pos, 2, 3),
         [(H, (4, 5))]),
        (ShapeError, "get_rel_pos: a must be contiguous, with 5 rows", with_numbers(ops.get_rel_pos, 3, 3),
         [(H, (4, 3))]),
        (ShapeError, "get_rel_pos: a must be contiguous, with 4294967293 rows",
         with_numbers(ops.get_rel_pos, HUGE, HUGE), [(H, (4, 3))]),
        (DTypeError, "add_rel_pos: a, pw and ph must be F32", ADD, [(F, (4, 6)), (H, (2, 2, 3)), (F, (2, 2, 3))]),
        (ShapeError, "add_rel_pos: pw and ph differ", ADD, [(F, (4, 6)), (F, (2, 2, 3)), (F, (2, 3, 2))]),
        (ShapeError, "add_rel_pos: pw and ph do not match a", ADD, [(F, (4, 7)), (F, (2, 2, 3)), (F, (2, 2, 3))]),
        (ShapeError, "add_rel_pos: pw and ph do not match a", ADD,
         [(F, (4, 6, 1, 2)), (F, (2, 2, 3)), (F, (2, 2, 3))]),
        (ShapeError, "add_rel_pos_inplace: a, pw and ph must be contiguous",
         lambda ctx, a, b: ops.add_rel_pos_inplace(ctx, ops.transpose(ctx, a), b, b), [(F, (6, 4)), (F, (2, 2, 3))]),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, specs):
    ctx = Context(Context.size_for(16))
    operands = [ctx.new_tensor(type, ne) for type, ne in specs]
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, *operands)
