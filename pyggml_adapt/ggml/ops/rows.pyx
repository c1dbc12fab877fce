"""Parts of tensors by index or position: rows that are picked or replaced, and regions that are written or added to."""

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, check_size, fits, has_rows, is_float, is_weight, is_writable, result,
)


cdef enum:
    MAX_OFFSET = 1 << 30  # ggml keeps offsets as int32_t, and asserts this of ggml_set's


def get_rows(Context ctx not None, Tensor a not None, Tensor ids not None):
    """Return the rows of a that ids names, F32 (I32 for an I32 a) [a.ne0, ids.ne0, ids.ne1, ids.ne2].

    ids: I32, each from 0 to a.ne1 - 1 (checked when the graph is computed, if they are an input).
    Raises: ShapeError unless a.ne2 = ids.ne1 and a.ne3 = ids.ne2.
    Wraps: ggml_get_rows.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = ("a", a, "ids", ids)
    if pi.type != c.GGML_TYPE_I32 or not (is_weight(pa) or pa.type == c.GGML_TYPE_I32):
        raise bad_type("get_rows", "a must be of a floating-point or quantised type or I32, ids I32", operands)
    if pa.ne[2] != pi.ne[1] or pa.ne[3] != pi.ne[2] or pi.ne[3] != 1:
        raise bad_shape("get_rows", "ids do not match a", operands)
    if pa.ne[1] == 0 and c.ggml_nelements(pi):
        raise bad_shape("get_rows", "a has no rows", operands)
    if not has_rows(pa):
        raise bad_shape("get_rows", "the rows of a must be contiguous", operands)
    if pa.ne[0] > MAX_INT or c.ggml_nelements(pi) > MAX_INT:
        raise bad_shape("get_rows", "rows are too long, or ids too many", operands)
    check_size("get_rows", <double> pa.ne[0] * c.ggml_nelements(pi), operands)
    return result(ctx, c.ggml_get_rows(ctx.room(1), pa, pi), a, ids)


def get_rows_back(Context ctx not None, Tensor a not None, Tensor b not None, Tensor c_ not None):
    """Return the gradient of get_rows for its first operand: to row b[i] row i of a is added, F32, shape of c_.

    a: F32 or F16 [n, k].  b: I32 [k], each from 0 to c_.ne1 - 1 (checked when the graph is computed, if they are an
    input).  c_: [n, rows], of which only the shape is taken.
    Raises: ShapeError if these do not match.
    Wraps: ggml_get_rows_back.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pc = c_.ptr()
    operands = ("a", a, "b", b, "c", c_)
    if not is_float(pa) or pb.type != c.GGML_TYPE_I32:
        raise bad_type("get_rows_back", "a must be F32 or F16, b I32", operands)
    if pa.ne[2] * pa.ne[3] != 1 or pc.ne[2] * pc.ne[3] != 1 or pb.ne[1] * pb.ne[2] * pb.ne[3] != 1:
        raise bad_shape("get_rows_back", "a and c have two dimensions, b one", operands)
    # the kernel reads a row of a for each index, however many there are
    if pa.ne[0] != pc.ne[0] or pa.ne[1] != pb.ne[0]:
        raise bad_shape("get_rows_back", "a needs rows as long as c's, one for each index", operands)
    if pc.ne[1] == 0 and pb.ne[0]:
        raise bad_shape("get_rows_back", "c has no rows", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("get_rows_back", "the rows of a and b must be contiguous", operands)
    if not fits(pa) or not fits(pc):
        raise bad_shape("get_rows_back", "a dimension is too large", operands)
    return result(ctx, c.ggml_get_rows_back(ctx.room(1), pa, pb, pc), a, b)


def set_rows(Context ctx not None, Tensor a not None, Tensor b not None, Tensor ids not None):
    """Return a view of a, into whose rows ids the rows of b are written, converted to a's type.

    a: [n, rows, ...], of a floating-point or quantised type or I32.  b: F32 or F16 [n, k, ...].  ids: I64 or I32
    [k, ...], each from 0 to rows - 1 (checked as get_rows'), broadcast over ne2 and ne3 of b.  If b is F16 and a is
    not, b is cast to F32 first, by a node of its own.
    Raises: ShapeError if these do not match.
    Wraps: ggml_set_rows.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = ("a", a, "b", b, "ids", ids)
    if not is_float(pb) or not (pi.type == c.GGML_TYPE_I64 or pi.type == c.GGML_TYPE_I32):
        raise bad_type("set_rows", "b must be F32 or F16, ids I64 or I32", operands)
    if not (is_writable(pa.type) or pa.type == c.GGML_TYPE_I32):
        raise bad_type("set_rows", "a must be of a type that ggml can convert to", operands)
    if (pa.ne[0] != pb.ne[0] or pa.ne[2] != pb.ne[2] or pa.ne[3] != pb.ne[3] or pb.ne[1] != pi.ne[0]
            or (pa.ne[1] == 0 and pb.ne[1])
            or pi.ne[1] == 0 or pi.ne[2] == 0 or pb.ne[2] % pi.ne[1] or pb.ne[3] % pi.ne[2] or pi.ne[3] != 1):
        raise bad_shape("set_rows", "shapes do not match", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("set_rows", "the rows of a and b must be contiguous", operands)
    if pb.type == c.GGML_TYPE_F16 and pa.type != c.GGML_TYPE_F16:  # for which ggml's work memory is too small
        ctx.room(2)
        pb = c.ggml_cast(ctx.ptr(), pb, c.GGML_TYPE_F32)
    return result(ctx, c.ggml_set_rows(ctx.room(1), pa, pb, pi), a, b, ids)


cdef int check_region(str op, Tensor a, Tensor b, size_t nb1, size_t nb2, size_t nb3, size_t offset,
                      bint disjoint) except -1:
    """Check that b's elements lie inside a with these strides; if `disjoint`, that its rows do not overlap there."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef size_t nb[4]
    cdef size_t end
    cdef int i
    nb[0], nb[1], nb[2], nb[3] = 4, nb1, nb2, nb3
    operands = ("a", a, "b", b)
    if not c.ggml_is_contiguous(pa) or not has_rows(pb):
        raise bad_shape(op, "a must be contiguous, and so the rows of b", operands)
    if not fits(pb):
        raise bad_shape(op, "b has too many rows", operands)
    end = 4
    for i in range(4):
        if pb.ne[i] > 1:
            if nb[i] % 4 or nb[i] > MAX_INT:
                raise bad_shape(op, f"impossible strides {[nb1, nb2, nb3]}", operands)
            if disjoint and nb[i] < end:
                raise bad_shape(op, f"with strides {[nb1, nb2, nb3]} the rows of b overlap", operands)
            end += (pb.ne[i] - 1) * nb[i]
    if offset % 4 or offset >= MAX_OFFSET:
        raise bad_shape(op, f"offset {offset} is not a multiple of 4 below {MAX_OFFSET}", operands)
    if c.ggml_nelements(pb) > c.ggml_nelements(pa) or end + offset > c.ggml_nbytes(pa):
        raise bad_shape(op, f"b with strides {[nb1, nb2, nb3]} at byte {offset} leaves a", operands)
    return 0


cdef int check_set(str op, Tensor a, Tensor b, size_t nb1, size_t nb2, size_t nb3, size_t offset) except -1:
    cdef c.ggml_type type = a.ptr().type
    if not (type == c.GGML_TYPE_F32 or type == c.GGML_TYPE_I32) or b.ptr().type != type:
        raise bad_type(op, "a and b must both be F32 or both I32", ("a", a, "b", b))
    return check_region(op, a, b, nb1, nb2, nb3, offset, False)


def set(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t nb2, size_t nb3, size_t offset):
    """Return a copy of a in which b is written over the elements from byte `offset` on, strides nb1 to nb3 in bytes.

    a: F32 or I32, contiguous.  b: a's type, contiguous rows.
    Raises: ShapeError if b leaves a, or offset is 2^30 or more.
    Wraps: ggml_set.
    """
    check_set("set", a, b, nb1, nb2, nb3, offset)
    return result(ctx, c.ggml_set(ctx.room(1), a.ptr(), b.ptr(), nb1, nb2, nb3, offset), a, b)


def set_inplace(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t nb2, size_t nb3,
                size_t offset):
    """Return a view of a, into which b is written as by set.

    Raises: as set.
    Wraps: ggml_set_inplace.
    """
    check_set("set_inplace", a, b, nb1, nb2, nb3, offset)
    return result(ctx, c.ggml_set_inplace(ctx.room(1), a.ptr(), b.ptr(), nb1, nb2, nb3, offset), a, b)


def set_1d(Context ctx not None, Tensor a not None, Tensor b not None, size_t offset):
    """Return a copy of a in which b is written over the elements from byte `offset` on, with a's strides.

    Raises: as set.
    Wraps: ggml_set_1d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_set("set_1d", a, b, pa.nb[1], pa.nb[2], pa.nb[3], offset)
    return result(ctx, c.ggml_set_1d(ctx.room(1), pa, b.ptr(), offset), a, b)


def set_1d_inplace(Context ctx not None, Tensor a not None, Tensor b not None, size_t offset):
    """Return a view of a, into which b is written as by set_1d.

    Raises: as set.
    Wraps: ggml_set_1d_inplace.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_set("set_1d_inplace", a, b, pa.nb[1], pa.nb[2], pa.nb[3], offset)
    return result(ctx, c.ggml_set_1d_inplace(ctx.room(1), pa, b.ptr(), offset), a, b)


def set_2d(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t offset):
    """Return a copy of a in which b is written over the elements from byte `offset` on, its rows nb1 bytes apart.

    Raises: as set.
    Wraps: ggml_set_2d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_set("set_2d", a, b, nb1, pa.nb[2], pa.nb[3], offset)
    return result(ctx, c.ggml_set_2d(ctx.room(1), pa, b.ptr(), nb1, offset), a, b)


def set_2d_inplace(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t offset):
    """Return a view of a, into which b is written as by set_2d.

    Raises: as set.
    Wraps: ggml_set_2d_inplace.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    check_set("set_2d_inplace", a, b, nb1, pa.nb[2], pa.nb[3], offset)
    return result(ctx, c.ggml_set_2d_inplace(ctx.room(1), pa, b.ptr(), nb1, offset), a, b)


cdef int check_acc(str op, Tensor a, Tensor b, size_t nb1, size_t nb2, size_t nb3, size_t offset) except -1:
    if a.ptr().type != c.GGML_TYPE_F32 or b.ptr().type != c.GGML_TYPE_F32:
        raise bad_type(op, "a and b must be F32", ("a", a, "b", b))
    # threads add rows without waiting for each other, so a sum into one place twice could be lost
    return check_region(op, a, b, nb1, nb2, nb3, offset, True)


def acc(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t nb2, size_t nb3, size_t offset):
    """Return a copy of a with b added to the elements from byte `offset` on, strides nb1 to nb3 in bytes.

    a: F32, contiguous.  b: F32, contiguous rows.
    Raises: ShapeError if b leaves a, its rows overlap there, or offset is 2^30 or more.
    Wraps: ggml_acc.
    """
    check_acc("acc", a, b, nb1, nb2, nb3, offset)
    return result(ctx, c.ggml_acc(ctx.room(1), a.ptr(), b.ptr(), nb1, nb2, nb3, offset), a, b)


def acc_inplace(Context ctx not None, Tensor a not None, Tensor b not None, size_t nb1, size_t nb2, size_t nb3,
                size_t offset):
    """Return a view of a, to which b is added as by acc.

    Raises: as acc.
    Wraps: ggml_acc_inplace.
    """
    check_acc("acc_inplace", a, b, nb1, nb2, nb3, offset)
    return result(ctx, c.ggml_acc_inplace(ctx.room(1), a.ptr(), b.ptr(), nb1, nb2, nb3, offset), a, b)
