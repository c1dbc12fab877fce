"""Direct and transposed convolutions, against plain loops over positions and offsets."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Type, ops

RNG = np.random.default_rng(64)
# F32 sums of some 60 products; of F16 kernels the data too is rounded to 11 bits
TOLERANCE = {Type.F32: {"rtol": 1e-4, "atol": 1e-5}, Type.F16: {"rtol": 1e-2, "atol": 2e-2}}
STEPS = [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 1)), ((1, 3), (2, 0), (2, 2)), ((3, 2), (4, 3), (1, 2))]


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def conv(a, b, s, p, d):
    """Return the convolution of b [N, IC, *sizes] with a [OC, IC, *k]: [N, OC, *positions]."""
    k = a.shape[2:]
    n = len(k)
    padded = np.pad(b.astype("d"), [(0, 0), (0, 0), *((each, each) for each in p)])
    out = [(padded.shape[i + 2] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(n)]
    result = np.zeros((b.shape[0], a.shape[0], *out))
    for at in np.ndindex(*out, *k):
        place = tuple(at[i] * s[i] + at[n + i] * d[i] for i in range(n))
        result[(..., *at[:n])] += padded[(slice(None), slice(None), *place)] @ a[(..., *at[n:])].T
    return result


def transposed(a, b, s):
    """Return the transposed convolution of b [N, IC, *sizes] with a [IC, OC, *k]: [N, OC, *positions]."""
    k, n = a.shape[2:], a.ndim - 2
    result = np.zeros((b.shape[0], a.shape[1], *((b.shape[i + 2] - 1) * s + k[i] for i in range(n))))
    for at in np.ndindex(*b.shape[2:], *k):
        place = tuple(at[i] * s + at[n + i] for i in range(n))
        result[(..., *place)] += b[(..., *at[:n])].astype("d") @ a[(..., *at[n:])]
    return result


def same(out, expected, **tolerance):
    np.testing.assert_allclose(out.reshape(expected.shape), expected, **tolerance)


@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize(("s0", "k"), [(1, 3), (2, 4), (5, 2)])
def test_conv_transpose_1d(calc, type, s0, k):
    a, b = normal(37, 3, k), normal(37, 7)
    out = calc(lambda ctx, *t: ops.conv_transpose_1d(ctx, *t, s0), (a, type), b)
    same(out, transposed(a, b[None], s0), **TOLERANCE[type])


@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_conv_transpose_2d_p0(calc, type, stride):
    a, b = normal(19, 3, 2, 4), normal(2, 19, 5, 3)
    out = calc(lambda ctx, *t: ops.conv_transpose_2d_p0(ctx, *t, stride), (a, type), b)
    same(out, transposed(a, b, stride), **TOLERANCE[type])


@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize("steps", STEPS)
def test_conv_2d_direct(calc, type, steps):
    (s0, s1), (p0, p1), (d0, d1) = steps
    a, b = normal(4, 3, 2, 3), normal(2, 3, 7, 9)
    out = calc(lambda ctx, *t: ops.conv_2d_direct(ctx, *t, s0, s1, p0, p1, d0, d1), (a, type), b)
    same(out, conv(a, b, (s1, s0), (p1, p0), (d1, d0)), **TOLERANCE[type])


def test_conv_2d_direct_of_a_view(calc):
    a, b = normal(4, 3, 2, 3), normal(2, 7, 9, 3)  # channels inside
    out = calc(lambda ctx, a, b: ops.conv_2d_direct(ctx, a, ops.permute(ctx, b, 2, 0, 1, 3), 1, 1, 0, 0, 1, 1), a, b)
    same(out, conv(a, b.transpose(0, 3, 1, 2), (1, 1), (0, 0), (1, 1)), **TOLERANCE[Type.F32])


def test_conv_2d_direct_in_batches(calc):
    a, b = normal(2, 256, 5, 5), normal(1, 256, 31, 31)  # 729 patches of 25 KiB: more than the kernel's memory takes
    out = calc(lambda ctx, a, b: ops.conv_2d_direct(ctx, a, b, 1, 1, 0, 0, 1, 1), a, b)
    same(out, conv(a, b, (1, 1), (0, 0), (1, 1)), rtol=1e-4, atol=2e-3)  # sums of 6400 products


@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize("steps", [((1, 1, 1), (0, 0, 0), (1, 1, 1)), ((2, 1, 1), (1, 0, 2), (1, 1, 2))])
def test_conv_3d_direct(calc, type, steps):
    a, b = normal(2 * 3, 2, 1, 3), normal(2 * 3, 4, 5, 6)
    out = calc(lambda ctx, *t: ops.conv_3d_direct(ctx, *t, *sum(steps, ()), 3, 2, 2), (a, type), b)
    expected = conv(a.reshape(2, 3, 2, 1, 3), b.reshape(2, 3, 4, 5, 6), *(each[::-1] for each in steps))
    same(out, expected, **TOLERANCE[type])


@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("channels", [3, 19])
def test_conv_2d_dw_direct(calc, type, steps, inside, channels):
    (s0, s1), (p0, p1), (d0, d1) = steps
    a, b = normal(channels, 1, 2, 3), normal(2, channels, 7, 9)

    def op(ctx, a, b):
        if inside:
            a, b = ops.permute(ctx, a, 3, 2, 0, 1), ops.permute(ctx, b, 2, 0, 1, 3)
        return ops.conv_2d_dw_direct(ctx, a, b, s0, s1, p0, p1, d0, d1)

    given = (a.transpose(2, 3, 1, 0), b.transpose(0, 2, 3, 1)) if inside else (a, b)
    each = [conv(a[c][None], b[:, c : c + 1], (s1, s0), (p1, p0), (d1, d0)) for c in range(channels)]
    # of F16 kernels the data stays F32 here
    tolerance = {"rtol": 2e-3, "atol": 4e-3} if type == Type.F16 else TOLERANCE[type]
    same(calc(op, (given[0], type), given[1]), np.concatenate(each, axis=1), **tolerance)


def new(type, *ne):
    return lambda ctx: ctx.new_tensor(type, ne)


def f32(*ne):
    return new(Type.F32, *ne)


ONE = (1, 1, 0, 0, 1, 1)
ONES = (1, 1, 1, 0, 0, 0, 1, 1, 1)


def transposed_rows(op):
    return lambda ctx, a, b: op(ctx, a, ops.transpose(ctx, b))


def permuted_data(ctx, a, b):
    return ops.conv_2d_dw_direct(ctx, a, ops.permute(ctx, b, 0, 1, 3, 2), *ONE)


@pytest.mark.parametrize(("op", "leaves", "error", "message"), [
    (lambda *t: ops.conv_transpose_1d(*t, 0), [f32(3, 2, 4), f32(9, 4)], ShapeError, "conv_transpose_1d: stride 0 is"),
    (lambda *t: ops.conv_transpose_1d(*t, 1, 1), [f32(3, 2, 4), f32(9, 4)], ShapeError, "padding 1 not 0"),
    (lambda *t: ops.conv_transpose_1d(*t, 1, 0, 2), [f32(3, 2, 4), f32(9, 4)], ShapeError, "dilation 2 not 1"),
    (
        lambda *t: ops.conv_transpose_1d(*t, 1),
        [f32(3, 2, 4), f32(9, 3)],
        ShapeError,
        r"a must be \[K, OC, IC\], b \[L, IC\] \(a \[3, 2, 4, 1\], b \[9, 3, 1, 1\]\)",
    ),
    (lambda *t: ops.conv_transpose_1d(*t, 1), [new(Type.BF16, 3, 2, 4), f32(9, 4)], DTypeError, "a must be F32 or F16"),
    (
        transposed_rows(lambda *t: ops.conv_transpose_1d(*t, 1)),
        [f32(3, 2, 4), f32(4, 9)],
        ShapeError,
        "conv_transpose_1d: the rows of a and b must be contiguous",
    ),
    (lambda *t: ops.conv_transpose_1d(*t, 2**28), [f32(3, 2), f32(9)], ShapeError, "the result is too large"),
    (lambda *t: ops.conv_transpose_2d_p0(*t, 0), [f32(3, 3), f32(9, 9)], ShapeError, "stride 0 is not from 1"),
    (lambda *t: ops.conv_transpose_2d_p0(*t, 1), [f32(3, 3, 1, 2), f32(9, 9)], ShapeError, "channels .* differ"),
    (
        lambda ctx, a, b: ops.conv_transpose_2d_p0(ctx, ops.view(ctx, a, (3, 3), a.nb[1:2]), b, 1),
        [f32(4, 3), f32(9, 9)],
        ShapeError,
        "the planes of a must be contiguous",
    ),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [f32(3, 3, 2), f32(9, 9)], ShapeError, "conv_2d_direct: channels .ne2."),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [new(Type.BF16, 3), f32(9)], DTypeError, "conv_2d_direct: a must be F32"),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [f32(3), new(Type.F16, 9)], DTypeError, "conv_2d_direct: a must be F32"),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [f32(2048, 2049), f32(2048, 2049)], ShapeError, "a is too large"),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [f32(3), f32(0)], ShapeError, "conv_2d_direct: an operand is empty"),
    (lambda *t: ops.conv_2d_direct(*t, *ONE), [f32(3), f32(2)], ShapeError, "b is too small for a in ne0"),
    (lambda *t: ops.conv_3d_direct(*t, *ONES, 2, 1, 1), [f32(1), f32(1)], ShapeError, "ne3 is not of 2 channels"),
    (lambda *t: ops.conv_3d_direct(*t, *ONES, 1, -1, 1), [f32(1), f32(1)], ShapeError, "ne3 is not of 1 channels"),
    (lambda *t: ops.conv_2d_dw_direct(*t, *ONE), [f32(3, 3, 2), f32(9, 9, 2)], ShapeError, r"a must be \[KW, KH, 1, C"),
    (
        permuted_data,
        [f32(3, 3, 1, 2), f32(9, 9, 2, 2)],
        ShapeError,
        "a and b must both be contiguous, or both with channels inside",
    ),
])  # fmt: skip
def test_refused(bench, op, leaves, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, *(leaf(bench.ctx) for leaf in leaves))
