"""Views and copies: no arithmetic, but what a conversion of types needs."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor, read_ne
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_blocks, fits, has_rows, is_float, is_weight, is_writable, result,
    type_name, type_of,
)


cdef int check_count(str op, Tensor a, c.ggml_type type, operands) except -1:
    """Check that kernels can count what they copy: rows and blocks with int, what they dequantise with uint32_t."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef int64_t n = c.ggml_nelements(pa)
    if pa.type == type:
        n //= c.ggml_blck_size(type)
        if n > MAX_INT:
            raise bad_shape(op, "a has too many elements", operands)
    elif n > 0xFFFFFFFF if c.ggml_is_quantized(pa.type) else not fits(pa):
        raise bad_shape(op, "a has too many elements", operands)
    return 0


cdef int check_conversion(str op, Tensor a, c.ggml_type type, operands) except -1:
    """Check that kernels can convert a to `type`."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef bint ok
    if pa.type == type or (pa.type == c.GGML_TYPE_I32 and type == c.GGML_TYPE_F32):
        ok = True
    elif is_float(pa) or pa.type == c.GGML_TYPE_BF16:
        ok = is_writable(type) or (pa.type == c.GGML_TYPE_F32 and type == c.GGML_TYPE_I32)
    else:
        ok = is_weight(pa) and type == c.GGML_TYPE_F32
    if not ok:
        raise bad_type(op, f"cannot convert to {type_name(type)}", operands)
    if c.ggml_is_quantized(type) and not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", operands)
    return check_count(op, a, type, operands)


def dup(Context ctx not None, Tensor a not None):
    """Return a contiguous copy of a, of any type, shape of a.  Wraps: ggml_dup."""
    check_count("dup", a, a.ptr().type, ("a", a))
    return result(ctx, c.ggml_dup(ctx.room(1), a.ptr()), a)


def dup_inplace(Context ctx not None, Tensor a not None):
    """Return a view of a, which is copied onto itself: it stays as it is.  Wraps: ggml_dup_inplace."""
    check_count("dup_inplace", a, a.ptr().type, ("a", a))
    return result(ctx, c.ggml_dup_inplace(ctx.room(1), a.ptr()), a)


def cpy(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return a view of b, into which the elements of a are written in order, converted to b's type as cast does.

    a and b must not overlap.  Shapes may differ where both hold as many elements.
    Raises: DTypeError as cast; ShapeError if the numbers of elements differ, or a kernel cannot divide the blocks of a
    quantised operand: its rows must stay, or both be contiguous.
    Wraps: ggml_cpy.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    if c.ggml_nelements(pa) != c.ggml_nelements(pb):
        raise bad_shape("cpy", "the numbers of elements differ", operands)
    check_conversion("cpy", a, pb.type, operands)
    if c.ggml_is_quantized(pb.type) or c.ggml_is_quantized(pa.type):
        check_blocks_of_copy(pa, pb, operands)
    return result(ctx, c.ggml_cpy(ctx.room(1), pa, pb), a, b)


cdef int check_blocks_of_copy(c.ggml_tensor * pa, c.ggml_tensor * pb, operands) except -1:
    """Check that whole blocks are copied, and where ggml expects them."""
    if pa.type == pb.type:
        if not c.ggml_are_same_shape(pa, pb) and not (c.ggml_is_contiguous(pa) and c.ggml_is_contiguous(pb)):
            raise bad_shape("cpy", "quantised a and b must be contiguous if shapes differ", operands)
    elif c.ggml_is_quantized(pb.type):
        if not c.ggml_is_contiguous(pb):
            raise bad_shape("cpy", "a quantised b must be contiguous", operands)
        # the kernel quantises rows of a, in a work buffer as long as rows of b
        if pa.ne[0] % c.ggml_blck_size(pb.type) or pa.ne[0] > pb.ne[0]:
            raise bad_shape("cpy", f"rows of a must be whole blocks of {type_name(pb.type)}, no longer than b's",
                            operands)
    elif not has_rows(pb):
        raise bad_shape("cpy", "the rows of b must be contiguous", operands)
    elif pb.ne[0] % c.ggml_blck_size(pa.type) and not c.ggml_is_contiguous(pb):
        raise bad_shape("cpy", "b must be contiguous, or have rows of whole blocks of a", operands)
    return 0


def cast(Context ctx not None, Tensor a not None, type):
    """Return a converted to `type`, shape of a, contiguous.

    Raises: DTypeError unless floating-point becomes floating-point or quantised, quantised becomes F32, or F32 and I32
    become each other.
    Wraps: ggml_cast.
    """
    cdef c.ggml_type t = type_of(type)
    check_conversion("cast", a, t, ("a", a))
    check_blocks("cast", t, a.ptr().ne[0], a)
    return result(ctx, c.ggml_cast(ctx.room(1), a.ptr(), t), a)


cdef int fill(int64_t * dims, str op, Tensor a, tuple ne) except -1:
    """Fill dims from ne, padded with ones, and check that it holds as many elements as a."""
    read_ne(dims, op, ne)
    if dims[0] * dims[1] * dims[2] * dims[3] != c.ggml_nelements(a.ptr()):
        raise bad_shape(op, f"{list(ne)} has another number of elements", ("a", a))
    return check_blocks(op, a.ptr().type, dims[0], a)


def cont(Context ctx not None, Tensor a not None, *ne):
    """Return a contiguous copy of a, with shape ne if it is given.

    Raises: ShapeError if ne has another number of elements.
    Wraps: ggml_cont, ggml_cont_1d, ggml_cont_2d, ggml_cont_3d, ggml_cont_4d.
    """
    cdef int64_t d[4]
    check_count("cont", a, a.ptr().type, ("a", a))
    if not ne:
        return result(ctx, c.ggml_cont(ctx.room(1), a.ptr()), a)
    fill(d, "cont", a, ne)
    if c.ggml_blck_size(a.ptr().type) > 1 and not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("cont", "a quantised a must be contiguous if its shape changes", ("a", a))
    return result(ctx, c.ggml_cont_4d(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3]), a)


def reshape(Context ctx not None, Tensor a not None, *ne):
    """Return a view of a, which must be contiguous, with shape ne, or that of the one Tensor given instead.

    Raises: ShapeError if a is not contiguous or ne has another number of elements.
    Wraps: ggml_reshape, ggml_reshape_1d, ggml_reshape_2d, ggml_reshape_3d, ggml_reshape_4d.
    """
    cdef int64_t d[4]
    if len(ne) == 1 and isinstance(ne[0], Tensor):
        ne = (<Tensor> ne[0]).ne
    fill(d, "reshape", a, ne)
    if not c.ggml_is_contiguous(a.ptr()):
        raise bad_shape("reshape", "a must be contiguous", ("a", a))
    return result(ctx, c.ggml_reshape_4d(ctx.room(1), a.ptr(), d[0], d[1], d[2], d[3]), a)


def view_tensor(Context ctx not None, Tensor a not None):
    """Return a view of all of a: its type, shape and strides.

    It is computed after a, as other views are; ggml's own has no operand, so that a graph would leave a out.
    Wraps: ggml_view_tensor.
    """
    cdef c.ggml_tensor * t = c.ggml_view_tensor(ctx.room(1), a.ptr())
    t.op = <c.ggml_op> c.GGML_OP_VIEW
    t.src[0] = a.ptr()
    return result(ctx, t, a)


def view(Context ctx not None, Tensor a not None, ne, nb=(), size_t offset=0):
    """Return a view of a: shape ne, strides nb = (nb1, nb2, nb3) in bytes, from byte `offset` on.

    Strides that are not given are those of contiguous rows.
    Raises: ShapeError if the view leaves a.
    Wraps: ggml_view_1d, ggml_view_2d, ggml_view_3d, ggml_view_4d.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef int64_t d[4]
    cdef size_t s[4]
    cdef size_t end
    cdef tuple strides = <tuple> nb if type(nb) is tuple else tuple(nb)
    cdef int i, n_strides = len(strides)
    read_ne(d, "view", ne)
    if n_strides > 3 or d[0] * d[1] * d[2] * d[3] == 0:
        raise bad_shape("view", f"impossible shape {list(ne)} or strides {list(nb)}", ("a", a))
    check_blocks("view", pa.type, d[0], a)
    s[0] = c.ggml_type_size(pa.type)
    end = c.ggml_row_size(pa.type, d[0])
    for i in range(1, 4):
        if i <= n_strides:
            s[i] = strides[i - 1]
        else:
            s[i] = end if i == 1 else s[i - 1] * d[i - 1]
        if s[i] % s[0] or s[i] > (<size_t> 1 << 44) or <size_t> d[i] > (<size_t> 1 << 60) // (s[i] if s[i] else 1):
            raise bad_shape("view", f"impossible strides {list(nb)}", ("a", a))
    for i in range(1, 4):
        end += (d[i] - 1) * s[i]
    cdef size_t room = c.ggml_nbytes(pa)
    cdef size_t packed = c.ggml_row_size(pa.type, d[0]) * d[1] * d[2] * d[3]
    if offset > room or end > room - offset or packed > room - offset:
        raise bad_shape("view", f"{list(ne)} with strides {list(nb)} at byte {offset} leaves a", ("a", a))
    if offset % s[0]:
        raise bad_shape("view", f"byte {offset} is inside an element or block", ("a", a))
    return result(ctx, c.ggml_view_4d(ctx.room(1), pa, d[0], d[1], d[2], d[3], s[1], s[2], s[3], offset), a)


def permute(Context ctx not None, Tensor a not None, int axis0, int axis1, int axis2, int axis3):
    """Return a view of a whose dimension axis_i is a's dimension i.

    Raises: ShapeError unless the axes are 0, 1, 2, 3 in some order, and axis0 is 0 if a is quantised.
    Wraps: ggml_permute.
    """
    cdef bint in_range = 0 <= axis0 < 4 and 0 <= axis1 < 4 and 0 <= axis2 < 4 and 0 <= axis3 < 4
    if not in_range or 1 << axis0 | 1 << axis1 | 1 << axis2 | 1 << axis3 != 15:
        raise bad_value("permute", f"{axis0}, {axis1}, {axis2}, {axis3} is not a permutation of 0, 1, 2, 3")
    if axis0 != 0 and c.ggml_blck_size(a.ptr().type) > 1:
        raise bad_shape("permute", "the rows of a quantised a must stay", ("a", a))
    return result(ctx, c.ggml_permute(ctx.room(1), a.ptr(), axis0, axis1, axis2, axis3), a)


def transpose(Context ctx not None, Tensor a not None):
    """Return a view of a, which must not be quantised, with ne0 and ne1 exchanged.  Wraps: ggml_transpose."""
    if c.ggml_blck_size(a.ptr().type) > 1:
        raise bad_shape("transpose", "the rows of a quantised a must stay", ("a", a))
    return result(ctx, c.ggml_transpose(ctx.room(1), a.ptr()), a)
