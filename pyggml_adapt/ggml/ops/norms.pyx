"""Norms along rows and over groups of channels.

Operands are F32, and results have a's shape: each op raises DTypeError or ShapeError otherwise, and ShapeError unless
eps is a number from 0 up.  The `_inplace` ops write over a, no two elements of which may share memory.
"""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_counts, check_floats, check_inplace, has_rows, result,
)


ctypedef c.ggml_tensor * (*norm_op)(c.ggml_context *, c.ggml_tensor *, float)


cdef int check_eps(str op, float eps) except -1:
    if not eps >= 0:
        raise bad_value(op, f"eps {eps} is not a number from 0 up")
    return 0


cdef Tensor strided(str op, norm_op call, Context ctx, Tensor a, float eps):
    """Return the norm of rows of any strides."""
    if a.ptr().type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", ("a", a))
    check_counts(op, a)
    check_eps(op, eps)
    return result(ctx, call(ctx.room(1), a.ptr(), eps), a)


cdef Tensor contiguous(str op, norm_op call, Context ctx, Tensor a, float eps):
    """Return the norm of contiguous rows."""
    check_floats(op, a, False, False)
    return strided(op, call, ctx, a, eps)


def norm(Context ctx not None, Tensor a not None, float eps):
    """Return each row of a less its mean, divided by its standard deviation (eps added under the root).

    a: of any strides.
    Wraps: ggml_norm.
    """
    return strided("norm", c.ggml_norm, ctx, a, eps)


def norm_inplace(Context ctx not None, Tensor a not None, float eps):
    """Write norm(a, eps) over a, and return a view of it.  Wraps: ggml_norm_inplace."""
    check_inplace("norm_inplace", a)
    return strided("norm_inplace", c.ggml_norm_inplace, ctx, a, eps)


def rms_norm(Context ctx not None, Tensor a not None, float eps):
    """Return each row of a, which must be contiguous, divided by its root mean square (eps added under the root).

    Wraps: ggml_rms_norm.
    """
    return contiguous("rms_norm", c.ggml_rms_norm, ctx, a, eps)


def rms_norm_inplace(Context ctx not None, Tensor a not None, float eps):
    """Write rms_norm(a, eps) over a, and return a view of it.  Wraps: ggml_rms_norm_inplace."""
    check_inplace("rms_norm_inplace", a)
    return contiguous("rms_norm_inplace", c.ggml_rms_norm_inplace, ctx, a, eps)


def rms_norm_back(Context ctx not None, Tensor a not None, Tensor b not None, float eps):
    """Return the gradient of b, given that of rms_norm(b, eps), which is a; shape of both.

    Rows must be contiguous.  ggml.h names the operands the other way round.
    Raises: ShapeError if shapes differ.
    Wraps: ggml_rms_norm_back.
    """
    cdef c.ggml_tensor * pb = b.ptr()
    check_floats("rms_norm_back", a, False, False)
    check_eps("rms_norm_back", eps)
    if pb.type != c.GGML_TYPE_F32:
        raise bad_type("rms_norm_back", "b must be F32", ("a", a, "b", b))
    if not c.ggml_are_same_shape(a.ptr(), pb):
        raise bad_shape("rms_norm_back", "shapes differ", ("a", a, "b", b))
    if not has_rows(pb):
        raise bad_shape("rms_norm_back", "the rows of b must be contiguous", ("a", a, "b", b))
    return result(ctx, c.ggml_rms_norm_back(ctx.room(1), a.ptr(), pb, eps), a, b)


cdef int check_groups(str op, Tensor a, int n_groups, float eps) except -1:
    check_floats(op, a, False, False)
    check_eps(op, eps)
    cdef int64_t n = a.ptr().ne[2]
    cdef int64_t each = (n + n_groups - 1) // n_groups if n_groups > 0 else 0  # as many as ggml takes
    if n_groups < 1 or n > MAX_INT // 2 or n_groups > 1 and (each == 0 or (n + each - 1) // each != n_groups):
        raise bad_shape(op, f"ne2 cannot be divided into {n_groups} groups", ("a", a))
    return 0


def group_norm(Context ctx not None, Tensor a not None, int n_groups, float eps):
    """Return a normalised as by norm, over each group of ceil(ne2 / n_groups) of its ne2 channels, for each ne3.

    Rows must be contiguous; the last group may be smaller.
    Raises: ShapeError if no channel is left for some group.
    Wraps: ggml_group_norm.
    """
    check_groups("group_norm", a, n_groups, eps)
    return result(ctx, c.ggml_group_norm(ctx.room(1), a.ptr(), n_groups, eps), a)


def group_norm_inplace(Context ctx not None, Tensor a not None, int n_groups, float eps):
    """Write group_norm(a, n_groups, eps) over a, and return a view of it.  Wraps: ggml_group_norm_inplace."""
    check_inplace("group_norm_inplace", a)
    check_groups("group_norm_inplace", a, n_groups, eps)
    return result(ctx, c.ggml_group_norm_inplace(ctx.room(1), a.ptr(), n_groups, eps), a)


def l2_norm(Context ctx not None, Tensor a not None, float eps):
    """Return each row of a divided by its length, or by eps if that is larger.  a: of any strides.

    Wraps: ggml_l2_norm.
    """
    return strided("l2_norm", c.ggml_l2_norm, ctx, a, eps)


def l2_norm_inplace(Context ctx not None, Tensor a not None, float eps):
    """Write l2_norm(a, eps) over a, and return a view of it.  Wraps: ggml_l2_norm_inplace."""
    check_inplace("l2_norm_inplace", a)
    return strided("l2_norm_inplace", c.ggml_l2_norm_inplace, ctx, a, eps)
