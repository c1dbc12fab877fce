"""One function per ggml op: each returns a new Tensor in `ctx`, to be computed by a graph.

ggml ends the process when an op's precondition fails; each is checked here first and raised as ShapeError or
DTypeError.  Operands may live in other contexts; these then stay alive with `ctx`.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport MAX_ELEMENTS, Context, Tensor, count, read_ne

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml.enums import Type


cdef inline Tensor result(Context ctx, c.ggml_tensor * t, Tensor a, Tensor b=None, Tensor d=None, Tensor e=None,
                          Tensor f=None):
    """Return t as a Tensor of ctx, which then keeps its operands' contexts alive."""
    keep(ctx, a)
    if b is not None:
        keep(ctx, b)
    if d is not None:
        keep(ctx, d)
    if e is not None:
        keep(ctx, e)
    if f is not None:
        keep(ctx, f)
    return ctx.wrap(t)


cdef inline int keep(Context ctx, Tensor operand) except -1:
    if operand.ctx is not ctx:
        ctx.depend_on(operand.ctx)
        if operand._ptr.op == c.GGML_OP_NONE:
            ctx.n_foreign += 1
        else:
            seen = set()
            count([<size_t> operand._ptr], seen)
            ctx.n_foreign += len(seen)
    return 0


include "ops_checks.pxi"


ctypedef c.ggml_tensor * (*binary_op)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *)


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


def sum_rows(Context ctx not None, Tensor a not None):
    """Return the sums along ne0, F32 [1, a.ne1, a.ne2, a.ne3].  Wraps: ggml_sum_rows."""
    check_rows("sum_rows", a)
    return result(ctx, c.ggml_sum_rows(ctx.room(1), a.ptr()), a)


def concat(Context ctx not None, Tensor a not None, Tensor b not None, int dim):
    """Return a followed by b along dimension dim (0 to 3).

    Raises: ShapeError if another dimension differs, DTypeError if the types do.
    Wraps: ggml_concat.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    if not 0 <= dim < c.GGML_MAX_DIMS:
        raise ShapeError(f"concat: dim {dim} is not 0 to 3")
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


include "ops_activations.pxi"


def mul_mat(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return b times a-transposed as F32 [a.ne1, b.ne1, b.ne2, b.ne3].

    a: weights [k, m, ...], not transposed.  b: activations [k, n, ...], F32, or F16 or BF16 if a is; contiguous rows.
    Raises: ShapeError if k differs or b is not a multiple of a in ne2/ne3.
    Wraps: ggml_mul_mat.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = [("a", a), ("b", b)]
    check_weights("mul_mat", pa, pb, operands)
    if pa.ne[2] == 0 or pa.ne[3] == 0 or pb.ne[2] % pa.ne[2] or pb.ne[3] % pa.ne[3]:
        raise bad_shape("mul_mat", "b is not a multiple of a in ne2 and ne3", operands)
    check_size("mul_mat", <double> pa.ne[1] * pb.ne[1] * pb.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_mul_mat(ctx.room(1), pa, pb), a, b)


def mul_mat_set_prec_f32(Tensor a not None):
    """Return a, the result of mul_mat or flash_attn_ext, to be accumulated in F32.  Wraps: ggml_prec_set_acc."""
    if not c.ggml_prec_set_acc(a.ptr(), c.GGML_PREC_F32):
        raise ShapeError(f"mul_mat_set_prec_f32: the op {a.op} has no such setting")
    return a


def mul_mat_set_hadamard(Tensor a not None):
    """Return a, a result of mul_mat whose first operand is a Hadamard matrix; its data is then not read.

    Raises: ShapeError unless that is square with a power of two rows.
    Wraps: ggml_mul_mat_set_hint.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.op != c.GGML_OP_MUL_MAT:
        raise ShapeError(f"mul_mat_set_hadamard: {a.op} is not MUL_MAT")
    cdef int64_t n = pa.src[0].ne[0]
    if n != pa.ne[0] or n < 1 or n & (n - 1):
        raise ShapeError(f"mul_mat_set_hadamard: {[n, pa.ne[0]]} is not square with a power of two rows")
    if not is_float(pa.src[1]):
        raise DTypeError("mul_mat_set_hadamard: the second operand of mul_mat must be F32 or F16")
    c.ggml_mul_mat_set_hint(a.ptr(), c.GGML_HINT_SRC0_IS_HADAMARD)
    return a


def mul_mat_id(Context ctx not None, Tensor as_ not None, Tensor b not None, Tensor ids not None):
    """Return, for each token, b times the transposed matrices that ids names, F32 [m, n_ids, n_tokens].

    as_: experts' weights [k, m, n_expert].  b: F32 [k, n_ids or 1, n_tokens].  ids: I32 [n_ids, n_tokens], each from 0
    to n_expert - 1 (checked when the graph is computed, if they are an input).
    Raises: ShapeError if these do not match.
    Wraps: ggml_mul_mat_id.
    """
    cdef c.ggml_tensor * pa = as_.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = [("as", as_), ("b", b), ("ids", ids)]
    check_weights("mul_mat_id", pa, pb, operands)
    if pi.type != c.GGML_TYPE_I32 or pb.type != c.GGML_TYPE_F32:
        raise bad_type("mul_mat_id", "b must be F32, ids I32", operands)
    if pa.ne[2] == 0 or pa.ne[3] != 1 or pb.ne[3] != 1 or pi.ne[2] != 1 or pi.ne[3] != 1:
        raise bad_shape("mul_mat_id", "as and b have three dimensions, ids two", operands)
    if pi.ne[1] != pb.ne[2] or pb.ne[1] == 0 or pi.ne[0] % pb.ne[1]:
        raise bad_shape("mul_mat_id", "ids must have a list for each token of b", operands)
    check_size("mul_mat_id", <double> pa.ne[1] * pi.ne[0] * pb.ne[2], operands)
    return result(ctx, c.ggml_mul_mat_id(ctx.room(1), pa, pb, pi), as_, b, ids)


def add_id(Context ctx not None, Tensor a not None, Tensor b not None, Tensor ids not None):
    """Return a with row ids[i, j] of b added to a[:, i, j].

    a: F32 [n, n_ids, n_tokens].  b: F32 [n, n_expert].  ids: I32 [n_ids, n_tokens].
    Raises: ShapeError if these do not match.
    Wraps: ggml_add_id.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = [("a", a), ("b", b), ("ids", ids)]
    if pi.type != c.GGML_TYPE_I32 or pa.type != c.GGML_TYPE_F32 or pb.type != c.GGML_TYPE_F32:
        raise bad_type("add_id", "a and b must be F32, ids I32", operands)
    if pa.ne[0] != pb.ne[0] or pa.ne[1] != pi.ne[0] or pa.ne[2] != pi.ne[1] or pb.ne[1] == 0:
        raise bad_shape("add_id", "shapes do not match", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("add_id", "the rows of a and b must be contiguous", operands)
    return result(ctx, c.ggml_add_id(ctx.room(1), pa, pb, pi), a, b, ids)


def cast(Context ctx not None, Tensor a not None, type):
    """Return a converted to `type`, shape of a, contiguous.

    Raises: DTypeError unless floating-point becomes floating-point or quantised, quantised becomes F32, or F32 and I32
    become each other.
    Wraps: ggml_cast.
    """
    cdef int t = Type(type)
    check_cast(a.ptr(), <c.ggml_type> t, a)
    return result(ctx, c.ggml_cast(ctx.room(1), a.ptr(), <c.ggml_type> t), a)


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
        raise ShapeError(f"permute: {axis0}, {axis1}, {axis2}, {axis3} is not a permutation of 0, 1, 2, 3")
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


include "ops_attention.pxi"
