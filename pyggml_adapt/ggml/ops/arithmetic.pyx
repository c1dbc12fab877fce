"""Ops element by element: sums, products, roots, rounding, limits.

Operands are F32, F16 or BF16 with contiguous rows, where nothing else is said, and results have a's type and shape:
each op raises DTypeError or ShapeError otherwise, and ShapeError if a kernel cannot count the elements.
An op with two operands broadcasts b, which is of a's type or F32 and may have any strides: each of b's dimensions must
divide a's.  The `_inplace` ops write over a, no two elements of which may share memory; what they compute is not
defined if b shares some of it, unless b is a.
"""

from libc.math cimport INFINITY, ceilf, isfinite

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport MAX_ELEMENTS, Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, binary_op, check_blocks, check_counts, check_even_floats, check_floats,
    check_inplace, elementwise, elementwise_inplace, has_rows, is_float, is_weight, is_writable, result, type_of,
)


cdef int check_pair(str op, Tensor a, Tensor b) except -1:
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    if not c.ggml_can_repeat(pb, pa):
        raise bad_shape(op, "b does not broadcast to a", ("a", a, "b", b))
    if pb.type != c.GGML_TYPE_F32 and pb.type != pa.type or not (is_float(pa) or pa.type == c.GGML_TYPE_BF16):
        raise bad_type(op, "a must be F32, F16 or BF16, b F32 or of a's type", ("a", a, "b", b))
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", ("a", a, "b", b))
    return check_counts(op, a)


cdef int check_quantised(str op, Tensor a, Tensor b, c.ggml_type type) except -1:
    """Check that rows of quantised a and F32 b can be added, and converted to type."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    if not is_weight(pa) or not is_writable(type) or pb.type != c.GGML_TYPE_F32:
        raise bad_type(op, "to a quantised a, of a type that ggml can convert to, only F32 can be added",
                       ("a", a, "b", b))
    if not c.ggml_are_same_shape(pa, pb):
        raise bad_shape(op, "a is quantised, and b of another shape", ("a", a, "b", b))
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape(op, "the rows of a and b must be contiguous", ("a", a, "b", b))
    check_blocks(op, type, pa.ne[0], a)
    return check_counts(op, a)


cdef int check_sum(str op, Tensor a, Tensor b) except -1:
    if c.ggml_is_quantized(a.ptr().type):
        return check_quantised(op, a, b, a.ptr().type)
    return check_pair(op, a, b)


cdef Tensor binary(str op, binary_op call, Context ctx, Tensor a, Tensor b):
    check_pair(op, a, b)
    return result(ctx, call(ctx.room(1), a.ptr(), b.ptr()), a, b)


cdef Tensor binary_inplace(str op, binary_op call, Context ctx, Tensor a, Tensor b):
    check_inplace(op, a)
    return binary(op, call, ctx, a, b)


def add(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a + b, shape and type of a; b is broadcast.

    a may be quantised: b is then F32 of its shape, with contiguous rows.
    Raises: DTypeError if ggml cannot convert to a's type.
    Wraps: ggml_add.
    """
    check_sum("add", a, b)
    return result(ctx, c.ggml_add(ctx.room(1), a.ptr(), b.ptr()), a, b)


def add_inplace(Context ctx not None, Tensor a not None, Tensor b not None):
    """Write a + b over a, and return a view of it.

    Raises: ShapeError if a is quantised and permuted, and as add.
    Wraps: ggml_add_inplace.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_inplace("add_inplace", a)
    check_sum("add_inplace", a, b)
    if c.ggml_is_quantized(pa.type) and not pa.nb[0] <= pa.nb[1] <= pa.nb[2] <= pa.nb[3]:
        raise bad_shape("add_inplace", "a quantised a must not be permuted", ("a", a, "b", b))
    return result(ctx, c.ggml_add_inplace(ctx.room(1), pa, b.ptr()), a, b)


def add_cast(Context ctx not None, Tensor a not None, Tensor b not None, type):
    """Return a + b as `type`, shape of a.

    a: F16 or BF16, with `type` its own, or F32 if b is F32; b is broadcast along ne1 to ne3.  Or a: quantised, of any
    type; b: F32 of a's shape; `type`: any that ggml can convert to.
    Raises: ShapeError if ne0 differs or is not a multiple of the block size of `type`.
    Wraps: ggml_add_cast.
    """
    cdef c.ggml_type t = type_of(type)
    cdef c.ggml_tensor * pa = a.ptr()
    if c.ggml_is_quantized(pa.type):
        check_quantised("add_cast", a, b, t)
    else:
        check_pair("add_cast", a, b)
        if pa.type == c.GGML_TYPE_F32 or t != pa.type and (t != c.GGML_TYPE_F32 or b.ptr().type != t):
            raise bad_type("add_cast", "a must be quantised, F16 or BF16, and the new type a's, or F32 if b is F32",
                           ("a", a, "b", b))
        if pa.ne[0] != b.ptr().ne[0]:
            raise bad_shape("add_cast", "ne0 differs", ("a", a, "b", b))
    return result(ctx, c.ggml_add_cast(ctx.room(1), pa, b.ptr(), t), a, b)


def sub(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a - b element by element, shape and type of a; b is broadcast.  Wraps: ggml_sub."""
    return binary("sub", c.ggml_sub, ctx, a, b)


def sub_inplace(Context ctx not None, Tensor a not None, Tensor b not None):
    """Write a - b over a, and return a view of it.  Wraps: ggml_sub_inplace."""
    return binary_inplace("sub_inplace", c.ggml_sub_inplace, ctx, a, b)


def mul(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a * b element by element, shape and type of a; b is broadcast.  Wraps: ggml_mul."""
    return binary("mul", c.ggml_mul, ctx, a, b)


def mul_inplace(Context ctx not None, Tensor a not None, Tensor b not None):
    """Write a * b over a, and return a view of it.  Wraps: ggml_mul_inplace."""
    return binary_inplace("mul_inplace", c.ggml_mul_inplace, ctx, a, b)


def div(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a / b element by element, shape and type of a; b is broadcast.  Wraps: ggml_div."""
    return binary("div", c.ggml_div, ctx, a, b)


def div_inplace(Context ctx not None, Tensor a not None, Tensor b not None):
    """Write a / b over a, and return a view of it.  Wraps: ggml_div_inplace."""
    return binary_inplace("div_inplace", c.ggml_div_inplace, ctx, a, b)


cdef int check_scale(str op, Tensor a) except -1:
    check_even_floats(op, a, False, True)
    cdef c.ggml_tensor * pa = a.ptr()
    if not c.ggml_is_contiguous(pa) or pa.nb[2] != pa.nb[1] * pa.ne[1] or pa.nb[3] != pa.nb[2] * pa.ne[2]:
        raise bad_shape(op, "a must be contiguous", ("a", a))
    return 0


def scale(Context ctx not None, Tensor a not None, float s):
    """Return a times the number s.  a: F32 or BF16, contiguous.  Wraps: ggml_scale."""
    check_scale("scale", a)
    return result(ctx, c.ggml_scale(ctx.room(1), a.ptr(), s), a)


def scale_inplace(Context ctx not None, Tensor a not None, float s):
    """Write a times s over a, and return a view of it.  a: as of scale.  Wraps: ggml_scale_inplace."""
    check_scale("scale_inplace", a)
    return result(ctx, c.ggml_scale_inplace(ctx.room(1), a.ptr(), s), a)


def scale_bias(Context ctx not None, Tensor a not None, float s, float b):
    """Return s times a, plus the number b.  a: F32 or BF16, contiguous.  Wraps: ggml_scale_bias."""
    check_scale("scale_bias", a)
    return result(ctx, c.ggml_scale_bias(ctx.room(1), a.ptr(), s, b), a)


def scale_bias_inplace(Context ctx not None, Tensor a not None, float s, float b):
    """Write s a + b over a, and return a view of it.  a: as of scale.  Wraps: ggml_scale_bias_inplace."""
    check_scale("scale_bias_inplace", a)
    return result(ctx, c.ggml_scale_bias_inplace(ctx.room(1), a.ptr(), s, b), a)


def clamp(Context ctx not None, Tensor a not None, float min, float max=INFINITY):
    """Return a with its elements limited to [min, max]; NaN becomes max, and `min` wins if it is above `max`.

    a: F32 or F16, its rows at one distance.
    Wraps: ggml_clamp.
    """
    check_even_floats("clamp", a, True, False)
    return result(ctx, c.ggml_clamp(ctx.room(1), a.ptr(), min, max), a)


def clamp_inplace(Context ctx not None, Tensor a not None, float min, float max=INFINITY):
    """Write clamp(a, min, max) over a, and return a view of it.  a: as of clamp.  Wraps: ggml_clamp_inplace."""
    check_inplace("clamp_inplace", a)
    check_even_floats("clamp_inplace", a, True, False)
    return result(ctx, c.ggml_clamp_inplace(ctx.room(1), a.ptr(), min, max), a)


cdef Tensor filled(str op, Context ctx, Tensor a, float value, bint inplace):
    check_floats(op, a, True, False)
    cdef c.ggml_tensor * pa = a.ptr()
    if not c.ggml_is_contiguous(pa):
        raise bad_shape(op, "a must be contiguous", ("a", a))
    return result(ctx, (c.ggml_fill_inplace if inplace else c.ggml_fill)(ctx.room(1), pa, value), a)


def fill(Context ctx not None, Tensor a not None, float c_):
    """Return a tensor of a's shape and type, each element of which is c_.  a: F32 or F16, contiguous.

    Wraps: ggml_fill.
    """
    return filled("fill", ctx, a, c_, False)


def fill_inplace(Context ctx not None, Tensor a not None, float c_):
    """Write c_ over each element of a, and return a view of it.  a: as of fill.  Wraps: ggml_fill_inplace."""
    return filled("fill_inplace", ctx, a, c_, True)


def arange(Context ctx not None, float start, float stop, float step):
    """Return start, start + step, ... as long as it is below stop, F32 [ceil((stop - start) / step)].

    Raises: ShapeError unless these are finite numbers, start < stop and step > 0.
    Wraps: ggml_arange.
    """
    if not (isfinite(start) and isfinite(stop) and isfinite(step) and start < stop and step > 0):
        raise bad_value("arange", f"from {start} to {stop} by {step} does not go upwards in finite steps")
    if not ceilf((stop - start) / step) <= <float> MAX_ELEMENTS:
        raise bad_value("arange", f"from {start} to {stop} by {step} is too many elements")
    return ctx.wrap(c.ggml_arange(ctx.room(1), start, stop, step))


cdef int check_unary(str op, Tensor a, int which) except -1:
    check_floats(op, a, True, True)
    if not 0 <= which <= c.GGML_UNARY_OP_TRUNC:
        raise bad_value(op, f"{which} is not a UnaryOp")
    if which == c.GGML_UNARY_OP_XIELU:
        raise bad_value(op, "UnaryOp.XIELU has parameters: use xielu")
    return 0


def unary(Context ctx not None, Tensor a not None, int op):
    """Return a with the function of that UnaryOp applied to each element.

    Raises: ShapeError if there is no such, and for XIELU, which ops.xielu has parameters for.
    Wraps: ggml_unary.
    """
    check_unary("unary", a, op)
    return result(ctx, c.ggml_unary(ctx.room(1), a.ptr(), <c.ggml_unary_op> op), a)


def unary_inplace(Context ctx not None, Tensor a not None, int op):
    """Write unary(a, op) over a, and return a view of it.  Wraps: ggml_unary_inplace."""
    check_inplace("unary_inplace", a)
    check_unary("unary_inplace", a, op)
    return result(ctx, c.ggml_unary_inplace(ctx.room(1), a.ptr(), <c.ggml_unary_op> op), a)


def sqr(Context ctx not None, Tensor a not None):
    """Return a squared.  Wraps: ggml_sqr."""
    return elementwise("sqr", c.ggml_sqr, ctx, a)


def sqr_inplace(Context ctx not None, Tensor a not None):
    """Write sqr(a) over a, and return a view of it.  Wraps: ggml_sqr_inplace."""
    return elementwise_inplace("sqr_inplace", c.ggml_sqr_inplace, ctx, a)


def sqrt(Context ctx not None, Tensor a not None):
    """Return the square root of a.  Wraps: ggml_sqrt."""
    return elementwise("sqrt", c.ggml_sqrt, ctx, a)


def sqrt_inplace(Context ctx not None, Tensor a not None):
    """Write sqrt(a) over a, and return a view of it.  Wraps: ggml_sqrt_inplace."""
    return elementwise_inplace("sqrt_inplace", c.ggml_sqrt_inplace, ctx, a)


def log(Context ctx not None, Tensor a not None):
    """Return the natural logarithm of a.  Wraps: ggml_log."""
    return elementwise("log", c.ggml_log, ctx, a)


def log_inplace(Context ctx not None, Tensor a not None):
    """Write log(a) over a, and return a view of it.  Wraps: ggml_log_inplace."""
    return elementwise_inplace("log_inplace", c.ggml_log_inplace, ctx, a)


def exp(Context ctx not None, Tensor a not None):
    """Return e to the power of a.  Wraps: ggml_exp."""
    return elementwise("exp", c.ggml_exp, ctx, a)


def exp_inplace(Context ctx not None, Tensor a not None):
    """Write exp(a) over a, and return a view of it.  Wraps: ggml_exp_inplace."""
    return elementwise_inplace("exp_inplace", c.ggml_exp_inplace, ctx, a)


def expm1(Context ctx not None, Tensor a not None):
    """Return exp(a) - 1, as exact as exp(a) is.  Wraps: ggml_expm1."""
    return elementwise("expm1", c.ggml_expm1, ctx, a)


def expm1_inplace(Context ctx not None, Tensor a not None):
    """Write expm1(a) over a, and return a view of it.  Wraps: ggml_expm1_inplace."""
    return elementwise_inplace("expm1_inplace", c.ggml_expm1_inplace, ctx, a)


def softplus(Context ctx not None, Tensor a not None):
    """Return log(1 + exp(a)), and a itself above 20.  Wraps: ggml_softplus."""
    return elementwise("softplus", c.ggml_softplus, ctx, a)


def softplus_inplace(Context ctx not None, Tensor a not None):
    """Write softplus(a) over a, and return a view of it.  Wraps: ggml_softplus_inplace."""
    return elementwise_inplace("softplus_inplace", c.ggml_softplus_inplace, ctx, a)


def sin(Context ctx not None, Tensor a not None):
    """Return the sine of a.  Wraps: ggml_sin."""
    return elementwise("sin", c.ggml_sin, ctx, a)


def sin_inplace(Context ctx not None, Tensor a not None):
    """Write sin(a) over a, and return a view of it.  Wraps: ggml_sin_inplace."""
    return elementwise_inplace("sin_inplace", c.ggml_sin_inplace, ctx, a)


def cos(Context ctx not None, Tensor a not None):
    """Return the cosine of a.  Wraps: ggml_cos."""
    return elementwise("cos", c.ggml_cos, ctx, a)


def cos_inplace(Context ctx not None, Tensor a not None):
    """Write cos(a) over a, and return a view of it.  Wraps: ggml_cos_inplace."""
    return elementwise_inplace("cos_inplace", c.ggml_cos_inplace, ctx, a)


def abs(Context ctx not None, Tensor a not None):
    """Return the absolute value of a.  Wraps: ggml_abs."""
    return elementwise("abs", c.ggml_abs, ctx, a)


def abs_inplace(Context ctx not None, Tensor a not None):
    """Write abs(a) over a, and return a view of it.  Wraps: ggml_abs_inplace."""
    return elementwise_inplace("abs_inplace", c.ggml_abs_inplace, ctx, a)


def sgn(Context ctx not None, Tensor a not None):
    """Return 1 where a is positive, -1 where it is negative, else 0.  Wraps: ggml_sgn."""
    return elementwise("sgn", c.ggml_sgn, ctx, a)


def sgn_inplace(Context ctx not None, Tensor a not None):
    """Write sgn(a) over a, and return a view of it.  Wraps: ggml_sgn_inplace."""
    return elementwise_inplace("sgn_inplace", c.ggml_sgn_inplace, ctx, a)


def neg(Context ctx not None, Tensor a not None):
    """Return -a.  Wraps: ggml_neg."""
    return elementwise("neg", c.ggml_neg, ctx, a)


def neg_inplace(Context ctx not None, Tensor a not None):
    """Write neg(a) over a, and return a view of it.  Wraps: ggml_neg_inplace."""
    return elementwise_inplace("neg_inplace", c.ggml_neg_inplace, ctx, a)


def step(Context ctx not None, Tensor a not None):
    """Return 1 where a is positive, else 0.  Wraps: ggml_step."""
    return elementwise("step", c.ggml_step, ctx, a)


def step_inplace(Context ctx not None, Tensor a not None):
    """Write step(a) over a, and return a view of it.  Wraps: ggml_step_inplace."""
    return elementwise_inplace("step_inplace", c.ggml_step_inplace, ctx, a)


def floor(Context ctx not None, Tensor a not None):
    """Return a rounded down.  Wraps: ggml_floor."""
    return elementwise("floor", c.ggml_floor, ctx, a)


def floor_inplace(Context ctx not None, Tensor a not None):
    """Write floor(a) over a, and return a view of it.  Wraps: ggml_floor_inplace."""
    return elementwise_inplace("floor_inplace", c.ggml_floor_inplace, ctx, a)


def ceil(Context ctx not None, Tensor a not None):
    """Return a rounded up.  Wraps: ggml_ceil."""
    return elementwise("ceil", c.ggml_ceil, ctx, a)


def ceil_inplace(Context ctx not None, Tensor a not None):
    """Write ceil(a) over a, and return a view of it.  Wraps: ggml_ceil_inplace."""
    return elementwise_inplace("ceil_inplace", c.ggml_ceil_inplace, ctx, a)


def round(Context ctx not None, Tensor a not None):
    """Return a rounded to the nearest integer, halves away from 0.  Wraps: ggml_round."""
    return elementwise("round", c.ggml_round, ctx, a)


def round_inplace(Context ctx not None, Tensor a not None):
    """Write round(a) over a, and return a view of it.  Wraps: ggml_round_inplace."""
    return elementwise_inplace("round_inplace", c.ggml_round_inplace, ctx, a)


def trunc(Context ctx not None, Tensor a not None):
    """Return a rounded towards 0.  Wraps: ggml_trunc."""
    return elementwise("trunc", c.ggml_trunc, ctx, a)


def trunc_inplace(Context ctx not None, Tensor a not None):
    """Write trunc(a) over a, and return a view of it.  Wraps: ggml_trunc_inplace."""
    return elementwise_inplace("trunc_inplace", c.ggml_trunc_inplace, ctx, a)
