"""Matrix products against NumPy in float64: what tests/ggml/test_ops.py has not of mul_mat, and its kin."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import BackendError, DTypeError, ShapeError
from pyggml_adapt.ggml import Context, OpHint, Prec, Type, dequantize, ops

RNG = np.random.default_rng(26)
F, H, B, Q, I = Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.I32  # noqa: E741


def some(*shape):
    return RNG.standard_normal(shape, dtype="f")


def weights(bench, type, rows, n):
    """Return a leaf [n, rows] of any type and its values in float64."""
    x = some(rows, n)
    if not type.is_quantized:
        t = bench.leaf(x, type)
        return t, dequantize(np.asarray(bench._fill[-1][1]), type, n).reshape(rows, n).astype("d")
    data = RNG.integers(0, 256, (rows, type.row_size(n)), dtype="u1")
    t = bench.ctx.new_tensor(type, (n, rows)).set_input()
    bench._fill.append((t, data))
    return t, dequantize(data, type, n).reshape(rows, n).astype("d")


@pytest.mark.parametrize("type", [H, B], ids=lambda type: type.name)
def test_mul_mat_id_of_rows_of_its_own_type(bench, type):
    n_expert, n_ids, n_tokens, k, m = 3, 4, 5, 16, 7
    w, exact = weights(bench, type, n_expert * m, k)
    x, rows = weights(bench, type, n_tokens * 2, k)
    ids = RNG.integers(0, n_expert, (n_tokens, n_ids), dtype="i")
    w, x = ops.reshape(bench.ctx, w, k, m, n_expert), ops.reshape(bench.ctx, x, k, 2, n_tokens)
    (out,) = bench.compute(ops.mul_mat_id(bench.ctx, w, x, bench.leaf(ids)))
    exact, rows = exact.reshape(n_expert, m, k), rows.reshape(n_tokens, 2, k)
    expected = [[exact[ids[t, i]] @ rows[t, i % 2] for i in range(n_ids)] for t in range(n_tokens)]
    # exact products of 8 or 11 bits, 16 of them added in F32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_mul_mat_of_bf16_rows(bench):
    """An F32 matrix takes them: they are widened."""
    (w, exact), (x, rows) = weights(bench, F, 7, 16), weights(bench, B, 5, 16)
    (out,) = bench.compute(ops.mul_mat(bench.ctx, w, x))
    np.testing.assert_allclose(out, rows @ exact.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prec", Prec)
def test_precision(bench, prec):
    a, b = some(3, 8), some(2, 8)
    product = ops.mul_mat(bench.ctx, bench.leaf(a), bench.leaf(b))
    assert ops.prec_set_acc(product, prec) is product
    assert ops.prec_set_src(product, prec, 1) is product
    np.testing.assert_allclose(bench.compute(product)[0], b @ a.T, rtol=1e-5, atol=1e-6)


def test_hint_can_be_taken_back(bench):
    a, b = some(4, 4), some(3, 4)
    product = ops.mul_mat(bench.ctx, bench.leaf(a), bench.leaf(b))
    ops.mul_mat_set_hint(ops.mul_mat_set_hint(product, OpHint.SRC0_IS_HADAMARD), OpHint.NONE)
    np.testing.assert_allclose(bench.compute(product)[0], b @ a.T, rtol=1e-5, atol=1e-6)


def test_unsupported_pair_is_refused_by_the_backend(bench):
    with pytest.raises(BackendError, match=r"^CPU cannot compute <Tensor .* MUL_MAT"):
        bench.compute(ops.mul_mat(bench.ctx, bench.leaf(some(3, 32), Q), bench.leaf(some(2, 32).astype("e"))))


@pytest.mark.parametrize("k", [0, 1, 5, 33, 70])
def test_out_prod(bench, k):
    a, b = some(2, 1, k, 7), some(4, 3, k, 5)
    (out,) = bench.compute(ops.out_prod(bench.ctx, bench.leaf(a), bench.leaf(b)))
    exact = np.einsum("abkm,abkn->abnm", a.repeat(2, 0).repeat(3, 1).astype("d"), b.astype("d"))
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)  # up to 70 products of some 1, added in F32


@pytest.mark.parametrize("type", [H, *(t for t in Type if t.is_quantized and t not in (Type.Q8_1, Type.Q8_K))],
                         ids=lambda type: type.name)  # fmt: skip
def test_out_prod_types(bench, type):
    w, exact = weights(bench, type, 5, 256)
    exact = np.where(np.isfinite(exact), exact, 0)
    b = some(5, 4)
    turned = ops.transpose(bench.ctx, bench.leaf(b.T))  # any strides
    (out,) = bench.compute(ops.out_prod(bench.ctx, w, turned))
    finite = np.isfinite(out).all(0)
    assert finite.any() or type not in (H, Q)
    products = b.astype("d")[:, :, None] * exact[:, None]
    bound = 1e-6 * np.abs(products).sum(0)  # five products, each rounded and added in F32
    assert (np.abs(out - products.sum(0)) <= bound)[:, finite].all()


@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (16, 0), (33, 7)])
def test_solve_tri(calc, n, k):
    a, b = np.tril(some(2, 3, n, n)) / n + np.eye(n, dtype="f"), some(2, 3, n, k)
    exact = np.linalg.solve(a.astype("d"), b.astype("d"))
    out = calc(lambda ctx, a, b: ops.solve_tri(ctx, a, b), a + np.triu(some(n, n), 1), b) if k else np.zeros_like(b)
    np.testing.assert_allclose(out, exact, rtol=1e-3, atol=1e-4)  # well conditioned: 33 steps in F32


def test_solve_tri_with_a_zero_on_the_diagonal(calc):
    out = calc(ops.solve_tri, np.zeros((2, 2), "f"), np.array([[1.0], [2.0]], "f"))
    assert not np.isfinite(out).any()


BIG = 1 << 30


@pytest.mark.parametrize(
    "error, message, call, specs",
    [
        (ShapeError, "prec_set_acc: 99 is not a Prec",
         lambda ctx, a: ops.prec_set_acc(ops.mul_mat(ctx, a, a), 99), [(F, (4, 4))]),
        (ShapeError, "prec_set_acc: flash_attn_ext accumulates in F32 only",  # its kernel would end the process
         lambda ctx, a: ops.prec_set_acc(ops.flash_attn_ext(ctx, a, a, a, None, 1.0), Prec.F16), [(F, (4, 4))]),
        (ShapeError, "prec_set_src: operand 0 of the op MUL_MAT has no such setting",
         lambda ctx, a: ops.prec_set_src(ops.mul_mat(ctx, a, a), Prec.F32, 0), [(F, (4, 4))]),
        (ShapeError, "prec_set_src: operand -1 of the op MUL_MAT has no such setting",
         lambda ctx, a: ops.prec_set_src(ops.mul_mat(ctx, a, a), Prec.F32, -1), [(F, (4, 4))]),
        (ShapeError, "prec_set_src: operand 1 of the op NONE has no such setting",
         lambda ctx, a: ops.prec_set_src(a, Prec.F32, 1), [(F, (4, 4))]),
        (ShapeError, "mul_mat_set_hint: 7 is not an OpHint",
         lambda ctx, a: ops.mul_mat_set_hint(ops.mul_mat(ctx, a, a), 7), [(F, (4, 4))]),
        (DTypeError, "mul_mat_set_hint: the second operand of mul_mat must be F32 or F16",
         lambda ctx, a: ops.mul_mat_set_hint(ops.mul_mat(ctx, a, a), OpHint.SRC0_IS_HADAMARD), [(B, (4, 4))]),
        (ShapeError, "mul_mat_id: too many experts and tokens at once", ops.mul_mat_id,
         [(F, (1, 1, 1 << 20)), (F, (1, 1, 1 << 10)), (I, (1, 1 << 10))]),
        (ShapeError, "add_id: shapes do not match", ops.add_id, [(F, (4, 2, 3)), (F, (4, 5, 2)), (I, (2, 3))]),
        (DTypeError, "out_prod: a must be F32, F16 or quantised, b F32", ops.out_prod, [(B, (4, 3)), (F, (2, 3))]),
        (DTypeError, "out_prod: a must be F32, F16 or quantised, b F32", ops.out_prod, [(F, (4, 3)), (H, (2, 3))]),
        (ShapeError, "out_prod: shapes do not match", ops.out_prod, [(F, (4, 3)), (F, (2, 4))]),
        (ShapeError, "out_prod: shapes do not match", ops.out_prod, [(F, (4, 3, 0)), (F, (2, 3, 2))]),
        (ShapeError, "out_prod: shapes do not match", ops.out_prod, [(Q, (32, 3)), (F, (2, 3, 2))]),
        (ShapeError, "out_prod: a must not be transposed",
         lambda ctx, a, b: ops.out_prod(ctx, ops.transpose(ctx, a), b), [(F, (3, 4)), (F, (2, 3))]),
        (ShapeError, "out_prod: rows are more than 67106816 bytes apart", ops.out_prod,
         [(F, (1 << 25, 2)), (F, (1, 2))]),
        (ShapeError, "out_prod: the result is too large", ops.out_prod, [(F, (1 << 16, 1)), (F, (1 << 15, 1))]),
        (ShapeError, "solve_tri: ggml solves with lower triangular matrices on the left only, diagonals not ones",
         lambda ctx, a, b: ops.solve_tri(ctx, a, b, True, False), [(F, (3, 3)), (F, (2, 3))]),
        (DTypeError, "solve_tri: a and b must be F32", ops.solve_tri, [(H, (3, 3)), (F, (2, 3))]),
        (ShapeError, "solve_tri: a must be square, b have as many rows and matrices", ops.solve_tri,
         [(F, (3, 3)), (F, (3, 2))]),
        (ShapeError, "solve_tri: a and b must be contiguous",
         lambda ctx, a, b: ops.solve_tri(ctx, a, ops.transpose(ctx, b)), [(F, (3, 3)), (F, (3, 2))]),
    ],
)  # fmt: skip
def test_preconditions(error, message, call, specs):
    ctx = Context(Context.size_for(16))
    operands = [ctx.new_tensor(type, ne) for type, ne in specs]
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        call(ctx, *operands)


def test_add_id_of_what_is_computed(bench):
    """ggml would put the result where the biases are, of which it still picks rows."""
    a, biases, ids = np.zeros((1, 2, 3), "f"), RNG.standard_normal((2, 3)).astype("f"), np.array([[1, 0]], "i")
    b = ops.scale(bench.ctx, bench.leaf(biases), 1.0)
    (got,) = bench.compute(ops.add_id(bench.ctx, bench.leaf(a).set_output(), b, bench.leaf(ids)))
    np.testing.assert_array_equal(got.reshape(2, 3), biases[[1, 0]])
