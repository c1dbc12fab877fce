"""Softmax with masks, in place and backward, flash attention's settings, and the lightning indexer."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Prec, Type, dequantize, ops, quantize

RNG = np.random.default_rng(62)
F32 = {"rtol": 1e-5, "atol": 1e-6}  # sums of up to 37 elements in F32, and its exp


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def softmax(x):
    e = np.exp(x.astype("d") - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_operands_that_are_read_to_the_end(bench):
    """ggml would put the results in their memory, as no other node reads them."""
    dy, y, one = normal(3, 8), normal(3, 8), normal(2, 1)
    a, b = bench.leaf(dy).set_output(), ops.scale(bench.ctx, bench.leaf(y), 1.0)
    single, sink = bench.leaf(one[:1]).set_output(), ops.scale(bench.ctx, bench.leaf(one[1]), 1.0)
    back, share = bench.compute(
        ops.soft_max_ext_back(bench.ctx, a, b), ops.soft_max_ext(bench.ctx, single, None, sinks=sink)
    )
    np.testing.assert_allclose(back, (dy - (dy * y).sum(-1, keepdims=True)) * y, rtol=1e-4, atol=1e-5)  # cancellation
    np.testing.assert_allclose(share, 1 / (1 + np.exp(one[1] - one[0])), **F32)
    with pytest.raises(ShapeError, match=r"^soft_max_ext_back_inplace: a and b overlap"):
        ops.soft_max_ext_back_inplace(bench.ctx, a, a)


@pytest.mark.parametrize("name", ["soft_max", "soft_max_inplace"])
@pytest.mark.parametrize("shape", [(1,), (37,), (2, 3, 4, 17)])
def test_soft_max(calc, name, shape):
    x = normal(*shape)
    np.testing.assert_allclose(calc(getattr(ops, name), x), softmax(x), **F32)


@pytest.mark.parametrize("name", ["soft_max_ext", "soft_max_ext_inplace"])
@pytest.mark.parametrize("dtype", ["f", "e"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_soft_max_ext(calc, name, dtype, heads):
    x, mask = normal(3, 4, 5, 17), normal(3, heads, 6, 17).astype(dtype)
    out = calc(lambda ctx, a, m: getattr(ops, name)(ctx, a, m, 0.5), x, mask)
    wide = np.stack([mask[:, h % heads, :5] for h in range(4)], axis=1)  # ggml repeats a mask as a whole
    np.testing.assert_allclose(out, softmax(x * 0.5 + wide), **F32)


def test_soft_max_ext_inplace_alibi_and_sinks(calc):
    x, mask, sinks = normal(2, 3, 2, 9), normal(1, 1, 2, 9), normal(3)
    out = calc(lambda ctx, a, m, s: ops.soft_max_ext_inplace(ctx, a, m, 2.0, 4.0, s), x, mask, sinks)
    # of 3 heads 2 have the slopes of a power of two, and the third one between
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-1])[:, None, None]
    logits = np.concatenate([x * 2 + slopes * mask, np.tile(sinks[:, None, None], (2, 1, 2, 1))], axis=-1)
    np.testing.assert_allclose(out, softmax(logits)[..., :-1], **F32)


def test_inplace_is_a_view(bench):
    a = bench.leaf(normal(3, 8))
    out = ops.soft_max_inplace(bench.ctx, ops.scale(bench.ctx, a, 1.0))
    twice = ops.scale(bench.ctx, out, 2.0)
    got, doubled = bench.compute(out, twice)
    np.testing.assert_allclose(doubled, 2 * got)


@pytest.mark.parametrize("name", ["soft_max_ext_back", "soft_max_ext_back_inplace"])
def test_soft_max_ext_back(calc, name):
    x, grad = normal(2, 3, 17), normal(2, 3, 17)
    y = softmax(x * 0.5)
    jacobian = np.einsum("...i,ij->...ij", y, np.eye(17)) - np.einsum("...i,...j->...ij", y, y)
    expected = 0.5 * np.einsum("...ij,...j->...i", jacobian, grad)
    out = calc(lambda ctx, g, y: getattr(ops, name)(ctx, g, y, 0.5), grad, y.astype("f"))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)  # differences of nearly equal numbers


def attend(q, k, v, scale, mask=None, cap=0.0, slopes=None):
    """Return softmax(q k^T * scale + mask) v, of [n_seq, n_head, n, d], with tokens before heads."""
    k, v = (each.repeat(q.shape[1] // each.shape[1], axis=1) for each in (k, v))
    logits = q.astype("d") @ k.swapaxes(2, 3) * scale
    if cap:
        logits = cap * np.tanh(logits / cap)
    if mask is not None:
        logits = logits + mask[:, :, : q.shape[2]] * (1.0 if slopes is None else slopes)
    return (softmax(logits) @ v).transpose(0, 2, 1, 3)


# of F16 sums are kept in F16; of quantised k the queries are quantised too
FLASH = {Type.F32: 1e-5, Type.F16: 5e-3, Type.BF16: 2e-2, Type.Q8_0: 2e-2, Type.Q4_0: 5e-2, Type.Q4_1: 5e-2}


@pytest.mark.parametrize("type", FLASH)
@pytest.mark.parametrize(("n", "n_kv"), [(1, 7), (1, 515), (3, 70), (67, 33)])
def test_flash_attn_ext(calc, type, n, n_kv):
    q, k, v = normal(2, 4, n, 64), normal(2, 2, n_kv, 64), normal(2, 2, n_kv, 32)
    stored = [dequantize(quantize(each, type), type, each.shape[-1]).reshape(each.shape) for each in (k, v)]
    mask = normal(1, 1, n + 1, n_kv).astype("e")
    out = calc(lambda ctx, *t: ops.flash_attn_ext(ctx, *t, 0.125), q, (k, type), (v, type), mask)
    np.testing.assert_allclose(out, attend(q, *stored, 0.125, mask), rtol=FLASH[type], atol=FLASH[type])


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_flash_attn_ext_bias_cap_and_permuted(calc, heads):
    q, k, v = normal(2, 3, 4, 9), normal(2, 7, 2, 9), normal(2, 7, 4, 5)  # tokens before heads
    mask = normal(1, heads, 3, 7).astype("e")

    def op(ctx, *leaves):
        turned = [ops.permute(ctx, each, 0, 2, 1, 3) for each in leaves[:3]]
        return ops.flash_attn_ext(ctx, *turned, leaves[3], 0.3, 8.0, 2.0)

    slopes = 2.0 ** -(2.0 * np.arange(1, 5))[:, None, None]
    wide = np.concatenate([mask] * (4 // heads), axis=1)
    expected = attend(*(each.transpose(0, 2, 1, 3) for each in (q, k, v)), 0.3, wide, 2.0, slopes)
    np.testing.assert_allclose(calc(op, q, k, v, mask), expected, rtol=1e-4, atol=1e-5)


def test_flash_attn_ext_settings(bench):
    queries, keys = normal(1, 2, 8), normal(1, 3, 8)
    q, k = bench.leaf(queries), bench.leaf(keys)
    out = ops.flash_attn_ext(bench.ctx, q, k, k, None, 1.0)
    assert ops.flash_attn_ext_get_prec(out) is Prec.UNDEFINED
    ops.prec_set_acc(out, Prec.F32)
    assert ops.flash_attn_ext_get_prec(out) is Prec.F32
    assert ops.flash_attn_ext_set_n_kv_max(out, 3) is out
    for n in (-1, -(2**31)):
        with pytest.raises(ShapeError, match=f"flash_attn_ext_set_n_kv_max: n_kv_max {n} is negative"):
            ops.flash_attn_ext_set_n_kv_max(out, n)
    for setting in (ops.flash_attn_ext_get_prec, lambda a: ops.flash_attn_ext_set_n_kv_max(a, 1)):
        with pytest.raises(ShapeError, match="NONE is not the result of flash_attn_ext"):
            setting(q)
    expected = attend(*(each[None] for each in (queries, keys, keys)), 1.0)
    np.testing.assert_allclose(bench.compute(out)[0].reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


# the kernel reads k as it is stored; of F16 masks 11 bits remain
@pytest.mark.parametrize("type", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0])
@pytest.mark.parametrize("streams", [1, 3])
def test_lightning_indexer(calc, type, streams):
    q, k, w = normal(3, 2, 4, 32), normal(3, 9, 1, 32), normal(3, 1, 2, 4)
    mask = normal(streams, 1, 2, 9).astype("e")
    stored = dequantize(quantize(k, type), type, 32).reshape(k.shape).astype("d")
    expected = np.empty((3, 1, 2, 9))
    for s, t, i in np.ndindex(3, 2, 9):
        dots = [max(q[s, t, h].astype("d") @ stored[s, i, 0], 0) * w[s, 0, t, h] for h in range(4)]
        expected[s, 0, t, i] = sum(dots) + mask[s % streams, 0, t, i]
    out = calc(ops.lightning_indexer, q, (k, type), w, mask)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def half(ctx, *ne):
    return ctx.new_tensor(Type.F16, ne)


def spread(ctx, a):
    """Return a view of a's rows [4, 1, 2], as far apart as ggml does not look at."""
    return ops.view(ctx, a, (4, 1, 2), (4, 16))


@pytest.mark.parametrize(("op", "error", "message"), [
    (lambda ctx, a: ops.soft_max_inplace(ctx, half(ctx, 4)), DTypeError, "soft_max_inplace: a must be F32"),
    (
        lambda ctx, a: ops.soft_max(ctx, ops.permute(ctx, a, 0, 2, 1, 3)),
        ShapeError,
        "soft_max: a must be contiguous",
    ),
    (lambda ctx, a: ops.soft_max_ext(ctx, a, None, 1, 1), ShapeError, "max_bias needs a mask"),
    (lambda ctx, a: ops.soft_max_ext_inplace(ctx, a, half(ctx, 4, 1)), ShapeError, "mask does not cover a"),
    (
        lambda ctx, a: ops.soft_max_ext_inplace(ctx, a, ctx.new_tensor(Type.I32, (4, 3))),
        DTypeError,
        "soft_max_ext_inplace: mask must be F16 or F32",
    ),
    (
        lambda ctx, a: ops.soft_max_ext_back(ctx, a, ops.view(ctx, a, (4, 3))),
        ShapeError,
        r"soft_max_ext_back: shapes differ \(a \[4, 3, 2, 1\], b \[4, 3, 1, 1\]\)",
    ),
    (
        lambda ctx, a: ops.flash_attn_ext(ctx, *[ctx.new_tensor(Type.F32, (4, 7, 1, 0)) for _ in "qkv"], None, 1),
        ShapeError,
        "flash_attn_ext: q, k and v do not match",  # the kernel would divide by ne3
    ),
    (lambda ctx, a: ops.soft_max_ext_back(ctx, a, a, 1, 2), ShapeError, "max_bias must be 0, not 2"),
    (
        lambda ctx, a: ops.soft_max_ext_back_inplace(ctx, spread(ctx, a), spread(ctx, a)),
        ShapeError,
        "soft_max_ext_back_inplace: the rows of a must lie at one distance",
    ),
    (
        lambda ctx, a: ops.lightning_indexer(ctx, a, a, a, a),
        DTypeError,
        "lightning_indexer: q and weights must be F32, mask F16",
    ),
    (
        lambda ctx, a: ops.lightning_indexer(ctx, a, a, a, half(ctx, 1)),
        ShapeError,
        "lightning_indexer: q, k, weights and mask do not match",
    ),
])  # fmt: skip
def test_refused(bench, op, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, bench.leaf(normal(2, 3, 4)))


def test_huge_rows_are_refused(bench):
    a = bench.ctx.new_tensor(Type.F32, (2**31, 1))
    for name in ("soft_max", "soft_max_inplace"):
        with pytest.raises(ShapeError, match=f"{name}: a is too large"):
            getattr(ops, name)(bench.ctx, a)
