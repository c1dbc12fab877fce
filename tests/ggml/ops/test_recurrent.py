"""Ops with a state, against loops token by token, and hyper-connections, against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, IndexRangeError, ShapeError
from pyggml_adapt.ggml import Type, ops

RNG = np.random.default_rng(66)
# F32 sums of up to 64 products, and states that several tokens go through
F32 = {"rtol": 1e-4, "atol": 1e-4}


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def between(low, high, *shape):
    return RNG.uniform(low, high, shape).astype("f")


@pytest.mark.parametrize("d_conv", [1, 4])
@pytest.mark.parametrize("n_t", [1, 6])
def test_ssm_conv(calc, d_conv, n_t):
    sx, weights = normal(2, 5, d_conv - 1 + n_t), normal(5, d_conv)
    expected = np.empty((2, n_t, 5))
    for s, t, i in np.ndindex(expected.shape):
        expected[s, t, i] = sx[s, i, t : t + d_conv].astype("d") @ weights[i]
    np.testing.assert_allclose(calc(ops.ssm_conv, sx, weights).reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def scan(s, x, dt, a, b, c, ids, k):
    """Return y, shape of x [n_seqs, n_tokens, n_head, dim], and the last k states, the latest first."""
    n_seqs, n_tokens, n_head, _ = x.shape
    y, states = np.zeros(x.shape), np.full((k, n_seqs, *s.shape[1:]), np.nan)
    for q, h in np.ndindex(n_seqs, n_head):
        state, group = s[ids[q], h].astype("d"), h // (n_head // b.shape[2])
        for t in range(n_tokens):
            step = np.log1p(np.exp(dt[q, t, h].astype("d")))
            state = state * np.exp(step * a[h]) + step * np.outer(x[q, t, h], b[q, t, group])
            y[q, t, h] = state @ c[q, t, group]
            if n_tokens - 1 - t < k:
                states[n_tokens - 1 - t, q, h] = state
    return y, states


@pytest.mark.parametrize("d_state", [1, 5, 40])
@pytest.mark.parametrize(("scalar", "k"), [(False, 1), (True, 1), (True, 3), (True, 6)])
@pytest.mark.parametrize("n_group", [1, 2])
def test_ssm_scan(calc, d_state, scalar, k, n_group):
    s, x, dt = normal(4, 4, 3, d_state), normal(2, 5, 4, 3), normal(2, 5, 4)
    a = -between(0.1, 2, 4, 1 if scalar else d_state)
    b, c = normal(2, 5, n_group, d_state), normal(2, 5, n_group, d_state)
    ids = np.array([3, 1], "i")
    out = calc(lambda ctx, *t: ops.ssm_scan(ctx, *t, k), s, x, dt, a, b, c, ids)
    y, states = scan(s, x, dt, a, b, c, ids, k)
    np.testing.assert_allclose(out[: y.size], y.reshape(-1), **F32)
    known = ~np.isnan(states).reshape(-1)  # those before the first token are left unset
    np.testing.assert_allclose(out[y.size :][known], states.reshape(-1)[known], **F32)


def test_ssm_scan_of_views(calc):
    s, x, dt, a = normal(1, 2, 3, 4), normal(2, 5, 2, 3), normal(1, 5, 2), -between(0.1, 2, 2, 1)
    b, c = normal(1, 5, 2, 1, 4)[:, :, 0], normal(1, 7, 1, 4)
    ids = np.zeros(1, "i")

    def op(ctx, s, x, dt, a, b, c, ids):
        x = ops.view(ctx, x, (3, 2, 5, 1), x.nb[1:], x.nb[3])  # the second sequence
        c = ops.view(ctx, c, (4, 1, 5, 1), c.nb[1:], 2 * c.nb[2])  # from the third token on
        return ops.ssm_scan(ctx, s, x, dt, a, b, c, ids, 1)

    y, states = scan(s, x[1:], dt, a, b, c[:, 2:], ids, 1)
    expected = np.concatenate([y.reshape(-1), states.reshape(-1)])
    np.testing.assert_allclose(calc(op, s, x, dt, a, b, c, ids), expected, **F32)


@pytest.mark.parametrize("bad", [-1, 4])
def test_ssm_scan_ids_are_checked(bench, bad):
    arrays = [normal(4, 1, 1, 2), normal(1, 1, 1, 1), normal(1, 1, 1), normal(1, 1), normal(1, 1, 1, 2)]
    s, x, dt, a, b = (bench.leaf(each) for each in arrays)
    ids = bench.leaf(np.array([bad], "i"))
    with pytest.raises(IndexRangeError, match=f"picks row {bad} of 4"):
        bench.compute(ops.ssm_scan(bench.ctx, s, x, dt, a, b, b, ids, 1))


def by_token(step, operands, state, n_seqs):
    """Return what step makes of each token and head, and the states, as the ops of RWKV lay them out."""
    n_tokens, n_head, size = operands[0].shape
    y, states = np.empty((n_tokens, n_head, size)), state.reshape(n_seqs, n_head, size, size).astype("d")
    for t, h in np.ndindex(n_tokens, n_head):
        seq = t // (n_tokens // n_seqs)
        y[t, h], states[seq, h] = step(states[seq, h], h, *(each[t, h].astype("d") for each in operands))
    return np.concatenate([y.reshape(-1), states.reshape(-1)]).reshape(-1, n_head * size)


@pytest.mark.parametrize("size", [1, 5, 16, 40])
@pytest.mark.parametrize("n_seqs", [1, 2])
def test_rwkv_wkv6(calc, size, n_seqs):
    k, v, r, td = normal(6, 3, size), normal(6, 3, size), normal(6, 3, size), between(0, 1, 6, 3, size)
    tf, state = normal(3, size), normal(n_seqs, 3 * size * size)

    def step(state, h, k, v, r, td):
        return r @ (np.outer(tf[h] * k, v) + state), td[:, None] * state + np.outer(k, v)

    expected = by_token(step, (k, v, r, td), state, n_seqs)
    out = calc(ops.rwkv_wkv6, k, v, r, tf, td, state)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, **F32)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("n_seqs", [1, 2])
def test_rwkv_wkv7(calc, size, n_seqs):
    r, k, v = (normal(4, 2, size) for _ in range(3))
    w, a, b = between(0, 1, 4, 2, size), between(-0.1, 0.1, 4, 2, size), between(-0.1, 0.1, 4, 2, size)
    state = normal(n_seqs, 2 * size * size)

    def step(state, h, r, w, k, v, a, b):
        state = state * w + np.outer(v, k) + np.outer(state @ a, b)
        return state @ r, state

    expected = by_token(step, (r, w, k, v, a, b), state, n_seqs)
    np.testing.assert_allclose(calc(ops.rwkv_wkv7, r, w, k, v, a, b, state), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5, 16, 40])
@pytest.mark.parametrize("n_seqs", [1, 3])
def test_gated_linear_attn(calc, size, n_seqs):
    k, v, q, g = normal(6, 2, size), normal(6, 2, size), normal(6, 2, size), between(0, 1, 6, 2, size)
    state = normal(n_seqs, 2 * size * size)

    def step(state, h, k, v, q, g):
        state = g[:, None] * state + np.outer(k, v)
        return 0.25 * q @ state, state

    expected = by_token(step, (k, v, q, g), state, n_seqs)
    out = calc(lambda ctx, *t: ops.gated_linear_attn(ctx, *t, 0.25), k, v, q, g, state)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, **F32)


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_gated_delta_net(calc, size, wide, count):
    q, k, v = normal(1, 4, 2, size), normal(2, 4, 4, size) / size**0.5, normal(2, 4, 4, size)
    g, beta = -between(0, 1, 2, 4, 4, size if wide else 1), between(0, 1, 2, 4, 4, 1)
    state = normal(2, 4, size, size)
    y, states = np.empty(v.shape), np.full((count, *state.shape), np.nan)
    for n, h in np.ndindex(2, 4):
        rows = state[n, h].astype("d")
        for t in range(4):
            key = k[n, t, h].astype("d")
            rows = rows * np.exp(g[n, t, h].astype("d"))
            rows = rows + np.outer(beta[n, t, h] * (v[n, t, h] - rows @ key), key)
            y[n, t, h] = rows @ q[0, t, h % 2] / size**0.5
            if 3 - t < count:
                states[3 - t, n, h] = rows
    out = calc(lambda ctx, *t: ops.gated_delta_net(ctx, *t, count), q, k, v, g, beta, state).reshape(-1)
    known = ~np.isnan(states).reshape(-1)
    np.testing.assert_allclose(out[: y.size], y.reshape(-1), **F32)
    np.testing.assert_allclose(out[y.size :][known], states.reshape(-1)[known], **F32)


def test_dsv4_hc_comb(calc):
    mixes, scale, base, eps = normal(5, 24), normal(4), normal(24), 1e-3
    comb = (mixes.astype("d") * scale[2] + base)[:, 8:].reshape(5, 4, 4)
    comb = np.exp(comb - comb.max(axis=2, keepdims=True))
    comb = comb / comb.sum(axis=2, keepdims=True) + eps
    for i in range(7):
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
        if i < 6:
            comb = comb / (comb.sum(axis=2, keepdims=True) + eps)
    out = calc(lambda ctx, *t: ops.dsv4_hc_comb(ctx, *t, eps, 7), mixes, scale, base)
    np.testing.assert_allclose(out, comb, rtol=1e-5)


@pytest.mark.parametrize("permuted", [False, True])
def test_dsv4_hc_pre(calc, permuted):
    x, weights, gate = normal(3, 4, 9), normal(3, 4), normal(3, 4, 9)

    def turn(ctx, each):
        return ops.permute(ctx, each, 1, 0, 2, 3) if permuted else each

    given = x.swapaxes(1, 2) if permuted else x
    out = calc(lambda ctx, x, w: ops.dsv4_hc_pre(ctx, turn(ctx, x), w), given, weights)
    np.testing.assert_allclose(out, np.einsum("the,th->te", x.astype("d"), weights), **F32)
    out = calc(lambda ctx, x, g: ops.dsv4_hc_pre_gated(ctx, turn(ctx, x), g, 0.5), given, gate)
    np.testing.assert_allclose(out, 0.5 * (x / (1 + np.exp(-gate.astype("d")))).sum(axis=1), **F32)


def test_dsv4_hc_post(calc):
    x, residual, post, comb = normal(3, 9), normal(3, 4, 9), normal(3, 4), normal(3, 4, 4)
    own = np.einsum("te,th->the", x.astype("d"), post)
    mixed = np.einsum("the,thg->tge", residual.astype("d"), comb)
    np.testing.assert_allclose(calc(ops.dsv4_hc_post, x, residual, post, comb), own + mixed, **F32)
    out = calc(lambda ctx, *t: ops.dsv4_hc_post(ctx, *t, None), x, residual, post)
    np.testing.assert_allclose(out, own + residual, **F32)


def f32(*ne):
    return lambda ctx: ctx.new_tensor(Type.F32, ne)


def half(*ne):
    return lambda ctx: ctx.new_tensor(Type.F16, ne)


def i32(*ne):
    return lambda ctx: ctx.new_tensor(Type.I32, ne)


SCAN = [f32(4, 3, 2, 2), f32(3, 2, 5, 1), f32(2, 5, 1), f32(4, 2), f32(4, 1, 5, 1), f32(4, 1, 5, 1), i32(1)]
DELTA = [f32(4, 2, 3), f32(4, 2, 3), f32(4, 2, 3), f32(1, 2, 3), f32(1, 2, 3), f32(4, 4, 2)]


def swap(leaves, at, leaf):
    return [*leaves[:at], leaf, *leaves[at + 1 :]]


@pytest.mark.parametrize(("op", "leaves", "error", "message"), [
    (ops.ssm_conv, [f32(6, 5), f32(4, 4)], ShapeError, r"ssm_conv: sx must be \[d_conv - 1 \+ n_t, d_inner, n_s\]"),
    (ops.ssm_conv, [f32(6, 5), half(4, 5)], DTypeError, r"ssm_conv: all must be F32 \(sx F32, c F16\)"),
    (
        lambda ctx, sx, c: ops.ssm_conv(ctx, ops.view(ctx, sx, (6, 4), sx.nb[1:2]), c),
        [f32(7, 4), f32(4, 4)],
        ShapeError,
        "ssm_conv: c and the planes of sx must be contiguous",
    ),
    (lambda *t: ops.ssm_scan(*t, 0), SCAN, ShapeError, "ssm_scan: K = 0 is not from 1 up"),
    (lambda *t: ops.ssm_scan(*t, 2), SCAN, ShapeError, "ssm_scan: K = 2 is not from 1 up, or not 1 though A.ne0"),
    (lambda *t: ops.ssm_scan(*t, 2**31), swap(SCAN, 3, f32(1, 2)), ShapeError, "ssm_scan: K = 2147483648"),
    (lambda *t: ops.ssm_scan(*t, 1), swap(SCAN, 4, f32(4, 3, 5, 1)), ShapeError, "ssm_scan: shapes do not match"),
    (lambda *t: ops.ssm_scan(*t, 1), swap(SCAN, 6, f32(1)), DTypeError, "ssm_scan: ids must be I32"),
    (lambda *t: ops.ssm_scan(*t, 1), swap(SCAN, 5, half(4, 1, 5)), DTypeError, "ssm_scan: all must be F32"),
    (lambda *t: ops.ssm_scan(*t, 1), swap(SCAN, 1, f32(3, 2, 0, 1)), ShapeError, "ssm_scan: an operand is empty"),
    (ops.rwkv_wkv6, [f32(4, 2, 3)] * 3 + [f32(4)] + [f32(4, 2, 3), f32(32)], ShapeError, r"tf must be \[S, n_head\]"),
    (ops.rwkv_wkv6, [f32(4, 2, 3)] * 3 + [f32(8)] + [f32(4, 2, 3), f32(32, 2)], ShapeError, "n_tokens a multiple of"),
    (ops.rwkv_wkv7, [f32(32, 2, 3)] * 6 + [f32(2048)], ShapeError, "rwkv_wkv7: S is not a multiple of 64"),
    (
        lambda *t: ops.gated_linear_attn(*t, 1.0),
        [f32(4, 2, 3)] * 3 + [f32(4, 2, 4), f32(32)],
        ShapeError,
        r"gated_linear_attn: operands must be \[S, n_head, n_tokens\], of one shape",
    ),
    (lambda *t: ops.gated_delta_net(*t, 0), DELTA, ShapeError, "gated_delta_net: K = 0"),
    (lambda *t: ops.gated_delta_net(*t, 1), swap(DELTA, 0, f32(5, 2, 3)), ShapeError, "shapes do not match"),
    (lambda *t: ops.gated_delta_net(*t, 1), swap(DELTA, 1, f32(4, 2, 3, 2)), ShapeError, "shapes do not match"),
    (lambda *t: ops.gated_delta_net(*t, 1), swap(DELTA, 3, f32(2, 2, 3)), ShapeError, "shapes do not match"),
    (lambda *t: ops.gated_delta_net(*t, 1), swap(DELTA, 5, half(4, 4, 2)), DTypeError, "all must be F32"),
    (lambda *t: ops.dsv4_hc_comb(*t, 0, 0), [f32(24, 3), f32(3), f32(24)], ShapeError, "n_iter = 0 is not from 1"),
    (lambda *t: ops.dsv4_hc_comb(*t, 0, 1), [f32(24, 3), f32(2), f32(24)], ShapeError, "mixes must be .24, n_tokens"),
    (ops.dsv4_hc_pre, [f32(4, 3, 2), f32(3, 3)], ShapeError, "dsv4_hc_pre: x must be"),
    (lambda *t: ops.dsv4_hc_pre_gated(*t, 1), [f32(4, 3), f32(4, 2)], ShapeError, "x and gate must be"),
    (ops.dsv4_hc_post, [f32(4, 2), f32(4, 3, 2), f32(3, 2), f32(3, 2, 2)], ShapeError, "comb do not match"),
])  # fmt: skip
def test_refused(bench, op, leaves, error, message):
    with pytest.raises(error, match=message):
        op(bench.ctx, *(leaf(bench.ctx) for leaf in leaves))
