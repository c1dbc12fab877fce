"""Activations, gated and not, and norms: ops on rows of F32."""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport bad_shape, bad_value, binary_op, check_even_rows, check_rows, result, unary


def silu(Context ctx not None, Tensor a not None):
    """Return a * sigmoid(a), shape of a.  Wraps: ggml_silu."""
    return unary("silu", c.ggml_silu, ctx, a)


def gelu(Context ctx not None, Tensor a not None):
    """Return a times the normal distribution up to a, by its tanh approximation, shape of a.  Wraps: ggml_gelu."""
    return unary("gelu", c.ggml_gelu, ctx, a)


def relu(Context ctx not None, Tensor a not None):
    """Return a with its negative elements replaced by 0, shape of a.  Wraps: ggml_relu."""
    return unary("relu", c.ggml_relu, ctx, a)


def sigmoid(Context ctx not None, Tensor a not None):
    """Return 1 / (1 + exp(-a)), shape of a.  Wraps: ggml_sigmoid."""
    return unary("sigmoid", c.ggml_sigmoid, ctx, a)


def tanh(Context ctx not None, Tensor a not None):
    """Return the hyperbolic tangent of a, shape of a.  Wraps: ggml_tanh."""
    return unary("tanh", c.ggml_tanh, ctx, a)


def xielu(Context ctx not None, Tensor a not None, float alpha_n, float alpha_p, float beta, float eps):
    """Return xIELU of a: softplus(alpha_p) a^2 + beta a where a > 0, and below, with alpha = beta + softplus(alpha_n),
    alpha (exp(min(a, eps)) - 1 - a) + beta a; shape of a.

    Wraps: ggml_xielu.
    """
    check_even_rows("xielu", a)
    return result(ctx, c.ggml_xielu(ctx.room(1), a.ptr(), alpha_n, alpha_p, beta, eps), a)


def swiglu(Context ctx not None, Tensor a not None):
    """Return silu(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].

    Raises: ShapeError unless ne0 is even and rows are contiguous.
    Wraps: ggml_swiglu.
    """
    check_even_rows("swiglu", a)
    if a.ptr().ne[0] % 2:
        raise bad_shape("swiglu", "ne0 is odd", [("a", a)])
    return result(ctx, c.ggml_swiglu(ctx.room(1), a.ptr()), a)


cdef int check_split(str op, Tensor a, Tensor b) except -1:
    """Check that a and b have one shape, and rows of F32 as the gated activations need."""
    check_even_rows(op, a)
    check_even_rows(op, b)
    if not c.ggml_are_same_shape(a.ptr(), b.ptr()):
        raise bad_shape(op, "shapes differ", [("a", a), ("b", b)])
    return 0


cdef Tensor glu_split(str op, binary_op call, Context ctx, Tensor a, Tensor b):
    check_split(op, a, b)
    return result(ctx, call(ctx.room(1), a.ptr(), b.ptr()), a, b)


def swiglu_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return silu(a) * b, shape of a.

    Raises: ShapeError unless a and b have one shape and contiguous rows.
    Wraps: ggml_swiglu_split.
    """
    return glu_split("swiglu_split", c.ggml_swiglu_split, ctx, a, b)


def geglu_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return gelu(a) * b, shape of a.

    Raises: ShapeError unless a and b have one shape and contiguous rows.
    Wraps: ggml_geglu_split.
    """
    return glu_split("geglu_split", c.ggml_geglu_split, ctx, a, b)


def swiglu_oai(Context ctx not None, Tensor a not None, Tensor b not None, float alpha, float limit):
    """Return x * sigmoid(alpha * x) * (y + 1), x being a up to limit and y b from -limit to limit; shape of a.

    Raises: ShapeError unless a and b have one shape and contiguous rows, and limit is a number from 0 up.
    Wraps: ggml_swiglu_oai.
    """
    check_split("swiglu_oai", a, b)
    if not limit >= 0:
        raise bad_value("swiglu_oai", f"limit {limit} is not a number from 0 up")
    return result(ctx, c.ggml_swiglu_oai(ctx.room(1), a.ptr(), b.ptr(), alpha, limit), a, b)


def norm(Context ctx not None, Tensor a not None, float eps):
    """Return each row of a less its mean, divided by its standard deviation (eps added under the root).

    Wraps: ggml_norm.
    """
    check_rows("norm", a)
    if not eps >= 0:
        raise bad_value("norm", f"eps {eps} is negative")
    return result(ctx, c.ggml_norm(ctx.room(1), a.ptr(), eps), a)


def rms_norm(Context ctx not None, Tensor a not None, float eps):
    """Return each row of a divided by its root mean square (eps added under the root).  Wraps: ggml_rms_norm."""
    check_rows("rms_norm", a)
    if not eps >= 0:
        raise bad_value("rms_norm", f"eps {eps} is negative")
    return result(ctx, c.ggml_rms_norm(ctx.room(1), a.ptr(), eps), a)
