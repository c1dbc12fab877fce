"""Convolutions and their columns, against plain loops over positions and offsets."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Type, ops

RNG = np.random.default_rng(63)
# of operands of F16 or BF16, exact in F32, F32 sums of some 60 products
F32 = {"rtol": 1e-4, "atol": 1e-4}
# of operands rounded to 11 bits, some 60 products of about 1, added in F16 by some CPUs
F16 = {"rtol": 1e-2, "atol": 2e-2}
BF16 = {"rtol": 2e-2, "atol": 8e-2}  # as F16, with 8 bits


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def columns(b, k, s, p, d):
    """Return what a kernel of sizes k covers of b [N, C, *sizes]: [N, C, *positions, *k]."""
    n = len(k)
    padded = np.pad(b.astype("d"), [(0, 0), (0, 0), *((each, each) for each in p)])
    out = [(padded.shape[i + 2] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(n)]
    result = np.empty((*b.shape[:2], *out, *k))
    for at in np.ndindex(*out, *k):
        place = tuple(at[i] * s[i] + at[n + i] * d[i] for i in range(n))
        result[(slice(None), slice(None), *at)] = padded[(slice(None), slice(None), *place)]
    return result


def conv(a, b, s, p, d):
    """Return the convolution of b [N, IC, *sizes] with a [OC, IC, *k]: [N, OC, *positions]."""
    n = a.ndim - 2
    cols = np.moveaxis(columns(b, a.shape[2:], s, p, d), 1, n + 1)  # [N, *positions, IC, *k]
    return np.moveaxis(np.tensordot(cols, a.astype("d"), (range(n + 1, 2 * n + 2), range(1, n + 2))), n + 1, 1)


def conv_dw(a, b, s, p, d):
    """Return the convolution of each channel of b [N, C, *sizes] with one of a [C, *k]."""
    each = [conv(a[c][None, None], b[:, c : c + 1], s, p, d) for c in range(b.shape[1])]
    return np.concatenate(each, axis=1)


def same(out, expected, **tolerance):
    np.testing.assert_allclose(out.reshape(expected.shape), expected, **tolerance)


STEPS = [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((1, 3), (2, 0), (2, 2)), ((3, 2), (4, 3), (1, 2))]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("dtype", "to"), [("f", Type.F32), ("f", Type.F16), ("e", Type.F16)])
def test_im2col(calc, steps, dtype, to):
    (s0, s1), (p0, p1), (d0, d1) = steps
    a, b = normal(4, 3, 2, 3), normal(2, 3, 7, 9).astype(dtype)
    out = calc(lambda ctx, a, b: ops.im2col(ctx, a, b, s0, s1, p0, p1, d0, d1, True, to), a, b)
    expected = columns(b, (2, 3), (s1, s0), (p1, p0), (d1, d0)).transpose(0, 2, 3, 1, 4, 5)
    expected = expected.reshape(*expected.shape[:3], -1).astype("f" if to == Type.F32 else "e")
    assert out.dtype == expected.dtype
    np.testing.assert_array_equal(out, expected)
    a, b = normal(4, 3, 3), normal(2, 3, 9).astype(dtype)
    out = calc(lambda ctx, a, b: ops.im2col(ctx, a, b, s0, 0, p0, 0, d0, 0, False, to), a, b)
    expected = columns(b, (3,), (s0,), (p0,), (d0,)).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(out, expected.reshape(*expected.shape[:2], -1).astype(out.dtype))


def test_im2col_of_a_view(calc):
    a, b = normal(1, 2, 2, 2), normal(2, 5, 4, 6)

    def op(ctx, a, b):
        part = ops.view(ctx, b, (6, 4, 2, 2), b.nb[1:], b.nb[2])  # of five channels the second and third
        return ops.im2col(ctx, a, part, 1, 1, 0, 0, 1, 1, True, Type.F32)

    expected = columns(b[:, 1:3], (2, 2), (1, 1), (0, 0), (1, 1)).transpose(0, 2, 3, 1, 4, 5)
    np.testing.assert_array_equal(calc(op, a, b), expected.reshape(*expected.shape[:3], -1).astype("f"))


@pytest.mark.parametrize("steps", STEPS)
def test_im2col_back(calc, steps):
    (s0, s1), (p0, p1), (d0, d1) = steps
    shape = (2, 3, 7, 9)
    for dims in (2, 1):
        kernel = normal(4, 3, 2, 3)[:, :, 0][:, :, :] if dims == 1 else normal(4, 3, 2, 3)
        data = shape if dims == 2 else (2, 3, 9)
        k, s, p, d = ((each[0],) if dims == 1 else each[::-1] for each in ((3, 2), *steps))
        marks = columns(np.arange(1, np.prod(data) + 1).reshape(data), k, s, p, d)  # 0: padding
        order = (0, 2, 3, 1, 4, 5) if dims == 2 else (0, 2, 1, 3)
        grad = normal(*marks.transpose(order).shape)
        expected = np.zeros(np.prod(data) + 1)
        np.add.at(expected, marks.transpose(order).astype(int), grad)
        flat = grad.reshape(*grad.shape[: dims + 1], -1)

        def op(ctx, g, a, dims=dims, data=data):
            rows = (s0, s1, p0, p1 if dims == 2 else 0, d0, d1)
            return ops.im2col_back(ctx, g, a, data[::-1], *rows, dims == 2)

        same(calc(op, flat, kernel), expected[1:].reshape(data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", [Type.F32, Type.F16])
def test_im2col_3d(calc, to):
    a, b = normal(2 * 3, 2, 1, 3), normal(2 * 3, 4, 5, 6)
    s, p, d = (2, 1, 1), (1, 0, 2), (1, 1, 2)
    out = calc(lambda ctx, a, b: ops.im2col_3d(ctx, a, b, 3, *s, *p, *d, to), a, b)
    cols = columns(b.reshape(2, 3, 4, 5, 6), (2, 1, 3), s[::-1], p[::-1], d[::-1]).transpose(0, 2, 3, 4, 1, 5, 6, 7)
    expected = cols.reshape(-1, *cols.shape[2:4], 3 * 2 * 1 * 3).astype(out.dtype)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16])
@pytest.mark.parametrize(("s0", "p0"), [(1, 0), (2, 1), (5, 0), (3, 2)])
def test_col2im_1d(calc, type, s0, p0):
    cols = np.round(normal(6, 3 * 4) * 4) / 4  # whole quarters, whose sums are exact in each type
    expected = np.zeros((3, 5 * s0 + 4))
    for t, oc, k in np.ndindex(6, 3, 4):
        expected[oc, t * s0 + k] += cols[t, oc * 4 + k]
    expected = expected[:, p0 : expected.shape[1] - p0]
    out = calc(lambda ctx, a: ops.cast(ctx, ops.col2im_1d(ctx, a, s0, 3, p0), Type.F32), (cols, type))
    np.testing.assert_array_equal(out, expected)


KERNELS = {Type.F32: F16, Type.F16: F16, Type.BF16: BF16}


@pytest.mark.parametrize("type", KERNELS)
@pytest.mark.parametrize("steps", [(1, 0, 1), (2, 1, 1), (3, 4, 2)])
def test_conv_1d(calc, type, steps):
    each = [(i,) for i in steps]
    a, b = normal(4, 5, 3), normal(1, 5, 11)
    same(calc(lambda ctx, *t: ops.conv_1d(ctx, *t, *steps), (a, type), b), conv(a, b, *each), **KERNELS[type])
    s, _, d = steps
    out = calc(lambda ctx, *t: ops.conv_1d_ph(ctx, *t, s, d), (a, type), b)
    same(out, conv(a, b, (s,), (1,), (d,)), **KERNELS[type])
    a, b = normal(1, 5, 3), normal(2, 5, 11)  # two sequences, one channel
    same(calc(lambda ctx, *t: ops.conv_1d(ctx, *t, *steps), (a, type), b), conv(a, b, *each), **KERNELS[type])


@pytest.mark.parametrize("type", KERNELS)
@pytest.mark.parametrize("steps", [(1, 0, 1), (2, 1, 1), (3, 4, 2)])
@pytest.mark.parametrize("times", [1, 2])
def test_conv_1d_dw(calc, type, steps, times):
    a, b = normal(5 * times, 1, 3), normal(5, 11)
    wide = b.repeat(times, axis=0)[None]
    out = calc(lambda ctx, *t: ops.conv_1d_dw(ctx, *t, *steps), (a, type), b)
    same(out, conv_dw(a[:, 0], wide, *((i,) for i in steps)), **KERNELS[type])
    s, _, d = steps
    out = calc(lambda ctx, *t: ops.conv_1d_dw_ph(ctx, *t, s, d), (a, type), b)
    same(out, conv_dw(a[:, 0], wide, (s,), (1,), (d,)), **KERNELS[type])


@pytest.mark.parametrize("type", KERNELS)
@pytest.mark.parametrize("steps", STEPS)
def test_conv_2d(calc, type, steps):
    (s0, s1), (p0, p1), (d0, d1) = steps
    a, b = normal(4, 3, 2, 3), normal(2, 3, 7, 9)
    out = calc(lambda ctx, *t: ops.conv_2d(ctx, *t, s0, s1, p0, p1, d0, d1), (a, type), b)
    assert out.shape == conv(a, b, (s1, s0), (p1, p0), (d1, d0)).shape
    same(out, conv(a, b, (s1, s0), (p1, p0), (d1, d0)), **KERNELS[type])


@pytest.mark.parametrize("type", KERNELS)
def test_conv_2d_variants(calc, type):
    a, b = normal(4, 3, 2, 3), normal(2, 3, 6, 9)
    same(calc(ops.conv_2d_sk_p0, (a, type), b), conv(a, b, (2, 3), (0, 0), (1, 1)), **KERNELS[type])
    a = normal(4, 3, 5, 3)
    out = calc(ops.conv_2d_s1_ph, (a, type), b)
    assert out.shape == (2, 4, 6, 9)
    same(out, conv(a, b, (1, 1), (2, 1), (1, 1)), **KERNELS[type])


@pytest.mark.parametrize("type", [Type.F16, Type.BF16])
@pytest.mark.parametrize("steps", STEPS)
def test_conv_2d_dw(calc, type, steps):
    (s0, s1), (p0, p1), (d0, d1) = steps
    a, b = normal(5, 1, 2, 3), normal(2, 5, 7, 9)
    out = calc(lambda ctx, *t: ops.conv_2d_dw(ctx, *t, s0, s1, p0, p1, d0, d1), (a, type), b)
    same(out, conv_dw(a[:, 0], b, (s1, s0), (p1, p0), (d1, d0)), **KERNELS[type])


@pytest.mark.parametrize("type", KERNELS)
def test_conv_3d(calc, type):
    a, b = normal(2 * 3, 2, 1, 3), normal(2 * 3, 4, 5, 6)
    s, p, d = (2, 1, 1), (1, 0, 2), (1, 1, 2)
    out = calc(lambda ctx, *t: ops.conv_3d(ctx, *t, 3, *s, *p, *d), (a, type), b)
    expected = conv(a.reshape(2, 3, 2, 1, 3), b.reshape(2, 3, 4, 5, 6), s[::-1], p[::-1], d[::-1])
    same(out, expected, **KERNELS[type])


def new(type, *ne):
    return lambda ctx: ctx.new_tensor(type, ne)


def f32(*ne):
    return new(Type.F32, *ne)


ONE = (1, 1, 0, 0, 1, 1)


@pytest.mark.parametrize(("op", "leaves", "error", "message"), [
    (lambda *t: ops.im2col(*t, *ONE, True, Type.F32), [f32(3, 3, 2), f32(9, 9, 3)], ShapeError, "channels .ne2."),
    (lambda *t: ops.im2col(*t, *ONE, False, Type.F32), [f32(3, 2), f32(9, 3)], ShapeError, "channels .ne1. differ"),
    (lambda *t: ops.im2col(*t, *ONE, True, Type.F32), [f32(3, 3), f32(9, 2)], ShapeError, "b is too small for a in"),
    (lambda *t: ops.im2col(*t, *ONE, True, Type.I32), [f32(3, 3), f32(9, 9)], DTypeError, "columns must be F32 or F16"),
    (
        lambda *t: ops.im2col(*t, *ONE, True, Type.F32),
        [f32(3, 3), new(Type.F16, 9, 9)],
        DTypeError,
        r"im2col: b must be F32, or F16 if the columns are \(a F32, b F16\)",
    ),
    (lambda *t: ops.im2col(*t, *ONE, True, Type.F32), [f32(3, 0), f32(9, 9)], ShapeError, "an operand is empty"),
    (lambda *t: ops.im2col(*t, 1, 1, 0, 1, 1, 1, False, Type.F32), [f32(3), f32(9)], ShapeError, "p1 = 1 with one"),
    (lambda *t: ops.im2col(*t, 5, 5, 0, 0, 1, 1, True, Type.F32), [f32(3, 3), f32(1, 9)], ShapeError, "b is too small"),
    (
        lambda ctx, a, b: ops.im2col(ctx, a, ops.view(ctx, b, (4, 9), b.nb[1:2]), *ONE, True, Type.F32),
        [f32(3, 3), f32(9, 9)],
        ShapeError,
        "the rows of b must be contiguous, and each plane",
    ),
    *(
        (lambda *t, n=n: ops.conv_2d(*t, *n), [f32(3, 3), f32(9, 9)], ShapeError, "conv_2d: stride")
        for n in [(0, 1, 0, 0, 1, 1), (1, 1, -1, 0, 1, 1), (1, 1, 0, 0, 1, 0), (1, 2**30, 0, 0, 1, 1)]
    ),
    (lambda *t: ops.im2col_back(*t, (9, 9), *ONE, True), [f32(9, 7, 6), f32(3, 3)], ShapeError, "a is not the contig"),
    (lambda *t: ops.im2col_back(*t, (9, -9), *ONE, True), [f32(9, 7, 7), f32(3, 3)], ShapeError, "impossible shape"),
    (
        lambda *t: ops.im2col_back(*t, (9, 9), *ONE, True),
        [f32(9, 7, 7), new(Type.I32, 3, 3)],
        DTypeError,
        "im2col_back: a must be F32, b F32 or F16",
    ),
    (
        lambda *t: ops.im2col_3d(*t, 2, *ONE[:3], *ONE[:3], 1, 1, 1, Type.F32),
        [f32(1, 1, 1, 2), f32(9, 9, 9, 3)],
        ShapeError,
        "im2col_3d: IC = 2 channels do not divide ne3",
    ),
    (lambda *t: ops.col2im_1d(*t, 1, 2, 0), [f32(3, 4)], ShapeError, "col2im_1d: oc = 2 does not divide ne0"),
    (lambda *t: ops.col2im_1d(*t, 1, 1, 3), [f32(3, 4)], ShapeError, "col2im_1d: padding 3 leaves nothing"),
    (lambda *t: ops.col2im_1d(*t, 0, 1, 0), [f32(3, 4)], ShapeError, "col2im_1d: stride 0"),
    (lambda *t: ops.col2im_1d(*t, 1, 1, 0), [new(Type.I32, 3, 4)], DTypeError, "col2im_1d: a must be F32, F16 or BF16"),
    (lambda *t: ops.conv_1d(*t, 1, 0, 1), [f32(3, 2, 2), f32(9, 2, 2)], ShapeError, "several sequences"),
    (lambda *t: ops.conv_1d(*t, 1, 0, 1), [new(Type.Q8_0, 32, 2), f32(9, 2)], DTypeError, "conv_1d: a must be F32"),
    (lambda *t: ops.conv_1d_ph(*t, 1, 1), [f32(3, 2), f32(9, 3)], ShapeError, "conv_1d_ph: channels .ne1. differ"),
    (lambda *t: ops.conv_1d_dw(*t, 1, 0, 1), [f32(3, 1, 3), f32(9, 2)], ShapeError, "a.ne2 is not a multiple of b's"),
    (lambda *t: ops.conv_1d_dw(*t, 1, 0, 1), [f32(3, 2, 2), f32(9, 2)], ShapeError, r"a must be \[K, 1, C\]"),
    (lambda *t: ops.conv_2d_dw(*t, *ONE), [f32(3, 3, 1, 2), f32(9, 9, 2)], DTypeError, "a must be F16 or BF16"),
    (
        lambda *t: ops.conv_2d_dw(*t, *ONE),
        [new(Type.F16, 3, 3, 1, 2), f32(9, 9, 3)],
        ShapeError,
        "conv_2d_dw: a must have a kernel for each channel of b",
    ),
    (
        lambda *t: ops.conv_2d(*t, *ONE),
        [new(Type.BF16, 3, 3, 1, 2), new(Type.F16, 9, 9)],
        DTypeError,
        "conv_2d: b must be F32, or F16 if the columns are",
    ),
    (
        lambda *t: ops.conv_3d(*t, 3, *ONE[:3], *ONE[:3], 1, 1, 1),
        [f32(1, 1, 1, 3), f32(2, 2, 2, 4)],
        ShapeError,
        "conv_3d: IC = 3 channels do not divide ne3",
    ),
])  # fmt: skip
def test_refused(bench, op, leaves, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, *(leaf(bench.ctx) for leaf in leaves))
