"""Activations, gated and not, against NumPy in float64."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, GluOp, Type, dequantize, ops, quantize

RNG = np.random.default_rng(12)
FLOATS = [Type.F32, Type.F16, Type.BF16]
# Half a unit of the type's 11 or 8 bits, plus a few of F32's 24; some kernels approximate exp to within 2e-6.
RTOL = {Type.F32: 5e-6, Type.F16: 2**-11 + 5e-6, Type.BF16: 2**-8}
ERF = np.vectorize(math.erf, otypes="d")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + ERF(x / np.sqrt(2)))


def gelu_quick(x):
    return x * sigmoid(1.702 * x)


UNARY = {
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "gelu_quick": gelu_quick,
    "silu": silu,
    "hardswish": lambda x: x * (x + 3).clip(0, 6) / 6,
    "hardsigmoid": lambda x: (x + 3).clip(0, 6) / 6,
}
GATED = {
    "reglu": lambda x: np.maximum(x, 0),
    "geglu": gelu,
    "swiglu": silu,
    "geglu_erf": gelu_erf,
    "geglu_quick": gelu_quick,
}
TABLES = ("gelu", "gelu_quick", "geglu", "geglu_quick")  # looked up for a rounded to F16, and rounded to F16 themselves


def bounds(name, type):
    """Return rtol and atol; atol is what cancels near 0, times the largest element."""
    return (max(RTOL[type], 2**-9), 3e-3) if name in TABLES else (RTOL[type], 2e-6)


def sample(shape, type):
    x = (RNG.standard_normal(shape) * 3).astype("f")
    return dequantize(quantize(x, type), type, shape[-1]).reshape(shape)


def f32(bench, out):
    return out if out.type == Type.F32 else ops.cast(bench.ctx, out, Type.F32)


@pytest.mark.parametrize("type", FLOATS, ids=lambda type: type.name)
@pytest.mark.parametrize("name", UNARY)
def test_unary(bench, name, type):
    x = sample((3, 2, 5, 33), type)
    t = bench.leaf(x, type)
    part = ops.view(bench.ctx, t, (31, 4, 2), t.nb[1:3], 2 * t.type.type_size)
    outs = [getattr(ops, name)(bench.ctx, each) for each in (t, part)]
    assert outs[0].ne == t.ne and outs[0].type == type
    if hasattr(ops, f"{name}_inplace"):
        outs.append(getattr(ops, f"{name}_inplace")(bench.ctx, bench.leaf(x, type)))
    whole, of_part, *over = bench.compute(*(f32(bench, each) for each in outs))
    exact = UNARY[name](x.astype("d"))
    rtol, atol = bounds(name, type)
    np.testing.assert_allclose(whole, exact, rtol=rtol, atol=atol)
    np.testing.assert_allclose(of_part, exact[0, :2, :4, 2:], rtol=rtol, atol=atol)
    for each in over:
        np.testing.assert_array_equal(each, whole)


@pytest.mark.parametrize("type", [Type.F32, Type.F16], ids=lambda type: type.name)
def test_leaky_relu(bench, type):
    x = sample((3, 2, 7), type)
    outs = [ops.leaky_relu(bench.ctx, bench.leaf(x, type), 0.2, inplace) for inplace in (False, True)]
    for each in bench.compute(*outs):
        np.testing.assert_allclose(each, np.where(x > 0, x, 0.2 * x.astype("d")), rtol=RTOL[type])


@pytest.mark.parametrize("type", FLOATS, ids=lambda type: type.name)
def test_xielu(bench, type):
    x = sample((2, 3, 9), type)
    (got,) = bench.compute(f32(bench, ops.xielu(bench.ctx, bench.leaf(x, type), 0.5, 0.8, 0.25, -0.125)))
    d, (alpha_n, alpha_p) = x.astype("d"), np.log1p(np.exp([0.5, 0.8]))
    below = (np.expm1(np.minimum(d, -0.125)) - d) * (alpha_n + 0.25)
    np.testing.assert_allclose(got, np.where(d > 0, alpha_p * d**2, below) + 0.25 * d, rtol=RTOL[type], atol=2e-6)


@pytest.mark.parametrize("type", [Type.F32, Type.F16], ids=lambda type: type.name)
def test_silu_back(bench, type):
    dy, x = sample((3, 2, 17), type), sample((3, 2, 17), type)
    (got,) = bench.compute(ops.silu_back(bench.ctx, bench.leaf(dy, type), bench.leaf(x, type)))
    d, step = x.astype("d"), 1e-5
    slope = (silu(d + step) - silu(d - step)) / (2 * step)  # exact to step squared
    np.testing.assert_allclose(got, dy * slope, rtol=RTOL[type], atol=1e-5)


@pytest.mark.parametrize("type", FLOATS, ids=lambda type: type.name)
@pytest.mark.parametrize("name", GATED)
def test_gated(bench, name, type):
    x, y = sample((3, 2, 5, 34), type), sample((3, 2, 5, 34), type)
    a, b = bench.leaf(x, type), bench.leaf(y, type)
    part = ops.view(bench.ctx, a, (6, 30), a.nb[1:2], 2 * a.type.type_size)
    rest = ops.view(bench.ctx, b, (6, 30), b.nb[1:2])
    op = GluOp[name.upper()]
    outs = [
        getattr(ops, name)(bench.ctx, a),
        getattr(ops, f"{name}_swapped")(bench.ctx, a),
        getattr(ops, f"{name}_split")(bench.ctx, a, b),
        getattr(ops, name)(bench.ctx, part),
        getattr(ops, f"{name}_split")(bench.ctx, part, rest),
        ops.glu(bench.ctx, a, op),
        ops.glu(bench.ctx, a, op, True),
        ops.glu_split(bench.ctx, a, b, op),
    ]
    assert outs[0].ne == outs[1].ne == (17, 5, 2, 3) and outs[2].ne == a.ne and outs[0].type == type
    got = bench.compute(*(f32(bench, each) for each in outs))
    x, y, f = x.astype("d"), y.astype("d"), GATED[name]
    window, others = x.reshape(30, 34)[:, 2:8], y.reshape(30, 34)[:, :6]
    left, right = x[..., :17], x[..., 17:]
    exact = [f(left) * right, f(right) * left, f(x) * y, f(window[:, :3]) * window[:, 3:], f(window) * others]
    rtol, atol = bounds(name, type)
    for each, expected in zip(got, exact, strict=False):
        np.testing.assert_allclose(each, expected, rtol=2 * rtol, atol=atol * np.abs(y).max())
    for k in range(3):
        np.testing.assert_array_equal(got[5 + k], got[k])


@pytest.mark.parametrize("limit", [0.75, float("inf")])
def test_swiglu_with_a_limit(bench, limit):
    x, y = sample((3, 2, 7), Type.F32), sample((3, 2, 7), Type.F32)
    half = [sample((3, 2, 7), Type.F16) for _ in range(2)]
    outs = [
        ops.swiglu_oai(bench.ctx, bench.leaf(x), bench.leaf(y), 1.702, limit),
        ops.swiglu_clamp(bench.ctx, bench.leaf(x), bench.leaf(y), limit),
        ops.swiglu_clamp(bench.ctx, *(bench.leaf(each, Type.F16) for each in half), limit),
    ]
    oai, clamped, of_half = bench.compute(*outs)
    below, within = np.minimum(x.astype("d"), limit), y.astype("d").clip(-limit, limit)
    np.testing.assert_allclose(oai, below * sigmoid(1.702 * below) * (within + 1), rtol=RTOL[Type.F32], atol=1e-6)
    np.testing.assert_allclose(clamped, silu(below) * within, rtol=RTOL[Type.F32], atol=1e-6)
    below, within = np.minimum(half[0].astype("d"), limit), half[1].astype("d").clip(-limit, limit)
    np.testing.assert_allclose(of_half, silu(below) * within, rtol=RTOL[Type.F16], atol=1e-6)


def transposed(op):
    return lambda ctx, a, *more: op(ctx, ops.transpose(ctx, a), *more)


def uneven(op):
    return lambda ctx, a, *more: op(ctx, ops.permute(ctx, a, 0, 2, 1, 3), *more)


F, H, B, Q = Type.F32, Type.F16, Type.BF16, Type.Q8_0
EVEN = "the rows of a must lie at one distance"
ROWS = "the rows of a must be contiguous"
HALVES = [name + end for name in GATED for end in ("", "_swapped")]
SPLIT = [f"{name}_split" for name in GATED]
REFUSED = [
    *((getattr(ops, n), [(Q, (32,))], DTypeError, f"{n}: a must be F32, F16 or BF16") for n in [*UNARY, *HALVES]),
    *((transposed(getattr(ops, n)), [(H, (4, 1))], ShapeError, f"{n}: {ROWS}") for n in [*UNARY, *HALVES]),
    *((uneven(getattr(ops, n)), [(F, (4, 3, 2))], ShapeError, f"{n}: {EVEN}") for n in HALVES),
    *((getattr(ops, n), [(B, (5, 3))], ShapeError, f"{n}: ne0 is odd") for n in HALVES),
    *((getattr(ops, n), [(F, (4,)), (H, (4,))], DTypeError, f"{n}: types differ") for n in [*SPLIT, "silu_back"]),
    *((getattr(ops, n), [(F, (4, 2)), (F, (4,))], ShapeError, f"{n}: shapes differ") for n in [*SPLIT, "silu_back"]),
    *(
        (
            lambda ctx, a, b, n=n: getattr(ops, n)(ctx, a, ops.permute(ctx, b, 0, 2, 1, 3)),
            [(F, (4, 2, 3)), (F, (4, 3, 2))],
            ShapeError,
            f"{n}: the rows of b must be contiguous, and lie at one distance",
        )
        for n in [*SPLIT, "silu_back"]
    ),
    (
        lambda ctx, a: ops.silu_inplace(ctx, ops.view(ctx, a, (4, 3), (0,))),
        [(F, (12,))],
        ShapeError,
        "silu_inplace: elements of a share memory: it cannot be written in place",
    ),
    (
        lambda ctx, a: ops.leaky_relu(ctx, ops.view(ctx, a, (4, 3), (8,)), 0.1, inplace=True),
        [(F, (12,))],
        ShapeError,
        "leaky_relu: elements of a share memory: it cannot be written in place",
    ),
    (lambda ctx, a: ops.leaky_relu(ctx, a, 0.1), [(B, (4,))], DTypeError, "leaky_relu: a must be F32 or F16"),
    (uneven(lambda ctx, a: ops.leaky_relu(ctx, a, 0.1)), [(F, (4, 3, 2))], ShapeError, f"leaky_relu: {EVEN}"),
    (ops.silu_back, [(B, (4,)), (B, (4,))], DTypeError, "silu_back: a must be F32 or F16"),
    (lambda ctx, a: ops.glu(ctx, a, 7), [(F, (4,))], ShapeError, "glu: 7 is not a GluOp"),
    (lambda ctx, a, b: ops.glu_split(ctx, a, b, -1), [(F, (4,))] * 2, ShapeError, "glu_split: -1 is not a GluOp"),
    *(
        (
            lambda ctx, a, op=op: ops.glu(ctx, a, op),
            [(F, (4,))],
            ShapeError,
            "glu: this GluOp has parameters: use swiglu_oai or swiglu_clamp",
        )
        for op in (GluOp.SWIGLU_OAI, GluOp.SWIGLU_CLAMP)
    ),
    (lambda ctx, a, b: ops.swiglu_oai(ctx, a, b, 1, 7), [(H, (4,))] * 2, DTypeError, "swiglu_oai: a must be F32"),
    (
        lambda ctx, a, b: ops.swiglu_clamp(ctx, a, b, 1),
        [(B, (4,))] * 2,
        DTypeError,
        "swiglu_clamp: a must be F32 or F16",
    ),
    *(
        (
            lambda ctx, a, b, limit=limit: ops.swiglu_clamp(ctx, a, b, limit),
            [(F, (4,))] * 2,
            ShapeError,
            f"swiglu_clamp: limit {limit} is not a number from 0 up",
        )
        for limit in (-1.0, float("nan"))
    ),
]


@pytest.mark.parametrize("op, specs, error, message", REFUSED)
def test_refused(op, specs, error, message):
    ctx = Context(Context.size_for(16))
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        op(ctx, *(ctx.new_tensor(type, ne) for type, ne in specs))
