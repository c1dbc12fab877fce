"""Joining, repeating, padding and rolling against NumPy; scaling against its formula in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, ScaleFlag, ScaleMode, Type, ops

RNG = np.random.default_rng(24)
F, H, I = Type.F32, Type.F16, Type.I32  # noqa: E741
NEAREST, BILINEAR, BICUBIC = ScaleMode.NEAREST, ScaleMode.BILINEAR, ScaleMode.BICUBIC


def some(*shape):
    return RNG.standard_normal(shape, dtype="f")


@pytest.mark.parametrize("type", [Type.Q8_0, Type.MXFP4, Type.Q4_K, Type.Q8_1], ids=lambda type: type.name)
@pytest.mark.parametrize("dim", range(4))
def test_concat_of_blocks(bench, type, dim):
    shapes = [[2, 3, 4, 2 * 256], [2, 3, 4, 2 * 256]]
    shapes[1][3 - dim] //= 2 if dim != 1 else 3
    arrays = [RNG.integers(0, 256, (*shape[:3], type.row_size(shape[3])), dtype="u1") for shape in shapes]
    leaves = [bench.ctx.new_tensor(type, shape[::-1]).set_input() for shape in shapes]
    bench._fill += zip(leaves, arrays, strict=True)
    (out,) = bench.compute(ops.concat(bench.ctx, *leaves, dim))
    np.testing.assert_array_equal(out, np.concatenate(arrays, 3 - dim))


@pytest.mark.parametrize("dim", range(4))
def test_concat_of_views(bench, dim):
    a, b = some(4, 4, 4, 4), some(4, 4, 4, 4)
    ta, tb = ops.transpose(bench.ctx, bench.leaf(a)), bench.leaf(b)
    tb = ops.permute(bench.ctx, tb, 2, 1, 0, 3)
    (out,) = bench.compute(ops.concat(bench.ctx, ta, tb, dim))
    np.testing.assert_array_equal(out, np.concatenate([a.swapaxes(2, 3), b.swapaxes(1, 3)], 3 - dim))


@pytest.mark.parametrize("dtype", ["f", "e", "i"])
def test_repeat_fills_a_shape(calc, dtype):
    x, like = (some(2, 1, 3, 5) * 50).astype(dtype), np.zeros((4, 3, 6, 5), "f")
    np.testing.assert_array_equal(calc(ops.repeat, x, like), np.tile(x, (2, 3, 2, 1)))


def test_repeat_back(calc):
    x, like = some(4, 3, 6, 10), np.zeros((2, 1, 3, 5), "e")
    exact = x.astype("d").reshape(2, 2, 3, 1, 2, 3, 2, 5).sum((0, 2, 4, 6))
    # sums of 24 numbers of some 1 in F32: 24 * 24 * 2^-24 at most
    np.testing.assert_allclose(calc(ops.repeat_back, x, like), exact, rtol=0, atol=4e-5)


@pytest.mark.parametrize("p", [(0, 0, 0, 0, 0, 0, 0, 0), (3, 0, 0, 1, 0, 0, 2, 0), (1, 2, 3, 4, 2, 1, 1, 5)])
def test_pad_ext(bench, p):
    x = some(2, 3, 4, 5)
    t = bench.leaf(x)
    width = [(p[6], p[7]), (p[4], p[5]), (p[2], p[3]), (p[0], p[1])]
    zeros, turned, wrapped = bench.compute(
        ops.pad_ext(bench.ctx, t, *p),
        ops.pad_ext(bench.ctx, ops.transpose(bench.ctx, t), *p),
        ops.pad_ext_circular(bench.ctx, t, *p),
    )
    np.testing.assert_array_equal(zeros, np.pad(x, width))
    np.testing.assert_array_equal(turned, np.pad(x.swapaxes(2, 3), width))
    np.testing.assert_array_equal(wrapped, np.pad(x, width, mode="wrap"))


@pytest.mark.parametrize("p", [(0, 0, 0, 0), (11, 2, 0, 7)])
def test_pad_circular(calc, p):
    x = some(2, 3, 4, 5)
    out = calc(lambda ctx, a: ops.pad_circular(ctx, ops.transpose(ctx, a), *p), x)
    np.testing.assert_array_equal(out, np.pad(x.swapaxes(2, 3), [(0, n) for n in p[::-1]], mode="wrap"))


@pytest.mark.parametrize("p", [(0, 0), (1, 3), (4, 4)])
def test_pad_reflect_1d(calc, p):
    x = some(2, 3, 4, 5)
    out = calc(lambda ctx, a: ops.pad_reflect_1d(ctx, a, *p), x)
    np.testing.assert_array_equal(out, np.pad(x, [(0, 0)] * 3 + [p], mode="reflect"))


@pytest.mark.parametrize("shifts", [(0, 0, 0, 0), (1, -1, 2, 0), (-4, 3, -2, 1)])
def test_roll(bench, shifts):
    x = some(2, 3, 4, 5)
    t = bench.leaf(x)
    whole, turned = bench.compute(
        ops.roll(bench.ctx, t, *shifts),
        ops.roll(bench.ctx, ops.permute(bench.ctx, t, 0, 2, 1, 3), *shifts[:1], 2, 0, 1),
    )
    np.testing.assert_array_equal(whole, np.roll(x, shifts[::-1], (0, 1, 2, 3)))
    np.testing.assert_array_equal(turned, np.roll(x.swapaxes(1, 2), (1, 0, 2, shifts[0]), (0, 1, 2, 3)))


def weights(mode, n_to, n_from):
    """Return a [n_to, n_from] matrix of what each element of a scaled row takes from each of the row."""
    out, base = np.zeros((n_to, n_from)), mode & 0xFF
    align = mode & ScaleFlag.ALIGN_CORNERS and n_to > 1
    factor = (n_to - 1) / (n_from - 1) if align else n_to / n_from
    half = 0.0 if mode & ScaleFlag.ALIGN_CORNERS else 0.5
    for i in range(n_to):
        x = (i + half) / factor - half
        if base == NEAREST:
            out[i, int(i / factor + 1e-9)] = 1
        elif mode & ScaleFlag.ANTIALIAS:
            reach = max(1.0, 1 / factor)
            w = np.maximum(1 - np.abs(np.arange(n_from) - x) / reach, 0)
            out[i] = w / w.sum()
        else:
            taps = range(2) if base == BILINEAR else range(-1, 3)
            for tap in taps:
                k = int(np.floor(x)) + tap
                d = abs(x - k)
                if base == BILINEAR:
                    w = 1 - d
                elif d <= 1:  # Keys' cubic convolution, a = -0.75
                    w = 1.25 * d**3 - 2.25 * d**2 + 1
                else:
                    w = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
                out[i, min(max(k, 0), n_from - 1)] += w
    return out


MODES = [
    NEAREST, BILINEAR, BICUBIC, BILINEAR | ScaleFlag.ANTIALIAS, BILINEAR | ScaleFlag.ALIGN_CORNERS,
    BICUBIC | ScaleFlag.ALIGN_CORNERS,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(8, 6), (3, 5), (16, 1), (11, 7)])
def test_interpolate(bench, mode, size):
    x, (width, height) = some(2, 1, 6, 8), size
    t = bench.leaf(x)
    wide, tall = weights(mode, width, 8), weights(mode, height, 6)
    whole, turned = bench.compute(
        ops.interpolate(bench.ctx, t, width, height, 2, 4, mode),
        ops.interpolate(bench.ctx, ops.transpose(bench.ctx, t), height, width, 1, 1, mode),
    )
    exact = np.einsum("nchw,yh,xw->ncyx", x.astype("d"), tall, wide)
    # positions are F32: off by some 16 * 2^-23 at 16, and so are weights; up to 16 of them of up to 3
    np.testing.assert_allclose(whole, exact.repeat(2, 0).repeat(2, 1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(turned, exact[:1].swapaxes(2, 3).reshape(turned.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", [NEAREST, BILINEAR, BICUBIC])
def test_upscale(calc, mode):
    x = some(2, 3, 4, 5)
    exact = np.einsum("nchw,yh,xw->ncyx", x.astype("d"), weights(mode, 12, 4), weights(mode, 15, 5))
    np.testing.assert_allclose(calc(lambda ctx, a: ops.upscale(ctx, a, 3, mode), x), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim, max_period", [(1, 10), (2, 1), (8, 10000), (9, 100)])
def test_timestep_embedding(calc, dim, max_period):
    t, half = np.array([0, 1, 2.5, 40], "f"), dim // 2
    arg = t[:, None].astype("d") * float(max_period) ** (-np.arange(half) / max(half, 1))
    exact = np.concatenate([np.cos(arg), np.sin(arg), np.zeros((4, dim % 2))], 1)
    out = calc(lambda ctx, a: ops.timestep_embedding(ctx, a, dim, max_period), t)
    np.testing.assert_allclose(out.reshape(4, dim), exact, rtol=0, atol=2e-5)  # angles up to 40 in F32: 40 * 2^-23


def test_empty_operands(bench):
    x = some(3, 4)
    t, empty = bench.leaf(x), bench.ctx.new_tensor(F, (4, 0))
    like = bench.ctx.new_tensor(F, (4, 1))
    joined, zeros, sums = bench.compute(
        ops.concat(bench.ctx, empty, t, 1),
        ops.pad(bench.ctx, empty, 0, 2, 0, 0),
        ops.repeat_back(bench.ctx, empty, like),
    )
    np.testing.assert_array_equal(joined, x)
    np.testing.assert_array_equal(zeros, np.zeros((2, 4)))
    assert ops.repeat(bench.ctx, empty, empty).ne == (4, 0, 1, 1)
    assert ops.interpolate(bench.ctx, t, 0, 3, 1, 1, 0).ne == (0, 3, 1, 1)
    np.testing.assert_array_equal(sums, np.zeros(4))


def with_numbers(op, *numbers):
    return lambda ctx, a: op(ctx, a, *numbers)


BIG = 1 << 30
PAD8 = (0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "error, message, call, specs",
    [
        (DTypeError, "concat: both must have one type", lambda ctx, a, b: ops.concat(ctx, a, b, 0),
         [(F, (4,)), (I, (4,))]),
        (ShapeError, "concat: a dimension is too large", lambda ctx, a, b: ops.concat(ctx, a, b, 0),
         [(H, (BIG,)), (H, (BIG,))]),
        (ShapeError, "repeat: [4, 4, 1, 1] is not a multiple of a", ops.repeat, [(F, (4, 3)), (F, (4, 4))]),
        (ShapeError, "repeat: [4, 1, 1, 1] is not a multiple of a", ops.repeat, [(F, (4, 0)), (F, (4, 1))]),
        (DTypeError, "repeat: a must be F32, F16, BF16, I32 or I16", ops.repeat, [(Type.I64, (4,)), (F, (4,))]),
        (ShapeError, "repeat_back: a is not a multiple of b", ops.repeat_back, [(F, (4, 4)), (F, (4, 3))]),
        (ShapeError, "repeat_back: a is not a multiple of b", ops.repeat_back, [(F, (4, 4)), (F, (4, 0))]),
        (DTypeError, "repeat_back: a must be F32", ops.repeat_back, [(H, (4, 4)), (F, (4, 1))]),
        (ShapeError, "pad_ext: cannot add -1 elements", with_numbers(ops.pad_ext, -1, *PAD8), [(F, (4,))]),
        (ShapeError, "pad_ext: the result is too large",
         with_numbers(ops.pad_ext, BIG, BIG, BIG, BIG, 0, 0, 0, 0), [(F, (4,))]),
        (DTypeError, "pad_circular: a must be F32", with_numbers(ops.pad_circular, 1, 0, 0, 0), [(H, (4,))]),
        (ShapeError, "pad_circular: a is empty", with_numbers(ops.pad_circular, 1, 1, 0, 0), [(F, (4, 0))]),
        (ShapeError, "pad_ext_circular: 5 elements before a are more than ne0",
         with_numbers(ops.pad_ext_circular, 5, *PAD8), [(F, (4,))]),
        (ShapeError, "pad_reflect_1d: 4 and 0 are not from 0 to ne0 - 1", with_numbers(ops.pad_reflect_1d, 4, 0),
         [(F, (4,))]),
        (ShapeError, "pad_reflect_1d: 0 and 0 are not from 0 to ne0 - 1", with_numbers(ops.pad_reflect_1d, 0, 0),
         [(F, (0,))]),
        (ShapeError, "pad_reflect_1d: a must be contiguous",
         lambda ctx, a: ops.pad_reflect_1d(ctx, ops.view(ctx, a, (4, 2), (32,)), 0, 0), [(F, (4, 4))]),
        (ShapeError, "roll: a shift of [0, 3, 0, 0] is not less than ne1", with_numbers(ops.roll, 0, 3, 0, 0),
         [(F, (4, 3))]),
        (ShapeError, f"roll: a shift of [{-(1 << 31)}, 0, 0, 0] is not less than ne0",
         with_numbers(ops.roll, -(1 << 31), 0, 0, 0), [(F, (4, 3))]),
        (ShapeError, "roll: the rows of a must be contiguous",
         lambda ctx, a: ops.roll(ctx, ops.transpose(ctx, a), 0, 0, 0, 0), [(F, (4, 3))]),
        (ShapeError, "upscale: scale_factor 1 is not from 2 to 4194304", with_numbers(ops.upscale, 1, 0), [(F, (4,))]),
        (ShapeError, "upscale: mode 256 is not a ScaleMode", with_numbers(ops.upscale, 2, 256), [(F, (4,))]),
        (DTypeError, "upscale: a must be F32", with_numbers(ops.upscale, 2, 0), [(H, (4,))]),
        (ShapeError, "upscale: dimensions must be 1 to 4194304, not [8388608, 2, 1, 1]",
         with_numbers(ops.upscale, 2, 0), [(F, (1 << 22,))]),
        (ShapeError, "interpolate: dimensions must be 1 to 4194304, not [4, 4, 1, 1]",
         with_numbers(ops.interpolate, 4, 4, 1, 1, 0), [(F, (4, 0))]),
        (ShapeError, "interpolate: mode 3 is not a ScaleMode with ScaleFlags",
         with_numbers(ops.interpolate, 4, 4, 1, 1, 3), [(F, (4,))]),
        (ShapeError, "interpolate: mode 4096 is not a ScaleMode with ScaleFlags",
         with_numbers(ops.interpolate, 4, 4, 1, 1, 4096), [(F, (4,))]),
        (ShapeError, "interpolate: ScaleFlag.ANTIALIAS needs ScaleMode.BILINEAR",
         with_numbers(ops.interpolate, 4, 4, 1, 1, BICUBIC | ScaleFlag.ANTIALIAS), [(F, (4,))]),
        *(
            (ShapeError, "interpolate: ScaleFlag.ALIGN_CORNERS needs ScaleMode.BILINEAR or BICUBIC alone",
             with_numbers(ops.interpolate, 4, 4, 1, 1, mode | ScaleFlag.ALIGN_CORNERS), [(F, (4,))])
            for mode in (NEAREST, BILINEAR | ScaleFlag.ANTIALIAS)
        ),
        (ShapeError, "interpolate: impossible shape [4, -4, 1, 1]", with_numbers(ops.interpolate, 4, -4, 1, 1, 0),
         [(F, (4,))]),
        (ShapeError, "timestep_embedding: dim 0 or max_period 10 is less than 1",
         with_numbers(ops.timestep_embedding, 0, 10), [(F, (4,))]),
        (ShapeError, "timestep_embedding: timesteps must have one dimension",
         with_numbers(ops.timestep_embedding, 4, 10), [(F, (4, 2))]),
        (DTypeError, "timestep_embedding: a must be F32", with_numbers(ops.timestep_embedding, 4, 10), [(I, (4,))]),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, specs):
    ctx = Context(Context.size_for(16))
    operands = [ctx.new_tensor(type, ne) for type, ne in specs]
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, *operands)
