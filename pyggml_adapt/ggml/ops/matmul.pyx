"""Matrix products, of one matrix and of experts' matrices."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor
from pyggml_adapt.ggml.ops.checks cimport (
    bad_shape, bad_type, bad_value, check_size, check_weights, has_rows, is_float, result,
)


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
        raise bad_value("mul_mat_set_prec_f32", f"the op {a.op} has no such setting")
    return a


def mul_mat_set_hadamard(Tensor a not None):
    """Return a, a result of mul_mat whose first operand is a Hadamard matrix; its data is then not read.

    Raises: ShapeError unless that is square with a power of two rows.
    Wraps: ggml_mul_mat_set_hint.
    """
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.op != c.GGML_OP_MUL_MAT:
        raise bad_value("mul_mat_set_hadamard", f"{a.op} is not MUL_MAT")
    cdef int64_t n = pa.src[0].ne[0]
    if n != pa.ne[0] or n < 1 or n & (n - 1):
        raise bad_value("mul_mat_set_hadamard", f"{[n, pa.ne[0]]} is not square with a power of two rows")
    if not is_float(pa.src[1]):
        raise bad_type("mul_mat_set_hadamard", "the second operand of mul_mat must be F32 or F16", [("result", a)])
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
