"""Matrix products, of one matrix and of experts' matrices."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    MAX_INT, bad_shape, bad_type, bad_value, check_size, check_weights, fits, has_rows, is_float, is_weight, keep_apart,
    result,
)


cdef enum:
    MAX_TABLE = 1 << 29  # entries of mul_mat_id's table of rows by experts, 8 bytes each in the work buffer
    MAX_STRIDE = MAX_INT >> 5  # out_prod's kernel counts the bytes of 32 rows with int


def mul_mat(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return b times a-transposed as F32 [a.ne1, b.ne1, b.ne2, b.ne3].

    a: weights [k, m, ...], not transposed.  b: activations [k, n, ...], F32, or F16 or BF16 if a is; contiguous rows.
    Raises: ShapeError if k differs or b is not a multiple of a in ne2/ne3.
    Wraps: ggml_mul_mat.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    check_weights("mul_mat", pa, pb, operands)
    if pa.ne[2] == 0 or pa.ne[3] == 0 or pb.ne[2] % pa.ne[2] or pb.ne[3] % pa.ne[3]:
        raise bad_shape("mul_mat", "b is not a multiple of a in ne2 and ne3", operands)
    check_size("mul_mat", <double> pa.ne[1] * pb.ne[1] * pb.ne[2] * pb.ne[3], operands)
    return result(ctx, c.ggml_mul_mat(ctx.room(1), pa, pb), a, b)


cdef int check_prec(str op, int prec) except -1:
    if prec not in (c.GGML_PREC_UNDEFINED, c.GGML_PREC_F32, c.GGML_PREC_BF16, c.GGML_PREC_F16, c.GGML_PREC_Q8,
                    c.GGML_PREC_Q4):
        raise bad_value(op, f"{prec} is not a Prec")
    return 0


def prec_set_acc(Tensor a not None, int prec):
    """Return a, the result of mul_mat, mul_mat_id or flash_attn_ext, to be accumulated as precisely as `prec`, a Prec.

    Raises: ShapeError if a is another op's, or flash_attn_ext's and prec neither UNDEFINED nor F32.
    Wraps: ggml_prec_set_acc.
    """
    check_prec("prec_set_acc", prec)
    a.check_settable()
    if a.ptr().op == c.GGML_OP_FLASH_ATTN_EXT and prec != c.GGML_PREC_UNDEFINED and prec != c.GGML_PREC_F32:
        raise bad_value("prec_set_acc", "flash_attn_ext accumulates in F32 only")  # its kernel aborts
    if not c.ggml_prec_set_acc(a.ptr(), <c.ggml_prec> prec):
        raise bad_value("prec_set_acc", f"the op {a.op} has no such setting")
    return a


def prec_set_src(Tensor a not None, int prec, int idx):
    """Return a, the result of mul_mat or mul_mat_id, whose operand idx, 1, is to be read as precisely as `prec`.

    Raises: ShapeError if a is another op's, or the operand has no such setting.
    Wraps: ggml_prec_set_src.
    """
    check_prec("prec_set_src", prec)
    a.check_settable()
    if not 0 <= idx < c.GGML_MAX_SRC or not c.ggml_prec_set_src(a.ptr(), <c.ggml_prec> prec, idx):
        raise bad_value("prec_set_src", f"operand {idx} of the op {a.op} has no such setting")
    return a


def mul_mat_set_hint(Tensor a not None, int hint):
    """Return a, a result of mul_mat, of whose first operand `hint`, an OpHint, says what a kernel can make use of.

    SRC0_IS_HADAMARD: it is a Hadamard matrix divided by the root of its size; its data is then not read.
    Raises: ShapeError if a is another op's, or that operand is not square with a power of two rows; DTypeError unless
    the other is F32 or F16.
    Wraps: ggml_mul_mat_set_hint.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    if hint not in (c.GGML_HINT_NONE, c.GGML_HINT_SRC0_IS_HADAMARD):
        raise bad_value("mul_mat_set_hint", f"{hint} is not an OpHint")
    if pa.op != c.GGML_OP_MUL_MAT:
        raise bad_value("mul_mat_set_hint", f"{a.op} is not MUL_MAT")
    cdef int64_t n = pa.src[0].ne[0]
    a.check_settable()
    if hint == c.GGML_HINT_SRC0_IS_HADAMARD:
        if n != pa.ne[0] or n < 1 or n & (n - 1):
            raise bad_value("mul_mat_set_hint", f"{[n, pa.ne[0]]} is not square with a power of two rows")
        if not is_float(pa.src[1]):
            raise bad_type("mul_mat_set_hint", "the second operand of mul_mat must be F32 or F16", ("result", a))
    c.ggml_mul_mat_set_hint(pa, <c.ggml_op_hint> hint)
    return a


def mul_mat_id(Context ctx not None, Tensor as_ not None, Tensor b not None, Tensor ids not None):
    """Return, for each token, b times the transposed matrices that ids names, F32 [m, n_ids, n_tokens].

    as_: experts' weights [k, m, n_expert].  b: F32 [k, n_ids or 1, n_tokens], or F16 or BF16 if as_ is; if n_ids is a
    multiple of b.ne1, the rows of b take turns.  ids: I32 [n_ids, n_tokens], each from 0 to n_expert - 1 (checked when
    the graph is computed, if they are an input).
    Raises: ShapeError if these do not match, or n_expert * n_ids * n_tokens is more than 2^29.
    Wraps: ggml_mul_mat_id.
    """
    cdef c.ggml_tensor * pa = as_.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = ("as", as_, "b", b, "ids", ids)
    check_weights("mul_mat_id", pa, pb, operands)
    if pi.type != c.GGML_TYPE_I32 or not (pb.type == c.GGML_TYPE_F32 or pb.type == pa.type):
        raise bad_type("mul_mat_id", "b must be F32 or of the type of as, ids I32", operands)
    if pa.ne[2] == 0 or pa.ne[3] != 1 or pb.ne[3] != 1 or pi.ne[2] != 1 or pi.ne[3] != 1:
        raise bad_shape("mul_mat_id", "as and b have three dimensions, ids two", operands)
    if pi.ne[1] != pb.ne[2] or pb.ne[1] == 0 or pi.ne[0] % pb.ne[1]:
        raise bad_shape("mul_mat_id", "ids must have a list for each token of b", operands)
    if <double> pa.ne[2] * pi.ne[0] * pi.ne[1] > MAX_TABLE or not fits(pa):
        raise bad_shape("mul_mat_id", "too many experts and tokens at once", operands)
    check_size("mul_mat_id", <double> pa.ne[1] * pi.ne[0] * pb.ne[2], operands)
    return result(ctx, c.ggml_mul_mat_id(ctx.room(1), pa, pb, pi), as_, b, ids)


def add_id(Context ctx not None, Tensor a not None, Tensor b not None, Tensor ids not None):
    """Return a with row ids[i, j] of b added to a[:, i, j].

    a: F32 [n, n_ids, n_tokens, ...].  b: F32 [n, n_expert].  ids: I32 [n_ids, n_tokens], each from 0 to n_expert - 1
    (checked as mul_mat_id's).
    Raises: ShapeError if these do not match.
    Wraps: ggml_add_id.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    cdef c.ggml_tensor * pi = ids.ptr()
    operands = ("a", a, "b", b, "ids", ids)
    if pi.type != c.GGML_TYPE_I32 or pa.type != c.GGML_TYPE_F32 or pb.type != c.GGML_TYPE_F32:
        raise bad_type("add_id", "a and b must be F32, ids I32", operands)
    if (pa.ne[0] != pb.ne[0] or pa.ne[1] != pi.ne[0] or pa.ne[2] != pi.ne[1] or pb.ne[1] == 0
            or pb.ne[2] * pb.ne[3] != 1 or pi.ne[2] * pi.ne[3] != 1 or not fits(pa) or not fits(pb)):
        raise bad_shape("add_id", "shapes do not match", operands)
    if not has_rows(pa) or not has_rows(pb):
        raise bad_shape("add_id", "the rows of a and b must be contiguous", operands)
    cdef c.ggml_tensor * t = c.ggml_add_id(ctx.room(1), pa, pb, pi)
    keep_apart(t, b)
    return result(ctx, t, a, b, ids)


def out_prod(Context ctx not None, Tensor a not None, Tensor b not None):
    """Return the sum over ne1 of the products of a column of a with one of b, F32 [a.ne0, b.ne0, b.ne2, b.ne3].

    a: F32, F16 or quantised [m, k, ...], contiguous rows.  b: F32 [n, k, ...], of any strides.  An F32 a is broadcast
    over ne2 and ne3 of b.
    Raises: ShapeError if k differs, b is not a multiple of a in ne2/ne3, or a is not F32 and they differ there.
    Wraps: ggml_out_prod.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    if not is_weight(pa) or pa.type == c.GGML_TYPE_BF16 or pb.type != c.GGML_TYPE_F32:
        raise bad_type("out_prod", "a must be F32, F16 or quantised, b F32", operands)
    if (pa.ne[1] != pb.ne[1] or pa.ne[2] == 0 or pa.ne[3] == 0 or pb.ne[2] % pa.ne[2] or pb.ne[3] % pa.ne[3]
            or (pa.type != c.GGML_TYPE_F32 and (pa.ne[2] != pb.ne[2] or pa.ne[3] != pb.ne[3]))):
        raise bad_shape("out_prod", "shapes do not match", operands)
    if pa.nb[0] > pa.nb[1] or not has_rows(pa):
        raise bad_shape("out_prod", "a must not be transposed", operands)
    if pa.nb[1] > MAX_STRIDE or pb.nb[1] > MAX_STRIDE:
        raise bad_shape("out_prod", f"rows are more than {MAX_STRIDE} bytes apart", operands)
    if <double> pa.ne[0] * pb.ne[0] * pb.ne[2] * pb.ne[3] > MAX_INT:
        raise bad_shape("out_prod", "the result is too large", operands)
    return result(ctx, c.ggml_out_prod(ctx.room(1), pa, pb), a, b)


def solve_tri(Context ctx not None, Tensor a not None, Tensor b not None, bint left=True, bint lower=True,
              bint uni=False):
    """Return the x for which a times x is b, of lower triangular matrices a, F32, shape of b.

    a: F32 [n, n, ...]; what is above its diagonals is not read; a 0 on one gives what division by it gives.
    b: F32 [k, n, ...].  Both contiguous.  left, lower, uni: ggml has the default only.
    Raises: ShapeError if these do not match.
    Wraps: ggml_solve_tri.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    cdef c.ggml_tensor * pb = b.ptr()
    operands = ("a", a, "b", b)
    if not left or not lower or uni:
        raise bad_value("solve_tri", "ggml solves with lower triangular matrices on the left only, diagonals not ones")
    if pa.type != c.GGML_TYPE_F32 or pb.type != c.GGML_TYPE_F32:
        raise bad_type("solve_tri", "a and b must be F32", operands)
    if pa.ne[0] != pa.ne[1] or pa.ne[1] != pb.ne[1] or pa.ne[2] != pb.ne[2] or pa.ne[3] != pb.ne[3]:
        raise bad_shape("solve_tri", "a must be square, b have as many rows and matrices", operands)
    if not c.ggml_is_contiguous(pa) or not c.ggml_is_contiguous(pb):
        raise bad_shape("solve_tri", "a and b must be contiguous", operands)
    return result(ctx, c.ggml_solve_tri(ctx.room(1), pa, pb, left, lower, uni), a, b)
