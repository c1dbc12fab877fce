"""Pooling: one element, the largest or the mean, of each window that moves over the data."""

from libc.math cimport ceil
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, fits, has_even_rows, has_rows, is_float, is_packed, result,
)


cdef c.ggml_op_pool op_of(str name, int op) except? c.GGML_OP_POOL_MAX:
    if op != c.GGML_OP_POOL_MAX and op != c.GGML_OP_POOL_AVG:
        raise bad_value(name, f"{op} is neither OpPool.MAX nor OpPool.AVG")
    return <c.ggml_op_pool> op


cdef int64_t windows(str op, int64_t n, int k, int s, float p, operands) except -1:
    """Return how many windows there are along a dimension of n elements; each covers one of them at least."""
    cdef double end = <double> n + 2.0 * p - k
    cdef float counted
    if k < 1 or s < 1 or not 0 <= p <= n or ceil(p) >= k or 2.0 * p != ceil(2.0 * p):
        raise bad_value(op, f"window {k} and stride {s} are not from 1 up, or padding {p:g} not whole or half, from 0 "
                            f"to less than the window, and to {n}")
    if end < 0 or n > MAX_INT or n + 2.0 * p > MAX_INT:
        raise bad_shape(op, f"a is smaller than the window {k}, or too large", operands)
    counted = (<float> n + 2 * p - <float> k) / <float> s + 1  # as ggml does, which rounds large numbers
    if <int64_t> counted != <int64_t> end // s + 1:
        raise bad_shape(op, "a is too large", operands)
    return <int64_t> counted


def pool_1d(Context ctx not None, Tensor a not None, int op, int k0, int s0, int p0):
    """Return what op makes of each window of k0 elements along ne0, F32 [(a.ne0 + 2 p0 - k0) / s0 + 1, ...].

    a: F32 or F16, contiguous rows at one distance.  op: OpPool.MAX or AVG.  s0: the stride.  p0: padding before and
    behind, less than k0, which counts neither as the largest nor in the mean.
    Raises: ShapeError if k0 or s0 is below 1, p0 not below k0, or a smaller than a window.
    Wraps: ggml_pool_1d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_op_pool kind = op_of("pool_1d", op)
    operands = ("a", a)
    if not is_float(pa):
        raise bad_type("pool_1d", "a must be F32 or F16", operands)
    windows("pool_1d", pa.ne[0], k0, s0, p0, operands)
    if not has_rows(pa) or not has_even_rows(pa) or not fits(pa):
        raise bad_shape("pool_1d", "the rows of a must be contiguous, at one distance, and not too many", operands)
    return result(ctx, c.ggml_pool_1d(ctx.room(1), pa, kind, k0, s0, p0), a)


cdef int check_window(str op, int k0, int k1) except -1:
    if <double> k0 * k1 > MAX_INT:
        raise bad_value(op, f"a window of {k0} x {k1} is too large")
    return 0


def pool_2d(Context ctx not None, Tensor a not None, int op, int k0, int k1, int s0, int s1, float p0, float p1):
    """Return what op makes of each window of k0 x k1 elements, F32 [(a.ne0 + 2 p0 - k0) / s0 + 1, likewise, ...].

    a: F32 or F16, contiguous.  op: OpPool.MAX or AVG.  s0, s1: strides.  p0, p1: padding, less than k0 and k1; of a
    half, such as 0.5, the larger part is behind.  It counts not as the largest, but as 0 in the mean.
    Raises: ShapeError if a number is out of range or a smaller than a window.
    Wraps: ggml_pool_2d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_op_pool kind = op_of("pool_2d", op)
    operands = ("a", a)
    if not is_float(pa):
        raise bad_type("pool_2d", "a must be F32 or F16", operands)
    windows("pool_2d", pa.ne[0], k0, s0, p0, operands)
    windows("pool_2d", pa.ne[1], k1, s1, p1, operands)
    check_window("pool_2d", k0, k1)
    if not is_packed(pa) or c.ggml_nelements(pa) == 0:  # the kernel finds its planes by counting bytes
        raise bad_shape("pool_2d", "a must be contiguous, and not empty", operands)
    return result(ctx, c.ggml_pool_2d(ctx.room(1), pa, kind, k0, k1, s0, s1, p0, p1), a)


def pool_2d_back(Context ctx not None, Tensor a not None, Tensor af not None, int op, int k0, int k1, int s0, int s1,
                 float p0, float p1):
    """Return the gradient of pool_2d's operand, F32, shape of af.

    a: the gradient of its result, F32.  af: its operand, F32.  Both contiguous.  The others as pool_2d had them.
    Raises: ShapeError unless a has the shape that pool_2d gives of af; as pool_2d.
    Wraps: ggml_pool_2d_back.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pf = af.ptr()
    cdef c.ggml_op_pool kind = op_of("pool_2d_back", op)
    operands = ("a", a, "af", af)
    if pa.type != c.GGML_TYPE_F32 or pf.type != c.GGML_TYPE_F32:
        raise bad_type("pool_2d_back", "a and af must be F32", operands)
    check_window("pool_2d_back", k0, k1)
    if (pa.ne[0] != windows("pool_2d_back", pf.ne[0], k0, s0, p0, operands)
            or pa.ne[1] != windows("pool_2d_back", pf.ne[1], k1, s1, p1, operands)
            or pa.ne[2] != pf.ne[2] or pa.ne[3] != pf.ne[3]):
        raise bad_shape("pool_2d_back", "a has not the shape of af, pooled", operands)
    if not is_packed(pa) or not is_packed(pf) or c.ggml_nelements(pa) == 0:
        raise bad_shape("pool_2d_back", "a and af must be contiguous, and not empty", operands)
    return result(ctx, c.ggml_pool_2d_back(ctx.room(1), pa, pf, kind, k0, k1, s0, s1, p0, p1), a, af)
