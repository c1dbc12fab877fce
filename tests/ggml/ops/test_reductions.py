"""Sums, means, largest elements and orders, against NumPy."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, SortOrder, Type, dequantize, ops, quantize

RNG = np.random.default_rng(14)


def sample(*shape):
    return RNG.standard_normal(shape, dtype="f")


# F16 and BF16 are added up in F32, and the sum is rounded once: half a unit of 11 or 8 bits.
@pytest.mark.parametrize("type, rtol", [(Type.F32, 1e-6), (Type.F16, 2**-11 + 1e-5), (Type.BF16, 2**-8)])
def test_sum(bench, type, rtol):
    x = np.abs(dequantize(quantize(sample(3, 2, 5, 33), type), type, 33)).reshape(3, 2, 5, 33)
    a = bench.leaf(x, type)
    part = ops.view(bench.ctx, a, (30, 4, 2), a.nb[1:3], 2 * a.type.type_size)
    outs = [ops.sum(bench.ctx, each) for each in (a, part)]
    assert outs[0].ne == (1, 1, 1, 1) and outs[0].type == type
    got = bench.compute(*(each if type == Type.F32 else ops.cast(bench.ctx, each, Type.F32) for each in outs))
    exact = [x.sum(dtype="d"), x[0, :2, :4, 2:32].sum(dtype="d")]
    np.testing.assert_allclose(np.ravel(got), exact, rtol=rtol)


@pytest.mark.parametrize("shape", [(2, 1), (3, 5), (2, 3, 4, 33), (3, 0), (2, 1, 129)])
def test_along_rows(bench, shape):
    x = sample(*shape)
    a = bench.leaf(x)
    sums, means, total = bench.compute(*(op(bench.ctx, a) for op in (ops.sum_rows, ops.mean, ops.sum)))
    exact = x.sum(-1, keepdims=True, dtype="d")
    np.testing.assert_allclose(sums, exact, rtol=1e-5, atol=1e-5)  # added up in F32
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(means, exact / np.float64(shape[-1]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, [x.sum(dtype="d")], rtol=1e-6, atol=1e-6)


def test_along_rows_of_views(bench):
    x = sample(3, 4, 8)
    a = bench.leaf(x)
    part = ops.view(bench.ctx, ops.permute(bench.ctx, a, 0, 2, 1, 3), (5, 3, 4), (a.nb[2], a.nb[1]), 8)
    got = bench.compute(*(op(bench.ctx, part) for op in (ops.sum_rows, ops.mean, ops.cumsum)))
    d = x.swapaxes(0, 1)[..., 2:7].astype("d")
    for each, exact in zip(got, (d.sum(-1, keepdims=True), d.mean(-1, keepdims=True), d.cumsum(-1)), strict=True):
        np.testing.assert_allclose(each, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 33), (3, 1)])
def test_cumsum(calc, shape):
    x = sample(*shape)
    np.testing.assert_allclose(calc(ops.cumsum, x), x.cumsum(-1, dtype="d"), rtol=1e-5, atol=1e-5)


def test_argmax(calc):
    x = sample(7, 33)
    np.testing.assert_array_equal(calc(ops.argmax, x), x.argmax(-1))
    ties = np.array([[1, 3, 3, 0], [-np.inf] * 4, [5, 4, 3, 2]], "f")
    np.testing.assert_array_equal(calc(ops.argmax, ties), [2, 3, 0])  # the last, where NumPy has the first
    of_view = calc(lambda ctx, a: ops.argmax(ctx, ops.view(ctx, a, (30, 7), a.nb[1:2], 12)), x)
    np.testing.assert_array_equal(of_view, x[:, 3:].argmax(-1))


def test_argmax_of_nan_is_in_range(calc):
    x = sample(5, 9)
    x[:, ::2] = np.nan
    got = calc(ops.argmax, x)
    assert got.dtype == np.int32 and (got >= 0).all() and (got < 9).all()


def test_count_equal(bench):
    x, y = RNG.integers(0, 3, (2, 7, 9), dtype="i")
    a, b = bench.leaf(x), bench.leaf(y)
    flipped = ops.count_equal(bench.ctx, ops.transpose(bench.ctx, a), ops.transpose(bench.ctx, b))
    none = bench.leaf(np.zeros((3, 0), "i"))
    outs = [ops.count_equal(bench.ctx, a, b), flipped, ops.count_equal(bench.ctx, none, none)]
    assert outs[0].type == Type.I64
    got = bench.compute(*outs)
    np.testing.assert_array_equal(np.ravel(got), [(x == y).sum(), (x == y).sum(), 0])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 33)])
def test_argsort(bench, shape):
    x = RNG.permuted(np.arange(np.prod(shape), dtype="f").reshape(shape), axis=-1)  # no two equal
    a = bench.leaf(x)
    asc, desc = bench.compute(*(ops.argsort(bench.ctx, a, each) for each in SortOrder))
    np.testing.assert_array_equal(asc, x.argsort(-1))
    np.testing.assert_array_equal(desc, x.argsort(-1)[..., ::-1])


@pytest.mark.parametrize("k", [1, 2, 5, 33])
def test_top_k(bench, k):
    x = RNG.permuted(np.arange(3 * 4 * 33, dtype="f").reshape(3, 4, 33), axis=-1)
    a = bench.leaf(x)
    part = ops.view(bench.ctx, a, (33, 5), (2 * a.nb[1],), a.nb[1])
    ordered, loose, of_part = bench.compute(
        ops.argsort_top_k(bench.ctx, a, k), ops.top_k(bench.ctx, a, k), ops.top_k(bench.ctx, part, k)
    )
    best = x.argsort(-1)[..., ::-1][..., :k]
    np.testing.assert_array_equal(ordered, best)
    np.testing.assert_array_equal(np.sort(loose, -1), np.sort(best, -1))
    np.testing.assert_array_equal(np.sort(of_part, -1), np.sort(best.reshape(12, k)[1:11:2], -1))


@pytest.mark.parametrize("n", [3, 17, 200])
def test_order_with_nan_holds_each_index_once(bench, n):
    x = sample(20, n)
    x[RNG.random(x.shape) < 0.4] = np.nan
    a = bench.leaf(x)
    asc, top = bench.compute(ops.argsort(bench.ctx, a, SortOrder.ASC), ops.top_k(bench.ctx, a, n))
    for each in (asc, top):
        np.testing.assert_array_equal(np.sort(each, -1), np.tile(np.arange(n), (20, 1)))


def transposed(op):
    return lambda ctx, a: op(ctx, ops.transpose(ctx, a))


def order(ctx, a):
    return ops.argsort(ctx, a, SortOrder.ASC)


def top(ctx, a):
    return ops.top_k(ctx, a, 1)


F, H, I = Type.F32, Type.F16, Type.I32  # noqa: E741
ROWS = [(ops.sum_rows, "sum_rows"), (ops.cumsum, "cumsum"), (ops.mean, "mean"), (ops.argmax, "argmax")]
ORDERS = [(order, "argsort"), (top, "top_k"), (lambda ctx, a: ops.argsort_top_k(ctx, a, 1), "argsort_top_k")]
REFUSED = [
    (ops.sum, [(I, (4,))], DTypeError, "sum: a must be F32, F16 or BF16"),
    (transposed(ops.sum), [(F, (4, 3))], ShapeError, "sum: the rows of a must be contiguous"),
    *((op, [(H, (4, 3))], DTypeError, f"{n}: a must be F32") for op, n in ROWS + ORDERS),
    *((transposed(op), [(F, (4, 3))], ShapeError, f"{n}: the rows of a must be contiguous") for op, n in ROWS + ORDERS),
    *(
        (
            lambda ctx, a, op=op: op(ctx, ops.permute(ctx, a, 0, 2, 1, 3)),
            [(F, (4, 3, 2))],
            ShapeError,
            f"{n}: the rows of a must lie at one distance",
        )
        for op, n in ORDERS
    ),
    *(
        (ops.argmax, [(F, ne)], ShapeError, "argmax: a must be a matrix with at least one column")
        for ne in [(0, 3), (4, 3, 2), (4, 3, 1, 2)]
    ),
    (ops.count_equal, [(I, (4,)), (F, (4,))], DTypeError, "count_equal: a and b must be I32"),
    (ops.count_equal, [(I, (4,)), (I, (1,))], ShapeError, "count_equal: shapes differ"),
    *(
        (ops.count_equal, [(I, ne)] * 2, ShapeError, "count_equal: a and b must not have more than two dimensions")
        for ne in [(4, 3, 2), (4, 1, 1, 2)]
    ),
    (lambda ctx, a: ops.argsort(ctx, a, 2), [(F, (4,))], ShapeError, "argsort: 2 is not a SortOrder"),
    *(
        (lambda ctx, a, k=k: ops.top_k(ctx, a, k), [(F, (4,))], ShapeError, f"top_k: k = {k} is not from 1 to ne0")
        for k in (0, -1, 5)
    ),
]


@pytest.mark.parametrize("op, specs, error, message", REFUSED)
def test_refused(op, specs, error, message):
    ctx = Context(Context.size_for(16))
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        op(ctx, *(ctx.new_tensor(type, ne) for type, ne in specs))
