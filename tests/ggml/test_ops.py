"""Every op against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.ggml import OpHint, Prec, RopeType, Type, dequantize, ops, quantize

RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def xielu(x):
    """Return xIELU of x with alpha_n = 0.5, alpha_p = 0.8, beta = 0.25 and eps = -0.125."""
    x, (alpha_n, alpha_p) = x.astype("d"), np.log1p(np.exp([0.5, 0.8]))
    below = (np.expm1(np.minimum(x, -0.125)) - x) * (alpha_n + 0.25)
    return np.where(x > 0, alpha_p * x**2, below) + 0.25 * x


def swiglu_oai(x, y, alpha, limit):
    x, y = np.minimum(x, limit), y.clip(-limit, limit)
    return x / (1 + np.exp(-alpha * x)) * (y + 1)


def nmse(x, y):
    """Return the mean squared error of x, relative to the mean square of y."""
    return float(((x.astype(np.float64) - y) ** 2).sum() / (y.astype(np.float64) ** 2).sum())


BROADCASTS = [
    ((5,), (5,)),
    ((3, 5), (5,)),
    ((3, 5), (3, 1)),
    ((2, 3, 4, 6), (3, 4, 2)),
    ((4, 3, 8), (2, 1, 8)),
    ((1,), (1,)),
]


@pytest.mark.parametrize("a_shape, b_shape", BROADCASTS)
@pytest.mark.parametrize("op, reference", [(ops.add, np.add), (ops.mul, np.multiply), (ops.div, np.divide)])
def test_binary(calc, op, reference, a_shape, b_shape):
    a, b = normal(*a_shape), normal(*b_shape) + 3
    n = len(b_shape)
    repeats = [x // y for x, y in zip(a_shape[len(a_shape) - n :], b_shape, strict=True)]
    np.testing.assert_array_equal(calc(op, a, b), reference(a, np.tile(b, repeats)))


@pytest.mark.parametrize("b_type", [np.float16, np.float32])
def test_binary_f16(calc, b_type):
    a, b = normal(3, 8).astype("e"), normal(3, 8).astype(b_type)
    out = calc(ops.add, a, b)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, (a.astype("f") + b.astype("f")).astype("e"))


def test_binary_of_views(bench):
    a, b = normal(4, 6), normal(6, 4)
    ta, tb = bench.leaf(a), bench.leaf(b)
    every_second = ops.view(bench.ctx, ta, (6, 2), (2 * ta.nb[1],), ta.nb[1])
    add, mul = bench.compute(
        ops.add(bench.ctx, ta, ops.transpose(bench.ctx, tb)), ops.mul(bench.ctx, every_second, every_second)
    )
    np.testing.assert_array_equal(add, a + b.T)
    np.testing.assert_array_equal(mul, a[1::2] ** 2)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 33)])
def test_rowwise(calc, shape):
    x = normal(*shape)
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.scale(ctx, a, 0.5), x), x * np.float32(0.5))
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.clamp(ctx, a, -0.5, 0.25), x), x.clip(-0.5, 0.25))
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.clamp(ctx, a, 0.0), x), x.clip(0))
    np.testing.assert_allclose(
        calc(ops.sum_rows, x),
        x.sum(-1, keepdims=True).reshape(*shape[:-1], 1)[-1:] if x.ndim == 1 else x.sum(-1, keepdims=True),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(calc(ops.silu, x), x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(calc(ops.gelu, x), gelu(x), rtol=2e-3, atol=2e-3)  # by a table of F16
    np.testing.assert_array_equal(calc(ops.relu, x), np.maximum(x, 0))
    np.testing.assert_array_equal(calc(ops.sqr, x), x * x)
    np.testing.assert_allclose(calc(ops.sigmoid, x), 1 / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(calc(ops.tanh, x), np.tanh(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        calc(lambda ctx, a: ops.xielu(ctx, a, 0.5, 0.8, 0.25, -0.125), x), xielu(x), rtol=1e-4, atol=1e-6
    )
    centred = x - x.mean(-1, keepdims=True, dtype="d")
    norm = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(calc(lambda ctx, a: ops.norm(ctx, a, 1e-6), x), norm, rtol=1e-4, atol=1e-5)
    rms = np.sqrt((x.astype("d") ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(calc(lambda ctx, a: ops.rms_norm(ctx, a, 1e-6), x), x / rms, rtol=1e-5)
    y = normal(*shape)
    np.testing.assert_allclose(calc(ops.swiglu_split, x, y), x / (1 + np.exp(-x)) * y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(calc(ops.geglu_split, x, y), gelu(x) * y, rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(
        calc(lambda ctx, a, b: ops.swiglu_oai(ctx, a, b, 1.5, 0.75), x, y),
        swiglu_oai(x, y, 1.5, 0.75),
        rtol=1e-5,
        atol=1e-6,
    )
    if shape[-1] % 2 == 0:
        left, right = np.split(x, 2, axis=-1)
        np.testing.assert_allclose(calc(ops.swiglu, x), left / (1 + np.exp(-left)) * right, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(calc(ops.soft_max, x), softmax(x), rtol=1e-5, atol=1e-6)


def test_rowwise_of_views(bench):
    x = normal(3, 4, 8)
    rows = ops.view(bench.ctx, bench.leaf(x), (4, 3), (8 * 4 * 4,), 16)  # the right half of row 0 of each matrix
    scaled, norm, silu, glu, sums = bench.compute(
        ops.clamp(bench.ctx, rows, -1, 1),
        ops.rms_norm(bench.ctx, rows, 0),
        ops.silu(bench.ctx, rows),
        ops.swiglu_split(bench.ctx, rows, rows),
        ops.sum_rows(bench.ctx, rows),
    )
    r = x[:, 0, 4:]
    np.testing.assert_array_equal(scaled, r.clip(-1, 1))
    np.testing.assert_allclose(norm, r / np.sqrt((r**2).mean(-1, keepdims=True)), rtol=1e-5)
    np.testing.assert_allclose(silu, r / (1 + np.exp(-r)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(glu, r / (1 + np.exp(-r)) * r, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums, r.sum(-1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_rms_norm_times_weight(calc):
    """ggml computes the two in one pass."""
    x, w = normal(5, 16), normal(16)
    out = calc(lambda ctx, a, b: ops.mul(ctx, ops.rms_norm(ctx, a, 1e-5), b), x, w)
    np.testing.assert_allclose(out, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["f", "e", "i", "q"])
@pytest.mark.parametrize("dim", range(4))
def test_concat(calc, dim, dtype):
    a, b = normal(2, 3, 4, 5) * 99, normal(2, 3, 4, 5) * 99
    b = np.take(b, range(2), axis=3 - dim)
    a, b = a.astype(dtype), b.astype(dtype)
    np.testing.assert_array_equal(
        calc(lambda ctx, x, y: ops.concat(ctx, x, y, dim), a, b), np.concatenate([a, b], 3 - dim)
    )


def test_swiglu_oai_without_a_limit(calc):
    x, y = normal(3, 5) * 20, normal(3, 5) * 20
    out = calc(lambda ctx, a, b: ops.swiglu_oai(ctx, a, b, 1.702, float("inf")), x, y)
    np.testing.assert_allclose(out, x / (1 + np.exp(-1.702 * x.astype("d"))) * (y + 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["f", "e", "i"])
@pytest.mark.parametrize("ne", [(5, 4, 3, 2), (10, 4, 3, 2), (5, 12, 3, 4), (15, 8, 6, 6), (5, 0, 3, 2)])
def test_repeat_4d(calc, ne, dtype):
    x = (normal(2, 3, 4, 5) * 99).astype(dtype)
    out = calc(lambda ctx, a: ops.repeat_4d(ctx, a, *ne), x)
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(out, np.tile(x, [n // m for n, m in zip(ne[::-1], x.shape, strict=True)]))


def test_repeat_4d_of_a_view(bench):
    x = normal(3, 4, 6)
    rows = ops.view(bench.ctx, bench.leaf(x), (6, 1, 3), (6 * 4, 6 * 4 * 4), 6 * 4)  # row 1 of each matrix
    (out,) = bench.compute(ops.repeat_4d(bench.ctx, rows, 6, 2, 3, 1))
    np.testing.assert_array_equal(out, np.repeat(x[:, 1:2], 2, axis=1))


@pytest.mark.parametrize("p", [(0, 0, 0, 0), (3, 0, 0, 0), (0, 2, 0, 1), (1, 2, 3, 4)])
def test_pad(calc, p):
    x = normal(2, 3, 4, 5)
    padded = np.pad(x, [(0, n) for n in p[::-1]])
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.pad(ctx, a, *p), x), padded)
    turned = np.pad(x.swapaxes(2, 3), [(0, n) for n in p[::-1]])
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.pad(ctx, ops.transpose(ctx, a), *p), x), turned)


# What stays in a weight's type is exact; the activations are rounded to F16 for F16 and BF16 weights (2^-11, 2^-9) and
# to 8 bits for quantised ones, about half a step of amax/127 of each block: 1e-5 to 1e-4 of normalised squared error.
MUL_MAT_BOUNDS = {Type.F32: 1e-12, Type.F16: 1e-6, Type.BF16: 2e-5}
WEIGHTS = [
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q8_0,
    Type.Q2_K,
    Type.Q3_K,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
    Type.IQ4_NL,
    Type.IQ4_XS,
    Type.MXFP4,
    Type.TQ2_0,
    Type.IQ3_S,
]


@pytest.mark.parametrize("type", WEIGHTS, ids=lambda type: type.name)
def test_mul_mat_types(calc, type):
    w, x = normal(13, 512), normal(5, 512)
    exact = dequantize(quantize(w, type), type, 512).astype("d")
    assert nmse(calc(ops.mul_mat, (w, type), x), x @ exact.T) < MUL_MAT_BOUNDS.get(type, 3e-4)
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.cast(ctx, a, Type.F32), (w, type)), exact.astype("f"))
    ids = np.array([3, 12, 0], "i")
    np.testing.assert_array_equal(calc(ops.get_rows, (w, type), ids), exact[ids].astype("f"))


@pytest.mark.parametrize(
    "k, m, n, batch_a, batch_b",
    [
        (1, 1, 1, (), ()),
        (33, 7, 5, (), ()),
        (64, 64, 64, (), (3,)),
        (16, 9, 1, (2,), (4,)),
        (8, 3, 2, (2, 1), (4, 6)),
    ],
)
def test_mul_mat_shapes(calc, k, m, n, batch_a, batch_b):
    a, b = normal(*batch_a, m, k), normal(*batch_b, n, k)
    wide = a.reshape((1,) * (b.ndim - a.ndim) + a.shape)
    for axis in range(b.ndim - 2):
        wide = np.repeat(wide, b.shape[axis] // wide.shape[axis], axis)
    exact = (b.astype("d") @ wide.swapaxes(-1, -2)).reshape(*b.shape[:-1], m)
    out = calc(ops.mul_mat, a, b)
    np.testing.assert_allclose(out.reshape(exact.shape), exact, rtol=1e-4, atol=1e-5)


def test_mul_mat_of_views(bench):
    """K and Q of attention: heads are permuted, rows stay."""
    k, q = normal(10, 2, 8), normal(3, 4, 8)  # [n_kv, n_head_kv, n_embd_head], [n_tokens, n_head, n_embd_head]
    kq = ops.mul_mat(
        bench.ctx, ops.permute(bench.ctx, bench.leaf(k), 0, 2, 1, 3), ops.permute(bench.ctx, bench.leaf(q), 0, 2, 1, 3)
    )
    out = bench.compute(ops.prec_set_acc(kq, Prec.F32))[0]
    exact = np.einsum("hqd,khd->hqk", q.transpose(1, 0, 2), k.repeat(2, axis=1))
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=1e-5)


def test_mul_mat_f16_f16(calc):
    a, b = normal(6, 32).astype("e"), normal(4, 32).astype("e")
    assert nmse(calc(ops.mul_mat, a, b), b.astype("d") @ a.astype("d").T) < 1e-6  # products are summed in F32


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_mul_mat_hadamard(calc, n):
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    h /= np.sqrt(np.float32(n))
    x = normal(5, n)
    out = calc(lambda ctx, a, b: ops.mul_mat_set_hint(ops.mul_mat(ctx, a, b), OpHint.SRC0_IS_HADAMARD), h, x)
    np.testing.assert_allclose(out, x @ h.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_K, Type.MXFP4], ids=lambda type: type.name)
@pytest.mark.parametrize("broadcast", [False, True])
def test_mul_mat_id(calc, type, broadcast):
    n_expert, n_ids, n_tokens, k, m = 4, 2, 3, 256, 5
    w, x = normal(n_expert, m, k), normal(n_tokens, 1 if broadcast else n_ids, k)
    ids = RNG.permuted(np.tile(np.arange(n_expert, dtype="i"), (n_tokens, 1)), axis=1)[:, :n_ids].copy()
    exact = dequantize(quantize(w, type), type, k).reshape(w.shape)
    expected = np.stack(
        [[exact[ids[t, i]] @ x[t, 0 if broadcast else i] for i in range(n_ids)] for t in range(n_tokens)]
    )
    assert nmse(calc(ops.mul_mat_id, (w, type), x, ids), expected) < MUL_MAT_BOUNDS.get(type, 3e-4)


def test_add_id(calc):
    a, b, ids = normal(3, 2, 8), normal(4, 8), np.array([[0, 1], [3, 3], [2, 0]], "i")
    np.testing.assert_array_equal(calc(ops.add_id, a, b, ids), a + b[ids])


def test_add_id_of_views(bench):
    """As models have them: the first experts of a longer list, and sums that are not contiguous."""
    a, b, ids = normal(3, 2, 16), normal(4, 16), np.array([[0, 1, 9], [3, 3, 9], [2, 0, 9]], "i")
    ta, tb, ti = bench.leaf(a), bench.leaf(b), bench.leaf(ids)
    half = ops.view(bench.ctx, ta, (8, 2, 3), ta.nb[1:3], 32)
    first = ops.view(bench.ctx, ti, (2, 3), (ti.nb[1],))
    (out,) = bench.compute(ops.add_id(bench.ctx, half, ops.view(bench.ctx, tb, (8, 4), (tb.nb[1],)), first))
    np.testing.assert_array_equal(out, a[..., 8:] + b[ids[:, :2], :8])


@pytest.mark.parametrize(
    "type", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_K, Type.MXFP4], ids=lambda type: type.name
)
def test_cast(calc, type):
    x = normal(3, 256)
    stored = calc(lambda ctx, a: ops.cast(ctx, a, type), x)
    back = dequantize(stored, type, 256)
    assert nmse(back, x) < {Type.F16: 1e-6, Type.BF16: 1e-4, Type.Q8_0: 1e-4}.get(type, 2e-2)  # 4 bits: 16 steps


def test_cast_integers_and_views(bench):
    x = (normal(4, 6) * 9).round()
    t = ops.transpose(bench.ctx, bench.leaf(x))
    half, whole = bench.compute(ops.cast(bench.ctx, t, Type.F16), ops.cast(bench.ctx, t, Type.I32))
    np.testing.assert_array_equal(half, x.T.astype("e"))
    np.testing.assert_array_equal(whole, x.T.astype("i"))


def test_cont_reshape_permute(bench):
    x = normal(2, 3, 4, 5)
    t = bench.leaf(x)
    a, b, c = bench.compute(
        ops.permute(bench.ctx, t, 2, 0, 3, 1),
        ops.reshape(bench.ctx, t, 10, 12),
        ops.cont(bench.ctx, ops.transpose(bench.ctx, t), 8, 15),
    )
    np.testing.assert_array_equal(a, permuted(x, (2, 0, 3, 1)))
    np.testing.assert_array_equal(b, x.reshape(12, 10))
    np.testing.assert_array_equal(c, x.swapaxes(-1, -2).reshape(15, 8))


def permuted(x, axes):
    """Return x as ops.permute gives it: dimension axes[i] of the result, in ggml's order, is dimension i of x."""
    order = [axes.index(i) for i in range(4)]
    return x.transpose([3 - i for i in order[::-1]])


@pytest.mark.parametrize("type", [Type.F32, Type.Q8_0], ids=lambda type: type.name)
def test_view(calc, type):
    x = normal(6, 64)
    exact = dequantize(quantize(x, type), type, 64)
    out = calc(
        lambda ctx, a: ops.cast(ctx, ops.cont(ctx, ops.view(ctx, a, (32, 3), (2 * a.nb[1],), a.nb[1] // 2)), Type.F32),
        (x, type),
    )
    np.testing.assert_array_equal(out, exact[::2, 32:])


def test_get_rows_batched(calc):
    x, ids = normal(2, 3, 7, 4), RNG.integers(0, 7, (2, 3, 5), dtype="i")
    np.testing.assert_array_equal(calc(ops.get_rows, x, ids), np.take_along_axis(x, ids[..., None], axis=2))
    i32 = RNG.integers(0, 99, (7, 4), dtype="i")
    np.testing.assert_array_equal(calc(ops.get_rows, i32, ids[0, 0]), i32[ids[0, 0]])


@pytest.mark.parametrize("index", ["i", "q"])
@pytest.mark.parametrize("source", ["f", "e"])
@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.Q8_0, Type.MXFP4], ids=lambda type: type.name)
def test_set_rows(bench, type, source, index):
    a, b, ids = normal(9, 32), normal(4, 32).astype(source), np.array([8, 0, 3, 5], index)
    ta = bench.leaf(a, type)
    bench.compute(ops.set_rows(bench.ctx, ta, bench.leaf(b), bench.leaf(ids)))
    expected = dequantize(quantize(a, type), type, 32)
    expected[ids] = dequantize(quantize(b, type), type, 32)
    np.testing.assert_array_equal(dequantize(ta.to_numpy(), type, 32), expected)


@pytest.mark.parametrize("dtype", ["f", "e"])
@pytest.mark.parametrize("heads", [1, 4])
def test_soft_max_ext(calc, dtype, heads):
    x = normal(2, 4, 3, 8)
    mask = np.where(RNG.random((1, heads, 5, 8)) < 0.3, -np.inf, 0).astype(dtype)
    mask[..., 0] = 0
    out = calc(lambda ctx, a, m: ops.soft_max_ext(ctx, a, m, 0.25), x, mask)
    np.testing.assert_allclose(out, softmax(x * 0.25 + mask[:, :, :3].astype("f")), rtol=1e-4, atol=1e-6)
    out = calc(lambda ctx, a: ops.soft_max_ext(ctx, a, None, 2.0), x)
    np.testing.assert_allclose(out, softmax(x * 2), rtol=1e-4, atol=1e-6)


def test_soft_max_ext_alibi(calc):
    x, mask = normal(4, 3, 8), -np.arange(24, dtype="f").reshape(1, 3, 8)
    slopes = 2.0 ** -(8 / 4 * np.arange(1, 5, dtype="f"))[:, None, None]
    out = calc(lambda ctx, a, m: ops.soft_max_ext(ctx, a, m, 1.0, 8.0), x, mask)
    np.testing.assert_allclose(out, softmax(x + slopes * mask), rtol=1e-4, atol=1e-6)


def rope(x, pos, n_dims, mode, base, factors):
    """Return x [n_tokens, n_head, n_embd_head], rotated."""
    theta = pos[:, None] * base ** (-np.arange(0, n_dims, 2) / n_dims) / factors
    cos, sin = np.cos(theta)[:, None], np.sin(theta)[:, None]
    out, half = x.astype("d"), n_dims // 2
    first, second = (
        (slice(0, n_dims, 2), slice(1, n_dims, 2)) if mode == RopeType.NORMAL else (slice(half), slice(half, n_dims))
    )
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


@pytest.mark.parametrize("mode", [RopeType.NORMAL, RopeType.NEOX])
@pytest.mark.parametrize("n_dims", [2, 8, 16])
@pytest.mark.parametrize("with_factors", [False, True])
def test_rope_ext(calc, mode, n_dims, with_factors):
    x, pos = normal(5, 3, 16), np.array([0, 1, 2, 77, 5], "i")
    factors = RNG.random(8, dtype="f") + 1

    def op(ctx, a, p, f):
        return ops.rope_ext(ctx, a, p, f if with_factors else None, n_dims, mode, 0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0)

    used = factors[: n_dims // 2] if with_factors else 1.0
    np.testing.assert_allclose(calc(op, x, pos, factors), rope(x, pos, n_dims, mode, 1e4, used), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3, 33])
def test_argsort_top_k(calc, k):
    x = RNG.permuted(np.arange(4 * 33, dtype="f").reshape(2, 2, 33), axis=-1)
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.argsort_top_k(ctx, a, k), x), (-x).argsort(-1)[..., :k])


@pytest.mark.parametrize("n_tokens", [1, 3, 70])
@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.Q8_0], ids=lambda type: type.name)
def test_flash_attn_ext(calc, type, n_tokens):
    n_head, n_head_kv, n_kv, d = 4, 2, 96, 32
    q, k, v = normal(n_head, n_tokens, d), normal(n_head_kv, n_kv, d), normal(n_head_kv, n_kv, d)
    mask = np.where(RNG.random((1, n_tokens, n_kv)) < 0.5, -np.inf, 0).astype("e")
    mask[..., 0] = 0
    out = calc(lambda ctx, *t: ops.flash_attn_ext(ctx, *t, d**-0.5), q, (k, type), (v, type), mask)
    k, v = (dequantize(quantize(t, type), type, d).reshape(t.shape).repeat(2, axis=0) for t in (k, v))
    exact = softmax(q @ k.swapaxes(1, 2) * d**-0.5 + mask.astype("f")) @ v
    # F16 and quantised K round Q to 11 or 8 bits, and F16 V is summed in F16
    assert nmse(out, exact.transpose(1, 0, 2)) < {Type.F32: 1e-10, Type.F16: 2e-5}.get(type, 3e-4)


def test_flash_attn_ext_softcap(calc):
    q, k, v = normal(2, 3, 16), normal(2, 8, 16), normal(2, 8, 24)
    out = calc(lambda ctx, *t: ops.flash_attn_ext(ctx, *t, None, 0.5, 0.0, 3.0), q, k, v)
    exact = softmax(np.tanh(q @ k.swapaxes(1, 2) * 0.5 / 3) * 3) @ v
    np.testing.assert_allclose(out, exact.transpose(1, 0, 2), rtol=1e-3, atol=1e-4)


def test_empty_tensors(calc):
    x, none = normal(3, 8), np.empty((0, 8), "f")
    assert calc(lambda ctx, a, b: ops.mul_mat(ctx, a, ops.silu(ctx, b)), x, none).size == 0
    np.testing.assert_array_equal(calc(lambda ctx, a, b: ops.concat(ctx, a, b, 1), x, none), x)
    assert calc(ops.get_rows, x, np.empty(0, "i")).size == 0
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.pad(ctx, a, 0, 2, 0, 0), none), np.zeros((2, 8)))
