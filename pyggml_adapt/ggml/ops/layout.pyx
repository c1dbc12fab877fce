"""Ops that copy, view and rearrange: no arithmetic, but what a conversion of types needs."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor, read_ne
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, check_blocks, check_even_rows, check_size, has_rows, is_float, is_weight,
    is_writable, result, type_name, type_of,
)


def concat(Context ctx not None, Tensor a not None, Tensor b not None, int dim):
    """Return a followed by b along dimension dim (0 to 3).

    Raises: ShapeError if another dimension differs, DTypeError if the types do.
    Wraps: ggml_concat.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    if not 0 <= dim < c.GGML_MAX_DIMS:
        raise bad_value("concat", f"dim {dim} is not 0 to 3")
    if pa.type != pb.type or c.ggml_is_quantized(pa.type):
        raise bad_type("concat", "both must have one unquantised type", [("a", a), ("b", b)])
    for i in range(4):
        if i != dim and pa.ne[i] != pb.ne[i]:
            raise bad_shape("concat", f"ne{i} differs", [("a", a), ("b", b)])
    if c.ggml_type_size(pa.type) == 8 and not (has_rows(pa) and has_rows(pb)):
        raise bad_shape("concat", "rows of 8-byte elements must be contiguous", [("a", a), ("b", b)])
    check_size("concat", <double> c.ggml_nelements(pa) + c.ggml_nelements(pb), [("a", a), ("b", b)])
    return result(ctx, c.ggml_concat(ctx.room(1), pa, pb, dim), a, b)


def repeat_4d(Context ctx not None, Tensor a not None, ne0, ne1, ne2, ne3):
    """Return copies of a side by side that fill [ne0, ne1, ne2, ne3], a's type.

    a: F32, F16, BF16, I32 or I16, with contiguous rows.
    Raises: ShapeError if a dimension is not a multiple of a's.
    Wraps: ggml_repeat_4d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef int64_t d[4]
    cdef size_t size = c.ggml_type_size(pa.type)
    ne = (ne0, ne1, ne2, ne3)
    read_ne(d, "repeat_4d", ne)
    if c.ggml_blck_size(pa.type) != 1 or not (size == 2 or size == 4):
        raise bad_type("repeat_4d", "a must be F32, F16, BF16, I32 or I16", [("a", a)])
    for i in range(4):
        if d[i] > 0x7FFFFFFF:  # the kernel counts with int
            raise bad_shape("repeat_4d", f"{list(ne)} is too large", [("a", a)])
        if d[i] % pa.ne[i] if pa.ne[i] else d[i]:
            raise bad_shape("repeat_4d", f"{list(ne)} is not a multiple of a", [("a", a)])
    if not has_rows(pa):
        raise bad_shape("repeat_4d", "the rows of a must be contiguous", [("a", a)])
    return result(ctx, c.ggml_repeat_4d(ctx.room(1), pa, d[0], d[1], d[2], d[3]), a)


def pad(Context ctx not None, Tensor a not None, int p0, int p1, int p2, int p3):
    """Return a followed by p0 to p3 zeros in its dimensions, [a.ne0 + p0, a.ne1 + p1, a.ne2 + p2, a.ne3 + p3].

    a: F32, of any strides.
    Raises: ShapeError if one of them is negative.
    Wraps: ggml_pad.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type("pad", "a must be F32", [("a", a)])
    if p0 < 0 or p1 < 0 or p2 < 0 or p3 < 0:
        raise bad_shape("pad", f"a number of zeros is negative in {[p0, p1, p2, p3]}", [("a", a)])
    check_size("pad", (<double> pa.ne[0] + p0) * (<double> pa.ne[1] + p1) * (<double> pa.ne[2] + p2)
               * (<double> pa.ne[3] + p3), [("a", a)])
    return result(ctx, c.ggml_pad(ctx.room(1), pa, p0, p1, p2, p3), a)


cdef int fill(int64_t * dims, str op, Tensor a, tuple ne) except -1:
    """Fill dims from ne, padded with ones, and check that it holds as many elements as a."""
    read_ne(dims, op, ne)
    if dims[0] * dims[1] * dims[2] * dims[3] != c.ggml_nelements(a.ptr()):
        raise bad_shape(op, f"{list(ne)} has another number of elements", [("a", a)])
    return check_blocks(op, a.ptr().type, dims[0], a)


def cast(Context ctx not None, Tensor a not None, type):
    """Return a converted to `type`, shape of a, contiguous.

    Raises: DTypeError unless floating-point becomes floating-point or quantised, quantised becomes F32, or F32 and I32
    become each other.
    Wraps: ggml_cast.
    """
    cdef c.ggml_type t = type_of(type)
    check_cast(a.ptr(), t, a)
    return result(ctx, c.ggml_cast(ctx.room(1), a.ptr(), t), a)


cdef int check_cast(c.ggml_tensor * pa, c.ggml_type type, Tensor a) except -1:
    """Check that kernels can convert a to `type`."""
    cdef bint ok
    if pa.type == type or (pa.type == c.GGML_TYPE_I32 and type == c.GGML_TYPE_F32):
        ok = True
    elif is_float(pa) or pa.type == c.GGML_TYPE_BF16:
        ok = is_writable(type) or (pa.type == c.GGML_TYPE_F32 and type == c.GGML_TYPE_I32)
    else:
        ok = is_weight(pa) and type == c.GGML_TYPE_F32
    if not ok:
        raise bad_type("cast", f"cannot convert to {type_name(type)}", [("a", a)])
    if c.ggml_is_quantized(type) and not has_rows(pa):
        raise bad_shape("cast", "the rows of a must be contiguous", [("a", a)])
    return check_blocks("cast", type, pa.ne[0], a)


def cont(Context ctx not None, Tensor a not None, *ne):
    """Return a contiguous copy of a, with shape ne if it is given.

    Raises: ShapeError if ne has another number of elements.
    Wraps: ggml_cont, ggml_cont_4d.
    """
    cdef int64_t d[4]
    if not ne:
        return result(ctx, c.ggml_cont(ctx.room(1), a.ptr()), a)
    fill(d, "cont", a, ne)
    if c.ggml_blck_size(a.ptr().type) > 1 and not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("cont", "a quantised a must be contiguous if its shape changes", [("a", a)])
    return result(ctx, c.ggml_cont_4d(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3]), a)


def reshape(Context ctx not None, Tensor a not None, *ne):
    """Return a view of a, which must be contiguous, with shape ne.

    Raises: ShapeError if a is not contiguous or ne has another number of elements.
    Wraps: ggml_reshape_4d.
    """
    cdef int64_t d[4]
    fill(d, "reshape", a, ne)
    if not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("reshape", "a must be contiguous", [("a", a)])
    return result(ctx, c.ggml_reshape_4d(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3]), a)


def view(Context ctx not None, Tensor a not None, ne, nb=(), size_t offset=0):
    """Return a view of a: shape ne, strides nb = (nb1, nb2, nb3) in bytes, from byte `offset` on.

    Strides that are not given are those of contiguous rows.
    Raises: ShapeError if the view leaves a.
    Wraps: ggml_view_4d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef int64_t d[4]
    cdef size_t s[4]
    cdef size_t end
    cdef int i
    read_ne(d, "view", ne)
    if len(nb) > 3 or d[0] * d[1] * d[2] * d[3] == 0:
        raise bad_shape("view", f"impossible shape {list(ne)} or strides {list(nb)}", [("a", a)])
    check_blocks("view", pa.type, d[0], a)
    s[0] = c.ggml_type_size(pa.type)
    end = c.ggml_row_size(pa.type, d[0])
    for i in range(1, 4):
        s[i] = nb[i - 1] if i <= len(nb) else (end if i == 1 else s[i - 1] * d[i - 1])
        if s[i] % s[0] or s[i] > (<size_t> 1 << 44) or <size_t> d[i] > (<size_t> 1 << 60) // (s[i] if s[i] else 1):
            raise bad_shape("view", f"impossible strides {list(nb)}", [("a", a)])
    for i in range(1, 4):
        end += (d[i] - 1) * s[i]
    cdef size_t room = c.ggml_nbytes(pa)
    cdef size_t packed = c.ggml_row_size(pa.type, d[0]) * d[1] * d[2] * d[3]
    if offset > room or end > room - offset or packed > room - offset:
        raise bad_shape("view", f"{list(ne)} with strides {list(nb)} at byte {offset} leaves a", [("a", a)])
    return result(ctx, c.ggml_view_4d(ctx.room(1), pa, d[0], d[1], d[2], d[3], s[1], s[2], s[3], offset), a)


def permute(Context ctx not None, Tensor a not None, int axis0, int axis1, int axis2, int axis3):
    """Return a view of a whose dimension axis_i is a's dimension i.

    Raises: ShapeError unless the axes are 0, 1, 2, 3 in some order, and axis0 is 0 if a is quantised.
    Wraps: ggml_permute.
    """
    if sorted((axis0, axis1, axis2, axis3)) != [0, 1, 2, 3]:
        raise bad_value("permute", f"{axis0}, {axis1}, {axis2}, {axis3} is not a permutation of 0, 1, 2, 3")
    if axis0 != 0 and c.ggml_blck_size(a.ptr().type) > 1:
        raise bad_shape("permute", "the rows of a quantised a must stay", [("a", a)])
    return result(ctx, c.ggml_permute(ctx.room(1), a.ptr(), axis0, axis1, axis2, axis3), a)


def transpose(Context ctx not None, Tensor a not None):
    """Return a view of a, which must not be quantised, with ne0 and ne1 exchanged.  Wraps: ggml_transpose."""
    if c.ggml_blck_size(a.ptr().type) > 1:
        raise bad_shape("transpose", "the rows of a quantised a must stay", [("a", a)])
    return result(ctx, c.ggml_transpose(ctx.room(1), a.ptr()), a)


def get_rows(Context ctx not None, Tensor a not None, Tensor ids not None):
    """Return the rows of a that ids names, F32 (I32 for an I32 a) [a.ne0, ids.ne0, ids.ne1, ids.ne2].

    ids: I32, each from 0 to a.ne1 - 1 (checked when the graph is computed, if they are an input).
    Raises: ShapeError unless a.ne2 = ids.ne1 and a.ne3 = ids.ne2.
    Wraps: ggml_get_rows.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = [("a", a), ("ids", ids)]
    if pi.type != c.GGML_TYPE_I32 or not (is_weight(pa) or pa.type == c.GGML_TYPE_I32):
        raise bad_type("get_rows", "a must be of a floating-point or quantised type or I32, ids I32", operands)
    if pa.ne[2] != pi.ne[1] or pa.ne[3] != pi.ne[2] or pi.ne[3] != 1:
        raise bad_shape("get_rows", "ids do not match a", operands)
    if pa.ne[1] == 0 and c.ggml_nelements(pi):
        raise bad_shape("get_rows", "a has no rows", operands)
    if not has_rows(pa):
        raise bad_shape("get_rows", "the rows of a must be contiguous", operands)
    check_size("get_rows", <double> pa.ne[0] * c.ggml_nelements(pi), operands)
    return result(ctx, c.ggml_get_rows(ctx.room(1), pa, pi), a, ids)


def set_rows(Context ctx not None, Tensor a not None, Tensor b not None, Tensor ids not None):
    """Return a view of a, into whose rows ids the rows of b are written, converted to a's type.

    a: [n, rows, ...].  b: F32 [n, k, ...].  ids: I64 or I32 [k, ...], each from 0 to rows - 1 (checked likewise).
    Raises: ShapeError if these do not match.
    Wraps: ggml_set_rows.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = [("a", a), ("b", b), ("ids", ids)]
    if not is_float(pb) or not (pi.type == c.GGML_TYPE_I64 or pi.type == c.GGML_TYPE_I32):
        raise bad_type("set_rows", "b must be F32 or F16, ids I64 or I32", operands)
    if not is_writable(pa.type):
        raise bad_type("set_rows", "a must be of a type that ggml can convert to", operands)
    if (pa.ne[0] != pb.ne[0] or pa.ne[2] != pb.ne[2] or pa.ne[3] != pb.ne[3] or pb.ne[1] != pi.ne[0]
            or (pa.ne[1] == 0 and pb.ne[1])
            or pi.ne[1] == 0 or pi.ne[2] == 0 or pb.ne[2] % pi.ne[1] or pb.ne[3] % pi.ne[2] or pi.ne[3] != 1):
        raise bad_shape("set_rows", "shapes do not match", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("set_rows", "the rows of a and b must be contiguous", operands)
    return result(ctx, c.ggml_set_rows(ctx.room(1), pa, pb, pi), a, b, ids)


def argsort_top_k(Context ctx not None, Tensor a not None, int k):
    """Return the indices of the k largest elements of each row, largest first, I32 [k, a.ne1, a.ne2, a.ne3].

    Raises: ShapeError unless 1 <= k <= ne0.
    Wraps: ggml_argsort_top_k.
    """
    check_even_rows("argsort_top_k", a)
    if not 1 <= k <= a.ptr().ne[0] or a.ptr().ne[0] > 0x7FFFFFFF:
        raise bad_shape("argsort_top_k", f"k = {k} is not from 1 to ne0", [("a", a)])
    return result(ctx, c.ggml_argsort_top_k(ctx.room(2), a.ptr(), k), a)
