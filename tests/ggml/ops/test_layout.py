"""Views and copies against NumPy: equal, for nothing is computed but conversions, which ggml.quants does too."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, Type, dequantize, ops, quantize

RNG = np.random.default_rng(21)
PLAIN = ["f", "e", "b", "h", "i", "q", "d"]
NUMPY = dict(zip("febhiqd", (Type.F32, Type.F16, Type.I8, Type.I16, Type.I32, Type.I64, Type.F64), strict=True))


def some(dtype, *shape):
    return (RNG.standard_normal(shape) * 50).astype(dtype)


def leaf_of(bench, array):
    """Return a leaf of any of ggml's plain types."""
    t = bench.ctx.new_tensor(NUMPY[array.dtype.char], array.shape[::-1]).set_input()
    bench._fill.append((t, np.ascontiguousarray(array)))
    return t


@pytest.mark.parametrize("dtype", PLAIN)
def test_dup_of_any_strides(bench, dtype):
    x = some(dtype, 2, 3, 5, 7)
    t = leaf_of(bench, x)
    whole, turned, part = bench.compute(
        ops.dup(bench.ctx, t),
        ops.dup(bench.ctx, ops.permute(bench.ctx, t, 3, 1, 0, 2)),
        ops.dup(bench.ctx, ops.view(bench.ctx, t, (4, 2, 3, 2), t.nb[1:], t.nb[1])),
    )
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(turned, permuted(x, (3, 1, 0, 2)))
    np.testing.assert_array_equal(part, x[:, :, 1:3, :4])


def permuted(x, axes):
    """Return x as ops.permute gives it: dimension axes[i] of the result, in ggml's order, is dimension i of x."""
    order = [axes.index(i) for i in range(4)]
    return x.transpose([3 - i for i in order[::-1]])


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_K, Type.IQ2_XXS, Type.Q8_K, Type.BF16], ids=lambda type: type.name)
def test_dup_of_blocks(bench, type):
    data = RNG.integers(0, 256, (2, 3, type.row_size(256)), dtype="u1")
    t = bench.ctx.new_tensor(type, (256, 3, 2)).set_input()
    bench._fill.append((t, data))
    whole, turned = bench.compute(ops.dup(bench.ctx, t), ops.dup(bench.ctx, ops.permute(bench.ctx, t, 0, 2, 1, 3)))
    np.testing.assert_array_equal(whole, data)
    np.testing.assert_array_equal(turned, data.swapaxes(0, 1))


def test_dup_inplace_is_a_view(bench):
    x = some("f", 3, 4)
    t = bench.leaf(x)
    out = ops.dup_inplace(bench.ctx, ops.transpose(bench.ctx, t))
    (got,) = bench.compute(ops.cont(bench.ctx, out))
    assert (out.op, out.ne, out.nb) == ("DUP", (3, 4, 1, 1), (16, 4, 48, 48))
    np.testing.assert_array_equal(got, x.T)


@pytest.mark.parametrize("dtype, into", ["ff", "fe", "fi", "ef", "ee", "if", "ii"])
def test_cpy_converts_into_a_view(bench, dtype, into):
    x, y = some(dtype, 3, 4), some(into, 5, 6)
    ta, tb = bench.leaf(x), bench.leaf(y)
    part = ops.view(bench.ctx, tb, (3, 4), tb.nb[1:2], tb.nb[1])
    bench.compute(ops.cpy(bench.ctx, ops.transpose(bench.ctx, ta), part))
    y[1:5, :3] = x.T.astype(into)
    np.testing.assert_array_equal(tb.to_numpy(), y)


@pytest.mark.parametrize("shape", [(12,), (4, 3), (2, 2, 3), (1, 12)])
def test_cpy_into_another_shape(bench, shape):
    x, y, z = some("f", 3, 4), np.zeros(shape, "f"), np.zeros(shape, "e")
    tx, ty, tz = bench.leaf(x), bench.leaf(y), bench.leaf(z)
    turned = ops.transpose(bench.ctx, tx)
    bench.compute(ops.cpy(bench.ctx, turned, ty), ops.cpy(bench.ctx, turned, tz))
    np.testing.assert_array_equal(ty.to_numpy().ravel(), x.T.ravel())
    np.testing.assert_array_equal(tz.to_numpy().ravel(), x.T.ravel().astype("e"))


def test_cpy_of_blocks(bench):
    x = some("f", 4, 64)
    ta, tq, tf, ts = (
        bench.leaf(x), bench.leaf(np.zeros((2, 128), "f"), Type.Q8_0), bench.leaf(np.zeros((8, 32), "f")),
        bench.leaf(np.zeros((4, 64), "f"), Type.Q8_0),
    )  # fmt: skip
    for t in (tq, tf, ts):
        t.set_output()  # so that its memory is kept
    stored = ops.cpy(bench.ctx, ta, tq)  # rows of 64 into rows of 128
    bench.compute(ops.cpy(bench.ctx, stored, tf), ops.cpy(bench.ctx, stored, ts))
    exact = quantize(x, Type.Q8_0).reshape(4, -1)
    np.testing.assert_array_equal(tq.to_numpy().reshape(4, -1), exact)
    np.testing.assert_array_equal(ts.to_numpy(), exact)
    np.testing.assert_array_equal(tf.to_numpy().reshape(4, 64), dequantize(exact, Type.Q8_0, 64))


@pytest.mark.parametrize("type", [t for t in Type if t.is_quantized and t not in (Type.Q8_1, Type.Q8_K)],
                         ids=lambda type: type.name)  # fmt: skip
def test_cast_from_every_quantised_type(bench, type):
    """dequantize() is compared with gguf-py in tests/ggml/test_quants.py; here the kernel reads a view."""
    data = RNG.integers(0, 256, (6, type.row_size(256)), dtype="u1")
    t = bench.ctx.new_tensor(type, (256, 6)).set_input()
    bench._fill.append((t, data))
    odd = ops.view(bench.ctx, t, (256, 3), (2 * t.nb[1],), t.nb[1])
    (out,) = bench.compute(ops.cast(bench.ctx, odd, Type.F32))
    np.testing.assert_array_equal(out, dequantize(data, type, 256)[1::2])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_reshape_and_cont_of_n_dimensions(bench, n):
    x, ne = some("f", 2, 3, 4, 5), ((120,), (20, 6), (5, 8, 3), (1, 30, 2, 2))[n - 1]
    t, like = bench.leaf(x), bench.ctx.new_tensor(Type.I32, ne)
    outs = bench.compute(ops.reshape(bench.ctx, t, *ne), ops.reshape(bench.ctx, t, like), ops.cont(bench.ctx, t, *ne))
    for out in outs:
        np.testing.assert_array_equal(out, x.reshape(ne[::-1]))


def test_view_tensor_waits_for_its_operand(bench):
    x = some("f", 3, 4)
    doubled = ops.cont(bench.ctx, ops.transpose(bench.ctx, bench.leaf(x)))
    view = ops.view_tensor(bench.ctx, doubled)
    assert (view.op, view.ne, view.nb) == ("VIEW", doubled.ne, doubled.nb)
    (out,) = bench.compute(ops.dup(bench.ctx, view))
    np.testing.assert_array_equal(out, x.T)


def test_empty_tensors(bench):
    empty, x = bench.ctx.new_tensor(Type.F32, (4, 0)), bench.leaf(np.ones((2, 3), "f"))
    for t in (ops.dup(bench.ctx, empty), ops.cast(bench.ctx, empty, Type.F16), ops.transpose(bench.ctx, empty),
              ops.cpy(bench.ctx, empty, bench.ctx.new_tensor(Type.F16, (0, 4))),
              ops.reshape(bench.ctx, empty, 0)):  # fmt: skip
        assert 0 in t.ne
        bench.graph.expand(t)
    assert bench.compute(ops.dup(bench.ctx, x))[0].sum() == 6


def refuse(error, message, call, *specs):
    ctx = Context(Context.size_for(16))
    operands = [ctx.new_tensor(type, ne) for type, ne in specs]
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, *operands)


F, H, Q, K, I = Type.F32, Type.F16, Type.Q8_0, Type.Q4_K, Type.I32  # noqa: E741


@pytest.mark.parametrize(
    "error, message, call, specs",
    [
        (ShapeError, "cpy: the numbers of elements differ", ops.cpy, [(F, (4, 3)), (F, (4, 2))]),
        (DTypeError, "cpy: cannot convert to I32", ops.cpy, [(H, (4,)), (I, (4,))]),
        (DTypeError, "cpy: cannot convert to F16", ops.cpy, [(Q, (32,)), (H, (32,))]),
        (DTypeError, "cpy: cannot convert to Q4_K", ops.cpy, [(Q, (256,)), (K, (256,))]),
        (DTypeError, "cpy: cannot convert to IQ1_S", ops.cpy, [(F, (256,)), (Type.IQ1_S, (256,))]),
        (ShapeError, "cpy: rows of a must be whole blocks of Q8_0, no longer than b's", ops.cpy,
         [(F, (48, 2)), (Q, (32, 3))]),
        (ShapeError, "cpy: rows of a must be whole blocks of Q8_0, no longer than b's", ops.cpy,
         [(F, (64, 2)), (Q, (32, 4))]),
        (ShapeError, "cpy: the rows of a must be contiguous",
         lambda ctx, a, b: ops.cpy(ctx, ops.transpose(ctx, a), b), [(F, (3, 32)), (Q, (32, 3))]),
        (ShapeError, "cpy: a quantised b must be contiguous",
         lambda ctx, a, b: ops.cpy(ctx, a, ops.permute(ctx, b, 0, 2, 1, 3)), [(F, (32, 3, 2)), (Q, (32, 2, 3))]),
        (ShapeError, "cpy: quantised a and b must be contiguous if shapes differ",
         lambda ctx, a, b: ops.cpy(ctx, ops.permute(ctx, a, 0, 2, 1, 3), b), [(Q, (32, 3, 2)), (Q, (32, 6))]),
        (ShapeError, "cpy: the rows of b must be contiguous",
         lambda ctx, a, b: ops.cpy(ctx, a, ops.transpose(ctx, b)), [(Q, (32, 3)), (F, (3, 32))]),
        (ShapeError, "cpy: b must be contiguous, or have rows of whole blocks of a",
         lambda ctx, a, b: ops.cpy(ctx, a, ops.view(ctx, b, (16, 6), (80,))), [(Q, (32, 3)), (F, (20, 6))]),
        (ShapeError, "dup: a has too many elements", ops.dup, [(Type.I8, (1 << 31,))]),
        (ShapeError, "cont: a has too many elements", ops.cont, [(F, (1 << 16, 1 << 15))]),
        (ShapeError, "cast: a has too many elements", lambda ctx, a: ops.cast(ctx, a, H), [(F, (1 << 31,))]),
        (ShapeError, "cast: a has too many elements", lambda ctx, a: ops.cast(ctx, a, F), [(Q, (1 << 16, 1 << 16))]),
        (ShapeError, "reshape: [5, 1, 1, 1] has another number of elements",
         ops.reshape, [(F, (4,)), (F, (5,))]),
        (ShapeError, "view: byte 2 is inside an element or block",
         lambda ctx, a: ops.view(ctx, a, (2,), (), 2), [(F, (4,))]),
        (ShapeError, "view: byte 4 is inside an element or block",
         lambda ctx, a: ops.view(ctx, a, (32,), (), 4), [(Q, (32, 2))]),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, specs):
    refuse(error, message, call, *specs)
