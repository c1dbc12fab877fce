"""Activations, gated and not.

Operands are F32, F16 or BF16 with contiguous rows, where nothing else is said, and results have a's type and, if not
gated, its shape: each op raises DTypeError or ShapeError otherwise, and ShapeError if a kernel cannot count the
elements.  The gated ones need rows at one distance, an even ne0 if they take halves of them, and two operands of one
type and shape.  The `_inplace` ops write over a, no two elements of which may share memory.
"""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, binary_op, check_even_floats, check_inplace, elementwise, elementwise_inplace,
    has_even_rows, has_rows, result, unary_op,
)


def elu(Context ctx not None, Tensor a not None):
    """Return a where it is positive, else exp(a) - 1.  Wraps: ggml_elu."""
    return elementwise("elu", c.ggml_elu, ctx, a)


def elu_inplace(Context ctx not None, Tensor a not None):
    """Write elu(a) over a, and return a view of it.  Wraps: ggml_elu_inplace."""
    return elementwise_inplace("elu_inplace", c.ggml_elu_inplace, ctx, a)


def relu(Context ctx not None, Tensor a not None):
    """Return a with its negative elements replaced by 0.  Wraps: ggml_relu."""
    return elementwise("relu", c.ggml_relu, ctx, a)


def relu_inplace(Context ctx not None, Tensor a not None):
    """Write relu(a) over a, and return a view of it.  Wraps: ggml_relu_inplace."""
    return elementwise_inplace("relu_inplace", c.ggml_relu_inplace, ctx, a)


def tanh(Context ctx not None, Tensor a not None):
    """Return the hyperbolic tangent of a.  Wraps: ggml_tanh."""
    return elementwise("tanh", c.ggml_tanh, ctx, a)


def tanh_inplace(Context ctx not None, Tensor a not None):
    """Write tanh(a) over a, and return a view of it.  Wraps: ggml_tanh_inplace."""
    return elementwise_inplace("tanh_inplace", c.ggml_tanh_inplace, ctx, a)


def sigmoid(Context ctx not None, Tensor a not None):
    """Return 1 / (1 + exp(-a)).  Wraps: ggml_sigmoid."""
    return elementwise("sigmoid", c.ggml_sigmoid, ctx, a)


def sigmoid_inplace(Context ctx not None, Tensor a not None):
    """Write sigmoid(a) over a, and return a view of it.  Wraps: ggml_sigmoid_inplace."""
    return elementwise_inplace("sigmoid_inplace", c.ggml_sigmoid_inplace, ctx, a)


def gelu(Context ctx not None, Tensor a not None):
    """Return a times the normal distribution up to a, by its tanh approximation (F32: of a rounded to F16).

    Wraps: ggml_gelu.
    """
    return elementwise("gelu", c.ggml_gelu, ctx, a)


def gelu_inplace(Context ctx not None, Tensor a not None):
    """Write gelu(a) over a, and return a view of it.  Wraps: ggml_gelu_inplace."""
    return elementwise_inplace("gelu_inplace", c.ggml_gelu_inplace, ctx, a)


def gelu_erf(Context ctx not None, Tensor a not None):
    """Return a times the normal distribution up to a.  Wraps: ggml_gelu_erf."""
    return elementwise("gelu_erf", c.ggml_gelu_erf, ctx, a)


def gelu_erf_inplace(Context ctx not None, Tensor a not None):
    """Write gelu_erf(a) over a, and return a view of it.  Wraps: ggml_gelu_erf_inplace."""
    return elementwise_inplace("gelu_erf_inplace", c.ggml_gelu_erf_inplace, ctx, a)


def gelu_quick(Context ctx not None, Tensor a not None):
    """Return a * sigmoid(1.702 a) (F32: of a rounded to F16).  Wraps: ggml_gelu_quick."""
    return elementwise("gelu_quick", c.ggml_gelu_quick, ctx, a)


def gelu_quick_inplace(Context ctx not None, Tensor a not None):
    """Write gelu_quick(a) over a, and return a view of it.  Wraps: ggml_gelu_quick_inplace."""
    return elementwise_inplace("gelu_quick_inplace", c.ggml_gelu_quick_inplace, ctx, a)


def silu(Context ctx not None, Tensor a not None):
    """Return a * sigmoid(a).  Wraps: ggml_silu."""
    return elementwise("silu", c.ggml_silu, ctx, a)


def silu_inplace(Context ctx not None, Tensor a not None):
    """Write silu(a) over a, and return a view of it.  Wraps: ggml_silu_inplace."""
    return elementwise_inplace("silu_inplace", c.ggml_silu_inplace, ctx, a)


def hardswish(Context ctx not None, Tensor a not None):
    """Return a * min(max(a + 3, 0), 6) / 6.  Wraps: ggml_hardswish."""
    return elementwise("hardswish", c.ggml_hardswish, ctx, a)


def hardsigmoid(Context ctx not None, Tensor a not None):
    """Return min(max(a + 3, 0), 6) / 6.  Wraps: ggml_hardsigmoid."""
    return elementwise("hardsigmoid", c.ggml_hardsigmoid, ctx, a)


def leaky_relu(Context ctx not None, Tensor a not None, float negative_slope, bint inplace=False):
    """Return a with its negative elements multiplied by negative_slope; written over a if inplace, and a view of it.

    a: F32 or F16, its rows at one distance.
    Wraps: ggml_leaky_relu.
    """
    if inplace:
        check_inplace("leaky_relu", a)
    check_even_floats("leaky_relu", a, True, False)
    return result(ctx, c.ggml_leaky_relu(ctx.room(1), a.ptr(), negative_slope, inplace), a)


def xielu(Context ctx not None, Tensor a not None, float alpha_n, float alpha_p, float beta, float eps):
    """Return xIELU of a: softplus(alpha_p) a^2 + beta a where a > 0, and below, with alpha = beta + softplus(alpha_n),
    alpha (exp(min(a, eps)) - 1 - a) + beta a.

    Rows must lie at one distance.
    Wraps: ggml_xielu.
    """
    check_even_floats("xielu", a, True, True)
    return result(ctx, c.ggml_xielu(ctx.room(1), a.ptr(), alpha_n, alpha_p, beta, eps), a)


cdef int check_split(str op, Tensor a, Tensor b, bint f16, bint bf16) except -1:
    """Check that a and b have one type and one shape, and rows as kernels need them."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    check_even_floats(op, a, f16, bf16)
    if pa.type != pb.type:
        raise bad_type(op, "types differ", ("a", a, "b", b))
    if not c.ggml_are_same_shape(pa, pb):
        raise bad_shape(op, "shapes differ", ("a", a, "b", b))
    if not has_rows(pb) or not has_even_rows(pb):
        raise bad_shape(op, "the rows of b must be contiguous, and lie at one distance", ("a", a, "b", b))
    return 0


def silu_back(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return the gradient of b, given that of silu(b), which is a; shape of both.

    a, b: F32 or F16, of one type and shape, their rows at one distance.
    Wraps: ggml_silu_back.
    """
    check_split("silu_back", a, b, True, False)
    return result(ctx, c.ggml_silu_back(ctx.room(1), a.ptr(), b.ptr()), a, b)


cdef int check_halves(str op, Tensor a) except -1:
    check_even_floats(op, a, True, True)
    if a.ptr().ne[0] % 2:
        raise bad_shape(op, "ne0 is odd", ("a", a))
    return 0


cdef Tensor halves(str op, unary_op call, Context ctx, Tensor a):
    check_halves(op, a)
    return result(ctx, call(ctx.room(1), a.ptr()), a)


cdef Tensor split(str op, binary_op call, Context ctx, Tensor a, Tensor b):
    check_split(op, a, b, True, True)
    return result(ctx, call(ctx.room(1), a.ptr(), b.ptr()), a, b)


cdef int check_glu(str op, int which) except -1:
    """Check that there is such a GluOp, and that it does without the numbers that ggml_glu cannot be told."""
    if not 0 <= which <= c.GGML_GLU_OP_SWIGLU_CLAMP:
        raise bad_value(op, f"{which} is not a GluOp")
    if which == c.GGML_GLU_OP_SWIGLU_OAI or which == c.GGML_GLU_OP_SWIGLU_CLAMP:
        raise bad_value(op, "this GluOp has parameters: use swiglu_oai or swiglu_clamp")
    return 0


def glu(Context ctx not None, Tensor a not None, int op, bint swapped=False):
    """Return f(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3]; f is what that GluOp applies.

    swapped: f of the second half, times the first.
    Raises: ShapeError if there is no such, and for SWIGLU_OAI and SWIGLU_CLAMP, which have functions of their own.
    Wraps: ggml_glu.
    """
    check_glu("glu", op)
    check_halves("glu", a)
    return result(ctx, c.ggml_glu(ctx.room(1), a.ptr(), <c.ggml_glu_op> op, swapped), a)


def glu_split(Context ctx not None, Tensor a not None, Tensor b not None, int op):
    """Return f(a) * b, shape of a; f is what that GluOp applies.

    Raises: ShapeError as glu.
    Wraps: ggml_glu_split.
    """
    check_glu("glu_split", op)
    check_split("glu_split", a, b, True, True)
    return result(ctx, c.ggml_glu_split(ctx.room(1), a.ptr(), b.ptr(), <c.ggml_glu_op> op), a, b)


def reglu(Context ctx not None, Tensor a not None):
    """Return relu(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].  Wraps: ggml_reglu."""
    return halves("reglu", c.ggml_reglu, ctx, a)


def reglu_swapped(Context ctx not None, Tensor a not None):
    """Return relu(second half of each row) * first half, shape as of reglu.  Wraps: ggml_reglu_swapped."""
    return halves("reglu_swapped", c.ggml_reglu_swapped, ctx, a)


def reglu_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return relu(a) * b, shape of a.  Wraps: ggml_reglu_split."""
    return split("reglu_split", c.ggml_reglu_split, ctx, a, b)


def geglu(Context ctx not None, Tensor a not None):
    """Return gelu(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].  Wraps: ggml_geglu."""
    return halves("geglu", c.ggml_geglu, ctx, a)


def geglu_swapped(Context ctx not None, Tensor a not None):
    """Return gelu(second half of each row) * first half, shape as of geglu.  Wraps: ggml_geglu_swapped."""
    return halves("geglu_swapped", c.ggml_geglu_swapped, ctx, a)


def geglu_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return gelu(a) * b, shape of a.  Wraps: ggml_geglu_split."""
    return split("geglu_split", c.ggml_geglu_split, ctx, a, b)


def swiglu(Context ctx not None, Tensor a not None):
    """Return silu(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].  Wraps: ggml_swiglu."""
    return halves("swiglu", c.ggml_swiglu, ctx, a)


def swiglu_swapped(Context ctx not None, Tensor a not None):
    """Return silu(second half of each row) * first half, shape as of swiglu.  Wraps: ggml_swiglu_swapped."""
    return halves("swiglu_swapped", c.ggml_swiglu_swapped, ctx, a)


def swiglu_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return silu(a) * b, shape of a.  Wraps: ggml_swiglu_split."""
    return split("swiglu_split", c.ggml_swiglu_split, ctx, a, b)


def geglu_erf(Context ctx not None, Tensor a not None):
    """Return gelu_erf(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].

    Wraps: ggml_geglu_erf.
    """
    return halves("geglu_erf", c.ggml_geglu_erf, ctx, a)


def geglu_erf_swapped(Context ctx not None, Tensor a not None):
    """Return gelu_erf(second half of each row) * first half, shape as of geglu_erf.  Wraps: ggml_geglu_erf_swapped."""
    return halves("geglu_erf_swapped", c.ggml_geglu_erf_swapped, ctx, a)


def geglu_erf_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return gelu_erf(a) * b, shape of a.  Wraps: ggml_geglu_erf_split."""
    return split("geglu_erf_split", c.ggml_geglu_erf_split, ctx, a, b)


def geglu_quick(Context ctx not None, Tensor a not None):
    """Return gelu_quick(first half of each row) * second half, [a.ne0 / 2, a.ne1, a.ne2, a.ne3].

    Wraps: ggml_geglu_quick.
    """
    return halves("geglu_quick", c.ggml_geglu_quick, ctx, a)


def geglu_quick_swapped(Context ctx not None, Tensor a not None):
    """Return gelu_quick(second half of each row) * first half, shape as of geglu_quick.

    Wraps: ggml_geglu_quick_swapped.
    """
    return halves("geglu_quick_swapped", c.ggml_geglu_quick_swapped, ctx, a)


def geglu_quick_split(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return gelu_quick(a) * b, shape of a.  Wraps: ggml_geglu_quick_split."""
    return split("geglu_quick_split", c.ggml_geglu_quick_split, ctx, a, b)


cdef int check_limit(str op, float limit) except -1:
    if not limit >= 0:
        raise bad_value(op, f"limit {limit} is not a number from 0 up")
    return 0


def swiglu_oai(Context ctx not None, Tensor a not None, Tensor b not None, float alpha, float limit):
    """Return x * sigmoid(alpha * x) * (y + 1), x being a up to limit and y b from -limit to limit; shape of a.

    a, b: F32.
    Raises: ShapeError unless limit is a number from 0 up.
    Wraps: ggml_swiglu_oai.
    """
    check_split("swiglu_oai", a, b, False, False)
    check_limit("swiglu_oai", limit)
    return result(ctx, c.ggml_swiglu_oai(ctx.room(1), a.ptr(), b.ptr(), alpha, limit), a, b)


def swiglu_clamp(Context ctx not None, Tensor a not None, Tensor b not None, float limit):
    """Return silu(x) * y, x being a up to limit and y b from -limit to limit; shape of a.

    a, b: F32 or F16.
    Raises: ShapeError unless limit is a number from 0 up.
    Wraps: ggml_swiglu_clamp.
    """
    check_split("swiglu_clamp", a, b, True, False)
    check_limit("swiglu_clamp", limit)
    return result(ctx, c.ggml_swiglu_clamp(ctx.room(1), a.ptr(), b.ptr(), limit), a, b)
