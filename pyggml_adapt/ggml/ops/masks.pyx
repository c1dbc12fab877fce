"""Triangles and diagonals of matrices."""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport MAX_INT, bad_shape, bad_value, check_rows, check_size, fits, result


def diag(Context ctx not None, Tensor a not None):
    """Return matrices with the rows of a as diagonals and 0 elsewhere, F32 [a.ne0, a.ne0, a.ne2, a.ne3].

    a: F32 [n, 1, ...], contiguous rows.
    Raises: ShapeError unless a.ne1 = 1.
    Wraps: ggml_diag.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_rows("diag", a)
    if pa.ne[1] != 1 or not fits(pa):
        raise bad_shape("diag", "a must have one row in each matrix, and dimensions that fit in an int", ("a", a))
    check_size("diag", <double> pa.ne[0] * c.ggml_nelements(pa), ("a", a))
    return result(ctx, c.ggml_diag(ctx.room(1), pa), a)


cdef int check_mask(str op, Tensor a, int n_past, bint inplace) except -1:
    cdef c.ggml_tensor * pa = a.ptr()
    check_rows(op, a)
    if n_past < 0:
        raise bad_value(op, f"n_past {n_past} is negative")
    if not fits(pa) or pa.ne[0] + pa.ne[1] > MAX_INT:
        raise bad_shape(op, "a dimension is too large", ("a", a))
    if not inplace and not c.ggml_is_contiguous(pa):
        raise bad_shape(op, "a must be contiguous", ("a", a))
    if inplace and pa.ne[3] > 1 and pa.nb[3] != pa.nb[2] * pa.ne[2]:  # the kernel counts matrices, nb2 apart
        raise bad_shape(op, "the matrices of a must lie at one distance", ("a", a))
    return 0


def diag_mask_inf(Context ctx not None, Tensor a not None, int n_past):
    """Return a with -inf where i0 > n_past + i1: what follows a token in a causal model; shape of a.

    a: F32, contiguous.
    Raises: ShapeError if a is not contiguous, or n_past negative.
    Wraps: ggml_diag_mask_inf.
    """
    check_mask("diag_mask_inf", a, n_past, False)
    return result(ctx, c.ggml_diag_mask_inf(ctx.room(1), a.ptr(), n_past), a)


def diag_mask_inf_inplace(Context ctx not None, Tensor a not None, int n_past):
    """Return a view of a, F32 of contiguous rows, into which -inf is written where i0 > n_past + i1.

    Raises: ShapeError if matrices do not lie at one distance, or n_past is negative.
    Wraps: ggml_diag_mask_inf_inplace.
    """
    check_mask("diag_mask_inf_inplace", a, n_past, True)
    return result(ctx, c.ggml_diag_mask_inf_inplace(ctx.room(1), a.ptr(), n_past), a)


def diag_mask_zero(Context ctx not None, Tensor a not None, int n_past):
    """Return a with 0 where i0 > n_past + i1, shape of a.

    a: F32, contiguous.
    Raises: ShapeError if a is not contiguous, or n_past negative.
    Wraps: ggml_diag_mask_zero.
    """
    check_mask("diag_mask_zero", a, n_past, False)
    return result(ctx, c.ggml_diag_mask_zero(ctx.room(1), a.ptr(), n_past), a)


def diag_mask_zero_inplace(Context ctx not None, Tensor a not None, int n_past):
    """Return a view of a, F32 of contiguous rows, into which 0 is written where i0 > n_past + i1.

    Raises: ShapeError if matrices do not lie at one distance, or n_past is negative.
    Wraps: ggml_diag_mask_zero_inplace.
    """
    check_mask("diag_mask_zero_inplace", a, n_past, True)
    return result(ctx, c.ggml_diag_mask_zero_inplace(ctx.room(1), a.ptr(), n_past), a)


def tri(Context ctx not None, Tensor a not None, int type):
    """Return a with 0 outside the triangle of each matrix that `type`, a TriType, names; shape of a.

    a: F32 [n, n, ...], contiguous.
    Raises: ShapeError if a is not contiguous, its matrices not square, or ggml has no such type.
    Wraps: ggml_tri.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_rows("tri", a)
    if type not in (c.GGML_TRI_TYPE_UPPER_DIAG, c.GGML_TRI_TYPE_UPPER, c.GGML_TRI_TYPE_LOWER_DIAG,
                    c.GGML_TRI_TYPE_LOWER):
        raise bad_value("tri", f"{type} is not a TriType")
    if pa.ne[0] != pa.ne[1] or not c.ggml_is_contiguous(pa) or not fits(pa):
        raise bad_shape("tri", "a must be square matrices, contiguous", ("a", a))
    return result(ctx, c.ggml_tri(ctx.room(1), pa, <c.ggml_tri_type> type), a)
