"""Rows by index and regions by position, against NumPy's indexing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, IndexRangeError, ShapeError
from pyggml_adapt.ggml import Backend, Context, Type, ops

RNG = np.random.default_rng(22)
F, H, I = Type.F32, Type.F16, Type.I32  # noqa: E741


def some(dtype, *shape):
    return (RNG.standard_normal(shape) * 50).astype(dtype)


@pytest.mark.parametrize("type", [t for t in Type if t.is_quantized and t not in (Type.Q8_1, Type.Q8_K)],
                         ids=lambda type: type.name)  # fmt: skip
def test_get_rows_of_every_quantised_type(bench, type):
    data, ids = RNG.integers(0, 256, (5, type.row_size(256)), dtype="u1"), np.array([4, 0, 4], "i")
    t = bench.ctx.new_tensor(type, (256, 5)).set_input()
    bench._fill.append((t, data))
    out, exact = bench.compute(ops.get_rows(bench.ctx, t, bench.leaf(ids)), ops.cast(bench.ctx, t, F))
    np.testing.assert_array_equal(out, exact[ids])


@pytest.mark.parametrize("dtype", ["f", "e"])
def test_get_rows_back(calc, dtype):
    x, ids, like = some(dtype, 6, 7), np.array([4, 0, 4, 2, 4, 0], "i"), np.zeros((5, 7), "f")
    exact = np.zeros((5, 7))
    np.add.at(exact, ids, x.astype("d"))
    # up to three numbers of some 50 are added in F32: 3 * 100 * 2^-24
    np.testing.assert_allclose(calc(ops.get_rows_back, x, ids, like), exact, rtol=0, atol=3e-5)


def test_get_rows_back_of_a_view(bench):
    x, ids = some("f", 6, 7), np.array([1, 1, 0], "i")
    t = bench.leaf(x)
    odd = ops.view(bench.ctx, t, (5, 3), (2 * t.nb[1],), 4)
    (out,) = bench.compute(ops.get_rows_back(bench.ctx, odd, bench.leaf(ids), bench.ctx.new_tensor(H, (5, 2))))
    np.testing.assert_allclose(out, [x[4, 1:6], x[0, 1:6] + x[2, 1:6]], rtol=1e-6)


@pytest.mark.parametrize("bad", [5, -1])
def test_get_rows_back_checks_indices(bench, bad):
    ids = bench.leaf(np.array([0, bad], "i"))
    ids.name = "ids"
    with pytest.raises(IndexRangeError, match=rf"^tensor 'ids' picks row {bad} of 5, at position 1$"):
        bench.compute(ops.get_rows_back(bench.ctx, bench.leaf(some("f", 2, 7)), ids, bench.ctx.new_tensor(F, (7, 5))))


def test_set_rows_of_integers_and_broadcast_indices(bench):
    a, b, ids = some("i", 2, 9, 4), some("f", 2, 3, 4), np.array([[8, 0, 3]], "q")
    ta = bench.leaf(a)
    bench.compute(ops.set_rows(bench.ctx, ta, bench.leaf(b), bench.leaf(ids)))
    a[:, ids[0]] = b.astype("i")
    np.testing.assert_array_equal(ta.to_numpy(), a)


@pytest.mark.parametrize("dtype", ["f", "i"])
@pytest.mark.parametrize("inplace", [False, True])
def test_set(bench, dtype, inplace):
    a, b = some(dtype, 4, 5, 6, 7), some(dtype, 2, 3, 4, 5)
    ta, tb = bench.leaf(a), bench.leaf(b)
    call = ops.set_inplace if inplace else ops.set
    out = call(bench.ctx, ta, tb, *ta.nb[1:], ta.nb[3] + 2 * ta.nb[2] + ta.nb[1] + 8)
    assert (out.op, out.ne) == ("SET", ta.ne)
    (got,) = bench.compute(out)
    a[1:3, 2:5, 1:5, 2:7] = b
    np.testing.assert_array_equal(got, a)


@pytest.mark.parametrize("suffix", ["", "_inplace"])
def test_set_1d_and_2d(bench, suffix):
    a, b, m = some("f", 5, 6), some("f", 7), some("f", 4, 3)
    ta, tb, tm = bench.leaf(a), bench.leaf(b), bench.leaf(m)
    one = getattr(ops, f"set_1d{suffix}")(bench.ctx, ops.dup(bench.ctx, ta), tb, 8)
    two = getattr(ops, f"set_2d{suffix}")(bench.ctx, ops.dup(bench.ctx, ta), tm, ta.nb[1], ta.nb[1] + 4)
    turned = getattr(ops, f"set_2d{suffix}")(bench.ctx, ops.dup(bench.ctx, ta), tm, 12, 0)
    one, two, turned = bench.compute(one, two, turned)
    np.testing.assert_array_equal(one.ravel(), np.r_[a.ravel()[:2], b, a.ravel()[9:]])
    np.testing.assert_array_equal(turned.ravel(), np.r_[m.ravel(), a.ravel()[12:]])
    a[1:, 1:4] = m
    np.testing.assert_array_equal(two, a)


@pytest.mark.parametrize("inplace", [False, True])
def test_acc(bench, inplace):
    a, b = some("f", 4, 5, 6, 7), some("f", 2, 3, 4, 9)
    ta, tb = bench.leaf(a), bench.leaf(b)
    part = ops.view(bench.ctx, tb, (5, 4, 3, 2), tb.nb[1:], 8)
    call = ops.acc_inplace if inplace else ops.acc
    (got,) = bench.compute(call(bench.ctx, ta, part, *ta.nb[1:], ta.nb[3] + 2 * ta.nb[2] + ta.nb[1] + 8))
    a[1:3, 2:5, 1:5, 2:7] += b[..., 2:7]
    np.testing.assert_array_equal(got, a)  # one sum each, rounded alike


def test_in_place_ops_return_views_of_their_operand(bench):
    a, b = bench.leaf(np.zeros(4, "f")), bench.leaf(np.ones(2, "f"))
    once = ops.acc_inplace(bench.ctx, a, b, 8, 8, 8, 0)
    twice = ops.acc_inplace(bench.ctx, once, b, 8, 8, 8, 4)
    bench.compute(ops.set_1d_inplace(bench.ctx, twice, b, 8))
    np.testing.assert_array_equal(a.to_numpy(), [1, 2, 1, 1])


def test_empty_operands(bench):
    a, empty = bench.leaf(some("f", 3, 4)), bench.ctx.new_tensor(F, (0, 2))
    outs = bench.compute(ops.set(bench.ctx, a, empty, 16, 48, 48, 0), ops.acc(bench.ctx, a, empty, 16, 48, 48, 28))
    np.testing.assert_array_equal(outs[0], outs[1])
    none = bench.ctx.new_tensor(I, (0,))
    assert ops.get_rows(bench.ctx, a, none).ne == (4, 0, 1, 1)
    assert ops.get_rows_back(bench.ctx, bench.ctx.new_tensor(F, (4, 0)), none, a).ne == (4, 3, 1, 1)


def region(op, *numbers):
    return lambda ctx, a, b: op(ctx, a, b, *numbers)


BACK = ops.get_rows_back
LEAVES = "b with strides [16, 48, 48] at byte {} leaves a"


@pytest.mark.parametrize(
    "error, message, call, specs",
    [
        (DTypeError, "get_rows_back: a must be F32 or F16, b I32", BACK,
         [(Type.BF16, (4, 2)), (I, (2,)), (F, (4, 3))]),
        (ShapeError, "get_rows_back: a and c have two dimensions, b one", BACK,
         [(F, (4, 2)), (I, (2, 2)), (F, (4, 3))]),
        (ShapeError, "get_rows_back: a needs rows as long as c's, one for each index", BACK,
         [(F, (4, 2)), (I, (3,)), (F, (4, 3))]),
        (ShapeError, "get_rows_back: a needs rows as long as c's, one for each index", BACK,
         [(F, (4, 2)), (I, (2,)), (F, (5, 3))]),
        (ShapeError, "get_rows_back: c has no rows", BACK, [(F, (4, 2)), (I, (2,)), (F, (4, 0))]),
        (ShapeError, "get_rows_back: the rows of a and b must be contiguous",
         lambda ctx, a, b, c: BACK(ctx, ops.transpose(ctx, a), b, c), [(F, (2, 4)), (I, (2,)), (F, (4, 3))]),
        (ShapeError, "get_rows: rows are too long, or ids too many", ops.get_rows, [(F, (1, 1)), (I, (1 << 31,))]),
        (DTypeError, "set: a and b must both be F32 or both I32", region(ops.set, 16, 48, 48, 0),
         [(H, (4, 3)), (H, (4,))]),
        (DTypeError, "set_1d: a and b must both be F32 or both I32", region(ops.set_1d, 0), [(F, (4, 3)), (I, (4,))]),
        (DTypeError, "acc: a and b must be F32", region(ops.acc, 16, 48, 48, 0), [(I, (4, 3)), (I, (4,))]),
        (ShapeError, "set: " + LEAVES.format(4), region(ops.set, 16, 48, 48, 4), [(F, (4, 3)), (F, (4, 3))]),
        (ShapeError, "set_inplace: " + LEAVES.format(48), region(ops.set_inplace, 16, 48, 48, 48),
         [(F, (4, 3)), (F, (0,))]),
        (ShapeError, "acc: " + LEAVES.format(0), region(ops.acc, 16, 48, 48, 0), [(F, (4, 3)), (F, (4, 4))]),
        (ShapeError, "set_1d: b with strides [16, 48, 48] at byte 36 leaves a", region(ops.set_1d, 36),
         [(F, (4, 3)), (F, (4,))]),
        (ShapeError, "set_2d: b with strides [20, 48, 48] at byte 0 leaves a", region(ops.set_2d, 20, 0),
         [(F, (4, 3)), (F, (4, 3))]),
        (ShapeError, "set: offset 2 is not a multiple of 4 below 1073741824", region(ops.set, 16, 48, 48, 2),
         [(F, (4, 3)), (F, (2,))]),
        (ShapeError, "acc: offset 1073741824 is not a multiple of 4 below 1073741824",
         region(ops.acc, 16, 48, 48, 1 << 30), [(F, (1 << 30,)), (F, (2,))]),
        (ShapeError, "set_2d_inplace: impossible strides [18, 48, 48]", region(ops.set_2d_inplace, 18, 0),
         [(F, (4, 3)), (F, (2, 2))]),
        (ShapeError, "set: impossible strides [2147483648, 0, 0]", region(ops.set, 1 << 31, 0, 0, 0),
         [(F, (1 << 30, 2)), (F, (2, 2))]),
        (ShapeError, "acc_inplace: with strides [4, 48, 48] the rows of b overlap",
         region(ops.acc_inplace, 4, 48, 48, 0), [(F, (4, 3)), (F, (4, 2))]),
        (ShapeError, "set: a must be contiguous, and so the rows of b",
         lambda ctx, a, b: ops.set(ctx, ops.transpose(ctx, a), b, 16, 48, 48, 0), [(F, (4, 3)), (F, (2,))]),
        (ShapeError, "acc: a must be contiguous, and so the rows of b",
         lambda ctx, a, b: ops.acc(ctx, a, ops.transpose(ctx, b), 16, 48, 48, 0), [(F, (4, 3)), (F, (2, 2))]),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, specs):
    ctx = Context(Context.size_for(16))
    operands = [ctx.new_tensor(type, ne) for type, ne in specs]
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, *operands)


def test_set_rows_of_f16_beside_a_parallel_node(bench):
    """ggml plans too little work memory for it; so it is cast first, by a node of its own."""
    b, ids = RNG.standard_normal((8, 1 << 14)).astype("e"), np.arange(8)[::-1].astype("i")
    a = bench.leaf(np.zeros((8, 1 << 14), "f"))
    rows = ops.set_rows(bench.ctx, a, bench.leaf(b), bench.leaf(ids))
    assert rows.src[0].op == "CPY"
    with Backend(n_threads=2) as bench.backend:
        bench.compute(rows, ops.silu(bench.ctx, bench.leaf(np.ones(64, "f"))))
    np.testing.assert_array_equal(a.to_numpy(), b[::-1])
