"""Ops element by element, against NumPy in float64."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml import Context, Type, UnaryOp, dequantize, ops, quantize

RNG = np.random.default_rng(11)
FLOATS = [Type.F32, Type.F16, Type.BF16]
# Kernels compute in F32 and round once more to the type: half a unit of 11 or 8 bits, plus a few of F32's 24.
RTOL = {Type.F32: 2e-6, Type.F16: 2**-11 + 2e-6, Type.BF16: 2**-8}
UNARY = {  # name: reference, and bound on what F32 adds to the error: exp(x) - 1 and log(1 + exp(x)) lose digits at 0
    "sqr": (np.square, 0),
    "sqrt": (np.sqrt, 0),
    "log": (np.log, 1e-7),
    "exp": (np.exp, 0),
    "expm1": (np.expm1, 2e-6),
    "softplus": (lambda x: np.logaddexp(0, x), 2e-7),
    "sin": (np.sin, 1e-6),
    "cos": (np.cos, 1e-6),
    "abs": (np.abs, 0),
    "sgn": (np.sign, 0),
    "neg": (np.negative, 0),
    "step": (lambda x: np.where(x > 0, 1.0, 0.0), 0),
    "floor": (np.floor, 0),
    "ceil": (np.ceil, 0),
    "round": (lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5), 0),
    "trunc": (np.trunc, 0),
}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def stored(x, type):
    """Return x as numbers of `type` hold it."""
    return dequantize(quantize(x, type), type, x.shape[-1]).reshape(x.shape).astype("d")


def sample(shape, type, scale=4.0):
    x = (RNG.standard_normal(shape) * scale).astype("f")
    x.flat[:: max(5, x.size // 4)] = np.resize([0.0, 0.5, -1.5, 25.0], x.flat[:: max(5, x.size // 4)].shape)
    return stored(x, type).astype("f")


def f32(bench, out):
    """Return what is computed for `out`, converted to F32 if it is not."""
    return out if out.type == Type.F32 else ops.cast(bench.ctx, out, Type.F32)


@pytest.mark.parametrize("type", FLOATS, ids=lambda type: type.name)
@pytest.mark.parametrize("name", UNARY)
def test_unary(bench, name, type):
    reference, atol = UNARY[name]
    atol += 2**-25 if type == Type.F16 else 0  # half a unit of its smallest numbers
    x = sample((3, 2, 7, 33), type)
    if name in ("sqrt", "log"):
        x = stored(np.abs(x) + 1, type).astype("f")
    if name in ("exp", "expm1"):
        x = x.clip(None, 10)  # F16 ends at 65504
    t, over = bench.leaf(x, type), bench.leaf(x, type)
    part = ops.view(bench.ctx, t, (31, 5, 2), t.nb[1:3], 2 * t.type.type_size)
    new, of_part = getattr(ops, name)(bench.ctx, t), getattr(ops, name)(bench.ctx, part)
    view = getattr(ops, f"{name}_inplace")(bench.ctx, over)
    assert new.ne == t.ne and new.type == view.type == type and of_part.is_contiguous
    which = [] if name.upper() not in UnaryOp.__members__ else [ops.unary(bench.ctx, t, UnaryOp[name.upper()])]
    if which:
        which.append(ops.unary_inplace(bench.ctx, bench.leaf(x, type), UnaryOp[name.upper()]))
    got = bench.compute(*(f32(bench, each) for each in (new, of_part, view, *which)))
    exact = reference(x.astype("d"))
    for each in (got[0], *got[2:]):
        np.testing.assert_allclose(each, exact, rtol=RTOL[type], atol=atol)
    np.testing.assert_allclose(got[1], exact[0, :2, :5, 2:], rtol=RTOL[type], atol=atol)
    if type == Type.F32:
        np.testing.assert_array_equal(over.to_numpy(), got[2])  # written where a was


@pytest.mark.parametrize("op", [op for op in UnaryOp if op != UnaryOp.XIELU])
def test_unary_takes_every_op(bench, op):
    x = sample((3, 5), Type.F32)
    a = bench.leaf(x)
    got, same = bench.compute(ops.unary(bench.ctx, a, op), getattr(ops, op.name.lower())(bench.ctx, a))
    np.testing.assert_array_equal(got, same)


TYPES = [(Type.F32, Type.F32), (Type.F16, Type.F16), (Type.F16, Type.F32), (Type.BF16, Type.BF16)]


@pytest.mark.parametrize("a_type, b_type", [*TYPES, (Type.BF16, Type.F32)])
@pytest.mark.parametrize("name", BINARY)
def test_binary(bench, name, a_type, b_type):
    x, y = sample((4, 3, 2, 10), a_type), stored(np.abs(sample((2, 3, 1, 5), b_type)) + 0.5, b_type).astype("f")
    a, over, b = bench.leaf(x, a_type), bench.leaf(x, a_type), bench.leaf(y, b_type)
    apart = ops.transpose(bench.ctx, bench.leaf(np.stack([y[0, 0, 0], -y[0, 0, 0]], 1), b_type))  # [5, 2]
    part = ops.view(bench.ctx, a, (5, 2, 3), a.nb[1:3])
    of_apart = getattr(ops, name)(bench.ctx, part, apart)
    new, view = getattr(ops, name)(bench.ctx, a, b), getattr(ops, f"{name}_inplace")(bench.ctx, over, b)
    assert new.ne == a.ne and new.type == view.type == a_type
    got = bench.compute(*(f32(bench, each) for each in (new, view, of_apart)))
    exact = BINARY[name](x.astype("d"), np.tile(y.astype("d"), (2, 1, 2, 2)))
    np.testing.assert_allclose(got[0], exact, rtol=RTOL[a_type], atol=1e-7)
    np.testing.assert_array_equal(got[1], got[0])
    of_part = BINARY[name](x[0, :, :, :5].astype("d"), [y[0, 0, 0], -y[0, 0, 0]])
    np.testing.assert_allclose(got[2], of_part, rtol=RTOL[a_type], atol=1e-7)


def test_binary_with_a_transposed_operand(calc):
    x, y = sample((4, 6), Type.F32), sample((6, 4), Type.F32)
    got = calc(lambda ctx, a, b: ops.sub(ctx, a, ops.transpose(ctx, b)), x, y)
    np.testing.assert_array_equal(got, x - y.T)


def test_mul_over_what_a_norm_is_computed_from(bench):
    """One row further: ggml would compute norm and product at once, and read rows that it has written."""
    data = RNG.standard_normal((9, 8)).astype("f")
    x = bench.leaf(data)
    norm = ops.rms_norm(bench.ctx, ops.view(bench.ctx, x, (8, 8)), 1e-5)
    (got,) = bench.compute(ops.mul_inplace(bench.ctx, ops.view(bench.ctx, x, (8, 8), (), 32), norm))
    expected = data[1:] * data[:-1] / np.sqrt(np.mean(data[:-1] ** 2, axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32 in another order


def test_inplace_with_itself(bench):
    x = sample((3, 5), Type.F32)
    a = bench.leaf(x)
    (got,) = bench.compute(ops.mul_inplace(bench.ctx, a, a))
    np.testing.assert_array_equal(got, x * x)


# What is left of a quantised sum is rounded to the type again: half a step of a block, for these about 0.4 % or 3 %.
@pytest.mark.parametrize("type, bound", [(Type.Q8_0, 0.02), (Type.Q4_0, 0.5), (Type.Q4_K, 0.5), (Type.MXFP4, 1.0)])
def test_add_to_quantised(bench, type, bound):
    x, y = RNG.standard_normal((2, 3, 256), dtype="f"), RNG.standard_normal((2, 3, 256), dtype="f")
    a, b = bench.leaf(x, type), bench.leaf(y)
    exact = stored(x, type) + y
    sums = [ops.add(bench.ctx, a, b), ops.add_inplace(bench.ctx, bench.leaf(x, type), b)]
    assert [each.type for each in sums] == [type, type]
    casts = [ops.add_cast(bench.ctx, a, b, each) for each in (Type.F32, Type.F16, type)]
    wide, half, again, *got = bench.compute(*(f32(bench, each) for each in (*casts, *sums)))
    np.testing.assert_allclose(wide, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(half, exact, rtol=2**-10, atol=1e-6)
    for each in got:
        np.testing.assert_array_equal(each, again)
        assert np.abs(each - exact).max() < bound


@pytest.mark.parametrize(
    "a_type, b_type, type",
    [
        *((a, b, a) for a, b in [*TYPES[1:], (Type.BF16, Type.F32)]),
        (Type.F16, Type.F32, Type.F32),
        (Type.BF16, Type.F32, Type.F32),
    ],
)
def test_add_cast(bench, a_type, b_type, type):
    x, y = sample((2, 3, 5), a_type), sample((3, 5), b_type)
    out = ops.add_cast(bench.ctx, bench.leaf(x, a_type), bench.leaf(y, b_type), type)
    assert out.type == type
    (got,) = bench.compute(f32(bench, out))
    np.testing.assert_allclose(got, x.astype("d") + y, rtol=RTOL[type], atol=1e-7)


@pytest.mark.parametrize("type", [Type.F32, Type.BF16], ids=lambda type: type.name)
def test_scale(bench, type):
    x = sample((3, 2, 5), type)
    leaves = [bench.leaf(x, type) for _ in range(4)]
    outs = [
        ops.scale(bench.ctx, leaves[0], 0.3),
        ops.scale_inplace(bench.ctx, leaves[1], 0.3),
        ops.scale_bias(bench.ctx, leaves[2], 0.3, -2),
        ops.scale_bias_inplace(bench.ctx, leaves[3], 0.3, -2),
    ]
    got = bench.compute(*(f32(bench, each) for each in outs))
    for each, bias in zip(got, (0, 0, -2, -2), strict=True):
        np.testing.assert_allclose(each, x.astype("d") * np.float32(0.3) + bias, rtol=RTOL[type], atol=1e-6)


@pytest.mark.parametrize("type", [Type.F32, Type.F16], ids=lambda type: type.name)
def test_clamp(bench, type):
    x = sample((3, 2, 7), type)
    outs = [op(bench.ctx, bench.leaf(x, type), -0.5, 2) for op in (ops.clamp, ops.clamp_inplace)]
    for each in bench.compute(*outs):
        np.testing.assert_array_equal(each, x.clip(-0.5, 2).astype(each.dtype))


def test_clamp_of_nan_and_crossed_limits(calc):
    x = np.array([np.nan, np.inf, -np.inf, 0], "f")
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.clamp(ctx, a, -1, 2), x), [2, 2, -1, 0])
    np.testing.assert_array_equal(calc(lambda ctx, a: ops.clamp(ctx, a, 2, -1), x), [2, 2, 2, 2])


@pytest.mark.parametrize("type, value", [(Type.F32, 0.3), (Type.F16, -2.5), (Type.F16, 1e30), (Type.F32, float("nan"))])
def test_fill(bench, type, value):
    x = sample((3, 7), type)
    outs = [op(bench.ctx, bench.leaf(x, type), value) for op in (ops.fill, ops.fill_inplace)]
    for each in bench.compute(*outs):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(each, np.full((3, 7), value, "f").astype(each.dtype))


@pytest.mark.parametrize("start, stop, step", [(0, 5, 1), (-1, 1, 0.25), (2, 2.5, 7), (0, 1, 0.1), (-3, 1000, 3)])
def test_arange(calc, start, stop, step):
    got = calc(lambda ctx: ops.arange(ctx, start, stop, step))
    np.testing.assert_allclose(got, np.arange(start, stop, step), rtol=1e-6, atol=1e-6)


def test_empty_operands(bench):
    a, b = bench.leaf(np.zeros((3, 0), "f")), bench.leaf(np.ones((2,), "f"))
    outs = [ops.exp(bench.ctx, a), ops.add(bench.ctx, a, a), ops.clamp(bench.ctx, a, 0), ops.neg(bench.ctx, b)]
    assert [each.shape for each in bench.compute(*outs)] == [(3, 0), (3, 0), (3, 0), (2,)]


def transposed(op):
    return lambda ctx, a, *more: op(ctx, ops.transpose(ctx, a), *more)


def shared(op):
    return lambda ctx, a, *more: op(ctx, ops.view(ctx, a, (2, 3), (4,)), *more)


F, H, B, Q = Type.F32, Type.F16, Type.BF16, Type.Q8_0
PAIR = "a must be F32, F16 or BF16, b F32 or of a's type"
ROWS = "the rows of a must be contiguous"
SHARED = "elements of a share memory: it cannot be written in place"
COUNT = "a kernel cannot count so many elements in a row, or so many rows"
QUANT = "to a quantised a, of a type that ggml can convert to, only F32 can be added"
CAST = "a must be quantised, F16 or BF16, and the new type a's, or F32 if b is F32"
REFUSED = [
    *((getattr(ops, n), [(Type.I32, (4,))], DTypeError, f"{n}: a must be F32, F16 or BF16") for n in UNARY),
    *(
        (getattr(ops, f"{n}_inplace"), [(Q, (32,))], DTypeError, f"{n}_inplace: a must be F32, F16 or BF16")
        for n in UNARY
    ),
    *((transposed(getattr(ops, n)), [(F, (4, 1))], ShapeError, f"{n}: {ROWS}") for n in UNARY),
    *((shared(getattr(ops, f"{n}_inplace")), [(F, (9,))], ShapeError, f"{n}_inplace: {SHARED}") for n in UNARY),
    (ops.sin, [(H, (1 << 31,))], ShapeError, f"sin: {COUNT}"),
    (ops.sin, [(H, (1, 1 << 16, 1 << 16))], ShapeError, f"sin: {COUNT}"),
    (ops.sub, [(F, (1 << 31,)), (F, (1,))], ShapeError, f"sub: {COUNT}"),
    *((getattr(ops, n), [(F, (4, 3)), (F, (3,))], ShapeError, f"{n}: b does not broadcast to a") for n in BINARY),
    *((getattr(ops, n), [(F, (4,)), (H, (4,))], DTypeError, f"{n}: {PAIR}") for n in BINARY),
    *((getattr(ops, n), [(Q, (32,)), (F, (32,))], DTypeError, f"{n}: {PAIR}") for n in ("sub", "mul", "div_inplace")),
    (transposed(ops.sub), [(F, (4, 3)), (F, (3, 4))], ShapeError, f"sub: {ROWS}"),
    (shared(ops.div_inplace), [(F, (9,)), (F, (2, 3))], ShapeError, f"div_inplace: {SHARED}"),
    (shared(ops.add_inplace), [(F, (9,)), (F, (2, 3))], ShapeError, f"add_inplace: {SHARED}"),
    (ops.add, [(Q, (32,)), (H, (32,))], DTypeError, f"add: {QUANT}"),
    (ops.add, [(Type.Q8_1, (32,)), (F, (32,))], DTypeError, f"add: {QUANT}"),
    (ops.add, [(Type.IQ2_XXS, (256,)), (F, (256,))], DTypeError, f"add: {QUANT}"),
    (ops.add, [(Q, (32, 2)), (F, (32,))], ShapeError, "add: a is quantised, and b of another shape"),
    (
        lambda ctx, a, b: ops.add(ctx, a, ops.transpose(ctx, b)),
        [(Q, (32, 2)), (F, (2, 32))],
        ShapeError,
        "add: the rows of a and b must be contiguous",
    ),
    (
        lambda ctx, a, b: ops.add_inplace(ctx, ops.permute(ctx, a, 0, 2, 1, 3), b),
        [(Q, (32, 2, 3)), (F, (32, 3, 2))],
        ShapeError,
        "add_inplace: a quantised a must not be permuted",
    ),
    (lambda ctx, a, b: ops.add_cast(ctx, a, b, F), [(F, (4,)), (F, (4,))], DTypeError, f"add_cast: {CAST}"),
    (lambda ctx, a, b: ops.add_cast(ctx, a, b, F), [(H, (4,)), (H, (4,))], DTypeError, f"add_cast: {CAST}"),
    (lambda ctx, a, b: ops.add_cast(ctx, a, b, B), [(H, (4,)), (F, (4,))], DTypeError, f"add_cast: {CAST}"),
    (
        lambda ctx, a, b: ops.add_cast(ctx, a, b, Type.IQ1_S),
        [(Q, (256,)), (F, (256,))],
        DTypeError,
        f"add_cast: {QUANT}",
    ),
    (lambda ctx, a, b: ops.add_cast(ctx, a, b, H), [(H, (4,)), (H, (2,))], ShapeError, "add_cast: ne0 differs"),
    (
        lambda ctx, a, b: ops.add_cast(ctx, a, b, Type.Q4_K),
        [(Q, (32,)), (F, (32,))],
        ShapeError,
        "add_cast: ne0 = 32 is not a multiple of Q4_K's block size",
    ),
    *(
        (lambda ctx, a, n=n: getattr(ops, n)(ctx, a, 2.0), [(H, (4,))], DTypeError, f"{n}: a must be F32 or BF16")
        for n in ("scale", "scale_inplace")
    ),
    *(
        (
            lambda ctx, a, n=n: getattr(ops, n)(ctx, ops.view(ctx, a, (2, 3), (16,)), 2.0, 1.0),
            [(F, (4, 3))],
            ShapeError,
            f"{n}: a must be contiguous",
        )
        for n in ("scale_bias", "scale_bias_inplace")
    ),
    *(
        (lambda ctx, a, n=n: getattr(ops, n)(ctx, a, 2.0), [(B, (4,))], DTypeError, f"{n}: a must be F32 or F16")
        for n in ("clamp", "clamp_inplace", "fill", "fill_inplace")
    ),
    *(
        (
            lambda ctx, a, n=n: getattr(ops, n)(ctx, ops.permute(ctx, a, 0, 2, 1, 3), 2.0),
            [(F, (4, 3, 2))],
            ShapeError,
            f"{n}: {why}",
        )
        for n, why in [("clamp", "the rows of a must lie at one distance"), ("fill", "a must be contiguous")]
    ),
    (lambda ctx, a: ops.unary(ctx, a, 22), [(F, (4,))], ShapeError, "unary: 22 is not a UnaryOp"),
    (lambda ctx, a: ops.unary(ctx, a, -1), [(F, (4,))], ShapeError, "unary: -1 is not a UnaryOp"),
    (
        lambda ctx, a: ops.unary_inplace(ctx, a, UnaryOp.XIELU),
        [(F, (4,))],
        ShapeError,
        "unary_inplace: UnaryOp.XIELU has parameters: use xielu",
    ),
    *(
        (
            lambda ctx, n=n: ops.arange(ctx, *n),
            [],
            ShapeError,
            f"arange: from {n[0]} to {n[1]} by {n[2]} does not go upwards in finite steps",
        )
        for n in [
            (0.0, 5.0, 0.0),
            (0.0, 5.0, -1.0),
            (5.0, 5.0, 1.0),
            (0.0, float("inf"), 1.0),
            (0.0, 1.0, float("nan")),
        ]
    ),
    (
        lambda ctx: ops.arange(ctx, 0, 2.0**100, 1),
        [],
        ShapeError,
        "arange: from 0.0 to 1.2676506002282294e+30 by 1.0 is too many elements",
    ),
]


@pytest.mark.parametrize("op, specs, error, message", REFUSED)
def test_refused(op, specs, error, message):
    ctx = Context(Context.size_for(16))
    with pytest.raises(error, match=rf"^{re.escape(message)}( \(.*\))?$"):
        op(ctx, *(ctx.new_tensor(type, ne) for type, ne in specs))
