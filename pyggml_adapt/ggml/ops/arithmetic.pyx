"""Ops element by element and along rows: sums, products, limits."""

from libc.math cimport INFINITY

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, binary_op, check_even_rows, check_rows, has_rows, is_float, result, unary,
)


cdef Tensor binary(str op, binary_op call, Context ctx, Tensor a, Tensor b):
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    if not c.ggml_can_repeat(pb, pa):
        raise bad_shape(op, "b does not broadcast to a", [("a", a), ("b", b)])
    if pb.type != c.GGML_TYPE_F32 and pb.type != pa.type or not (is_float(pa) or pa.type == c.GGML_TYPE_BF16):
        raise bad_type(op, "a must be F32, F16 or BF16, b F32 or of a's type", [("a", a), ("b", b)])
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", [("a", a), ("b", b)])
    return result(ctx, call(ctx.room(1), pa, pb), a, b)


def add(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a + b, shape of a; b is broadcast.

    Raises: ShapeError if b's dimensions do not divide a's.
    Wraps: ggml_add.
    """
    return binary("add", c.ggml_add, ctx, a, b)


def mul(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a * b element by element, shape of a; b is broadcast.

    Raises: ShapeError if b's dimensions do not divide a's.
    Wraps: ggml_mul.
    """
    return binary("mul", c.ggml_mul, ctx, a, b)


def div(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a / b element by element, shape of a; b is broadcast.

    Raises: ShapeError if b's dimensions do not divide a's.
    Wraps: ggml_div.
    """
    return binary("div", c.ggml_div, ctx, a, b)


def scale(Context ctx not None, Tensor a not None, float s):
    """Return a times the number s, shape of a.  a: F32, contiguous.  Wraps: ggml_scale."""
    check_even_rows("scale", a)
    cdef c.ggml_tensor * pa = a.ptr()
    if not c.ggml_is_contiguous(pa) or pa.nb[2] != pa.nb[1] * pa.ne[1] or pa.nb[3] != pa.nb[2] * pa.ne[2]:
        raise bad_shape("scale", "a must be contiguous", [("a", a)])
    return result(ctx, c.ggml_scale(ctx.room(1), a.ptr(), s), a)


def clamp(Context ctx not None, Tensor a not None, float min, float max=INFINITY):
    """Return a with its elements limited to [min, max].  Wraps: ggml_clamp."""
    check_even_rows("clamp", a)
    return result(ctx, c.ggml_clamp(ctx.room(1), a.ptr(), min, max), a)


def sqr(Context ctx not None, Tensor a not None):
    """Return a squared element by element, shape of a.  Wraps: ggml_sqr."""
    return unary("sqr", c.ggml_sqr, ctx, a)


def sum_rows(Context ctx not None, Tensor a not None):
    """Return the sums along ne0, F32 [1, a.ne1, a.ne2, a.ne3].  Wraps: ggml_sum_rows."""
    check_rows("sum_rows", a)
    return result(ctx, c.ggml_sum_rows(ctx.room(1), a.ptr()), a)
