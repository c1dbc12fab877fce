"""Rotary position embedding in all its modes, against rotations written out pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import RopeType, Type, ops

RNG = np.random.default_rng(61)
YARN = (0, 1e4, 1.0, 0.0, 1.0, 0.0, 0.0)  # without extrapolation
SECTIONED = [RopeType.MROPE, RopeType.IMROPE, RopeType.VISION]
# the kernel multiplies the angle up in F32, pair by pair: of positions up to 77 errors of some 1e-5 remain
F32 = {"rtol": 1e-4, "atol": 1e-4}
F16 = {"rtol": 2e-3, "atol": 2e-3}  # half an unit in the last of F16's 11 bits


def normal(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def ramp(low, high, i):
    return 1 - min(1, max(0, (i // 2 - low) / max(0.001, high - low)))


def angle(p, i, n_dims, yarn, factor):
    """Return by which angle pair i // 2 turns at position p, and what its length is multiplied by."""
    n_ctx_orig, base, scale, ext, attn, fast, slow = yarn
    theta = p * base ** (-i / n_dims) / factor
    if ext == 0:
        return scale * theta, attn
    low, high = (n_dims * math.log(n_ctx_orig / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in (fast, slow))
    mix = ramp(max(0, math.floor(low)), min(n_dims - 1, math.ceil(high)), i) * ext
    return scale * theta * (1 - mix) + theta * mix, attn * (1 + 0.1 * math.log(1 / scale))


def kind_of(sector, sections, mode):
    """Return which of the four positions a pair in this sector turns by."""
    if mode == RopeType.IMROPE:
        kind = sector % 3
        return kind if sector < 3 * sections[kind] else 3
    return next((k for k in range(3) if sector < sum(sections[: k + 1])), 3)


def rope(x, pos, n_dims, mode, yarn=YARN, factors=None, sections=(1, 0, 0, 0), offset=0, back=False):
    """Return x [..., n_tokens, n_head, n_embd_head] rotated; pos: [n_tokens], or [4, n_tokens]."""
    out, pos = x.astype("d"), np.atleast_2d(pos)
    vision = mode == RopeType.VISION
    for t in range(x.shape[-3]):
        for i in range(0, 2 * n_dims if vision else n_dims, 2):
            sector = (i // 2) % sum(sections)
            kind = kind_of(sector, sections, mode) if len(pos) == 4 else 0
            step = 2 * (sector - sum(sections[:kind])) if vision else i
            factor = 1.0 if factors is None else factors[i // 2]
            theta, length = angle(pos[kind, t], step, n_dims, yarn, factor)
            cos, sin = math.cos(theta) * length, math.sin(theta) * length * (-1 if back else 1)
            j = offset + (i if mode == RopeType.NORMAL else i // 2)
            k = j + (1 if mode == RopeType.NORMAL else n_dims if vision else n_dims // 2)
            a, b = x[..., t, :, j].astype("d"), x[..., t, :, k].astype("d")
            out[..., t, :, j], out[..., t, :, k] = a * cos - b * sin, a * sin + b * cos
    return out


POS = np.array([0, 1, 2, 77, 5], "i")
POS4 = np.array([[0, 1, 2, 77, 5], [3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]], "i")


@pytest.mark.parametrize("name", ["rope", "rope_inplace"])
@pytest.mark.parametrize("mode", [RopeType.NORMAL, RopeType.NEOX])
@pytest.mark.parametrize("dtype", ["f", "e"])
def test_rope(calc, name, mode, dtype):
    x = normal(2, 5, 3, 10).astype(dtype)
    out = calc(lambda ctx, a, p: getattr(ops, name)(ctx, a, p, 6, mode), x, POS)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, rope(x, POS, 6, mode), **(F32 if dtype == "f" else F16))


@pytest.mark.parametrize("name", ["rope_ext", "rope_ext_inplace", "rope_ext_back"])
@pytest.mark.parametrize("mode", [RopeType.NORMAL, RopeType.NEOX])
@pytest.mark.parametrize("yarn", [YARN, (32, 1e4, 0.25, 1.0, 1.1, 8.0, 1.0)])
@pytest.mark.parametrize("n_factors", [0, 3, 8])
def test_rope_ext(calc, name, mode, yarn, n_factors):
    x, factors = normal(5, 3, 16), RNG.random(8, dtype="f") + 1

    def op(ctx, a, p, f):
        return getattr(ops, name)(ctx, a, p, f if n_factors else None, 6, mode, *yarn)

    expected = rope(x, POS, 6, mode, yarn, factors if n_factors else None, back=name.endswith("back"))
    np.testing.assert_allclose(calc(op, x, POS, factors[: n_factors or 1]), expected, **F32)


@pytest.mark.parametrize("mode", SECTIONED)
@pytest.mark.parametrize("name", ["rope_multi", "rope_multi_inplace", "rope_multi_back"])
@pytest.mark.parametrize("sections", [(2, 1, 1, 0), (1, 2, 3, 2), (0, 0, 1, 0), (3, 0, 0, 5)])
def test_rope_multi(calc, mode, name, sections):
    n_dims = 8 if mode == RopeType.VISION else 12
    if mode == RopeType.VISION:
        sections = tuple(sorted(sections, reverse=True))  # empty ones behind
    x, factors = normal(5, 2, 16), RNG.random(8, dtype="f") + 1
    for used in (None, factors):

        def op(ctx, a, p, f, used=used):
            return getattr(ops, name)(ctx, a, p, None if used is None else f, n_dims, sections, mode, *YARN)

        expected = rope(x, POS4, n_dims, mode, YARN, used, sections, back=name.endswith("back"))
        np.testing.assert_allclose(calc(op, x, POS4.reshape(-1), factors), expected, **F32)


@pytest.mark.parametrize("mode", [RopeType.NORMAL, RopeType.NEOX])
def test_rope_multi_without_sections(calc, mode):
    x = normal(5, 2, 8)
    out = calc(lambda ctx, a, p: ops.rope_multi(ctx, a, p, None, 8, (9, 9, 9, 9), mode, *YARN), x, POS)
    np.testing.assert_allclose(out, rope(x, POS, 8, mode), **F32)


@pytest.mark.parametrize("mode", [RopeType.NORMAL, RopeType.NEOX])
@pytest.mark.parametrize("offset", [0, 4, 10])
def test_rope_set_offset(calc, mode, offset):
    x = normal(5, 2, 16)
    out = calc(lambda ctx, a, p: ops.rope_set_offset(ops.rope(ctx, a, p, 6, mode), offset), x, POS)
    np.testing.assert_allclose(out, rope(x, POS, 6, mode, offset=offset), **F32)


def test_back_undoes(calc):
    x = normal(5, 2, 8)

    def op(ctx, a, p):
        there = ops.rope_ext(ctx, a, p, None, 8, RopeType.NEOX, *YARN)
        return ops.rope_ext_back(ctx, there, p, None, 8, RopeType.NEOX, *YARN)

    np.testing.assert_allclose(calc(op, x, POS), x, rtol=1e-5, atol=1e-5)


def test_permuted(calc):
    x = normal(3, 5, 8)  # heads outside, tokens inside
    out = calc(lambda ctx, a, p: ops.rope(ctx, ops.permute(ctx, a, 0, 2, 1, 3), p, 8, RopeType.NORMAL), x, POS)
    np.testing.assert_allclose(out, rope(x.transpose(1, 0, 2), POS, 8, RopeType.NORMAL), **F32)


def test_empty(bench):
    out = ops.rope(bench.ctx, bench.leaf(normal(0, 2, 8)), bench.leaf(np.zeros(0, "i")), 8, RopeType.NEOX)
    assert out.ne == (8, 2, 0, 1)


def multi(ctx, a, p, sections=(1, 1, 1, 1), mode=RopeType.MROPE, n_dims=8):
    return ops.rope_multi(ctx, a, p, None, n_dims, sections, mode, *YARN)


@pytest.mark.parametrize(("op", "error", "message"), [
    (lambda ctx, a, p, q: ops.rope(ctx, a, p, 8, 8), ShapeError, "rope: mode 8 is neither"),
    (lambda ctx, a, p, q: ops.rope(ctx, p, p, 8, 0), DTypeError, r"rope: a must be F32 or F16 \(a I32, pos I32\)"),
    (lambda ctx, a, p, q: ops.rope(ctx, a, a, 8, 0), DTypeError, "rope: pos must be I32"),
    (lambda ctx, a, p, q: ops.rope(ctx, a, q, 8, 0), ShapeError, "rope: pos needs one position for each token"),
    (lambda ctx, a, p, q: ops.rope(ctx, a, p, 7, 0), ShapeError, "rope: n_dims = 7 is not an even number up to ne0"),
    (lambda ctx, a, p, q: ops.rope(ctx, a, p, 0, 0), ShapeError, "rope: n_dims = 0 is not"),
    (lambda ctx, a, p, q: ops.rope(ctx, ops.permute(ctx, a, 1, 0, 2, 3), p, 2, 0), ShapeError, "rope: the rows of a"),
    (lambda ctx, a, p, q: multi(ctx, a, p), ShapeError, "rope_multi: pos needs 4 positions for each token"),
    (lambda ctx, a, p, q: multi(ctx, a, q, (0, 0, 0, 1)), ShapeError, r"sections \[0, 0, 0, 1\] are not four"),
    (lambda ctx, a, p, q: multi(ctx, a, q, (1, 1, 1, -1)), ShapeError, "sections .* are not four"),
    (lambda ctx, a, p, q: multi(ctx, a, q, (1, 1, 1)), ShapeError, "sections .* are not four"),
    (lambda ctx, a, p, q: multi(ctx, a, q, (1, 1, 1, 6)), ShapeError, "of at most 8 together"),
    (lambda ctx, a, p, q: multi(ctx, a, q, mode=RopeType.VISION), ShapeError, "n_dims = 8 is not half of ne0"),
    (
        lambda ctx, a, p, q: multi(ctx, a, q, (1, 0, 1, 0), RopeType.VISION, 4),
        ShapeError,
        r"sections \[1, 0, 1, 0\] have an empty one before another",
    ),
    (lambda ctx, a, p, q: multi(ctx, a, q, mode=10), ShapeError, "rope_multi: mode 10 is not a RopeType"),
    (lambda ctx, a, p, q: ops.rope_set_offset(a, 2), ShapeError, "rope_set_offset: NONE is not the result of rope"),
    (
        lambda ctx, a, p, q: ops.rope_set_offset(multi(ctx, a, q, mode=RopeType.VISION, n_dims=4), 0),
        ShapeError,
        "rope_set_offset: RopeType.VISION rotates all elements",
    ),
    *(
        (lambda ctx, a, p, q, n=n: ops.rope_set_offset(ops.rope(ctx, a, p, 4, 0), n), ShapeError, f"n_offs = {n} is")
        for n in (-2, 1, 6)
    ),
])  # fmt: skip
def test_refused(bench, op, error, message):
    a = bench.leaf(normal(5, 3, 8))
    p, q = bench.leaf(POS), bench.leaf(POS4.reshape(-1))
    with pytest.raises(error, match=message):
        op(bench.ctx, a, p, q)


def test_too_few_factors(bench):
    a, p, f = bench.leaf(normal(5, 3, 8)), bench.leaf(POS), bench.leaf(normal(3))
    with pytest.raises(ShapeError, match="freq_factors must be F32"):
        ops.rope_ext(bench.ctx, a, p, f, 8, RopeType.NEOX, *YARN)
    wrong = bench.ctx.new_tensor(Type.F16, (4,))
    with pytest.raises(ShapeError, match="freq_factors must be F32"):
        ops.rope_ext(bench.ctx, a, p, wrong, 8, RopeType.NEOX, *YARN)
