"""What every op does: wraps ggml's result, and checks the preconditions of builders and CPU kernels.

ggml ends the process when an op's precondition fails, and its kernels check less than they need.
"""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport MAX_ELEMENTS, Context, Tensor, count, reach

from pyggml_adapt.errors import DTypeError, ShapeError
from pyggml_adapt.ggml.enums import Type


cdef inline int keep(Context ctx, Tensor operand) except -1:
    if operand.ctx is not ctx:
        ctx.depend_on(operand.ctx)
        if operand._ptr.op == c.GGML_OP_NONE:
            ctx.n_foreign += 1
        else:
            reach([operand.ctx])
            seen = set()
            count([<size_t> operand._ptr], seen)
            ctx.n_foreign += len(seen)
    return 0


cdef Tensor result(Context ctx, c.ggml_tensor * t, Tensor a, Tensor b=None, Tensor d=None, Tensor e=None,
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


cdef object bad_shape(str op, str why, tuple operands):
    """Return an error with the operands' shapes.  operands: names and Tensors, in turns, None for one not given."""
    shapes = ", ".join([f"{operands[i]} {list((<Tensor> operands[i + 1]).ne)}"
                        for i in range(0, len(operands), 2) if operands[i + 1] is not None])
    return ShapeError(f"{op}: {why} ({shapes})")


cdef object bad_type(str op, str why, tuple operands):
    """Return an error with the operands' types; as bad_shape()."""
    types = ", ".join([f"{operands[i]} {(<Tensor> operands[i + 1]).type.name}"
                       for i in range(0, len(operands), 2) if operands[i + 1] is not None])
    return DTypeError(f"{op}: {why} ({types})")


cdef object bad_value(str op, str why):
    return ShapeError(f"{op}: {why}")


cdef str type_name(c.ggml_type type):
    return Type(<int> type).name


cdef c.ggml_type type_of(object type) except? c.GGML_TYPE_COUNT:
    """Return the type of this name or number.  Raises: ValueError if ggml has none such."""
    return <c.ggml_type> <int> (type if isinstance(type, Type) else Type(type))


cdef bint is_weight(c.ggml_tensor * t) noexcept nogil:
    """Return whether kernels can read t's type: not integers, nor the types of activations inside matmul."""
    if t.type == c.GGML_TYPE_Q8_1 or t.type == c.GGML_TYPE_Q8_K:
        return False
    return is_float(t) or t.type == c.GGML_TYPE_BF16 or c.ggml_is_quantized(t.type)


cdef bint is_writable(c.ggml_type type) noexcept nogil:
    """Return whether kernels can convert F32 to a floating-point or quantised type; some need an imatrix."""
    if (type == c.GGML_TYPE_IQ2_XXS or type == c.GGML_TYPE_IQ2_XS or type == c.GGML_TYPE_IQ3_XXS
            or type == c.GGML_TYPE_IQ1_S or type == c.GGML_TYPE_IQ3_S or type == c.GGML_TYPE_IQ2_S
            or type == c.GGML_TYPE_IQ1_M or type == c.GGML_TYPE_Q8_1 or type == c.GGML_TYPE_Q8_K):
        return False
    return (type == c.GGML_TYPE_F32 or type == c.GGML_TYPE_F16 or type == c.GGML_TYPE_BF16
            or c.ggml_is_quantized(type))


cdef int keep_apart(c.ggml_tensor * t, Tensor operand) except -1:
    """Let ggml not put t where an operand is that the kernel still reads when it has begun to write."""
    cdef c.ggml_tensor * src = operand.ptr()
    if src.op != c.GGML_OP_NONE and c.ggml_are_same_shape(t, src):
        operand.set_output()
    return 0


cdef int check_rows(str op, Tensor a) except -1:
    """Check that a is F32 with contiguous rows, as the row-wise ops need."""
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", ("a", a))
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", ("a", a))
    return 0


cdef int check_even_rows(str op, Tensor a) except -1:
    """Check that a is F32 with contiguous rows at one distance."""
    check_rows(op, a)
    if not has_even_rows(a.ptr()):
        raise bad_shape(op, "the rows of a must lie at one distance", ("a", a))
    return 0


cdef int check_size(str op, double n_elements, operands) except -1:
    """Check that a result can have so many elements."""
    if n_elements > MAX_ELEMENTS:
        raise bad_shape(op, "the result is too large", operands)
    return 0


cdef int check_blocks(str op, c.ggml_type type, int64_t ne0, Tensor a) except -1:
    if ne0 % c.ggml_blck_size(type):
        raise bad_shape(op, f"ne0 = {ne0} is not a multiple of {type_name(type)}'s block size", ("a", a))
    return 0


cdef int check_weights(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, operands) except -1:
    """Check what mul_mat and its kin need of a matrix and the rows that it is multiplied with."""
    if pa.ne[0] != pb.ne[0]:
        raise bad_shape(op, "ne0 differs", operands)
    if pa.nb[0] > pa.nb[1] or not has_rows(pa):
        raise bad_shape(op, "the first operand must not be transposed", operands)
    if not has_rows(pb):
        raise bad_shape(op, "the rows of the second operand must be contiguous", operands)
    if not is_weight(pa):
        raise bad_type(op, "the first operand must be of a floating-point or quantised type", operands)
    if not (is_float(pb) or pb.type == c.GGML_TYPE_BF16):
        raise bad_type(op, "the second operand must be F32, F16 or BF16", operands)
    return 0


cdef int check_counts(str op, Tensor a) except -1:
    if not fits(a.ptr()):
        raise bad_shape(op, "a kernel cannot count so many elements in a row, or so many rows", ("a", a))
    return 0


cdef int check_floats(str op, Tensor a, bint f16, bint bf16) except -1:
    """Check that a is F32, or F16 or BF16 if kernels take these, with contiguous rows."""
    cdef c.ggml_tensor * pa = a.ptr()
    if (pa.type != c.GGML_TYPE_F32 and not (f16 and pa.type == c.GGML_TYPE_F16)
            and not (bf16 and pa.type == c.GGML_TYPE_BF16)):
        types = "F32, F16 or BF16" if f16 and bf16 else "F32 or F16" if f16 else "F32 or BF16" if bf16 else "F32"
        raise bad_type(op, f"a must be {types}", ("a", a))
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", ("a", a))
    return check_counts(op, a)


cdef int check_even_floats(str op, Tensor a, bint f16, bint bf16) except -1:
    """Check that a is as check_floats wants it, with rows at one distance."""
    check_floats(op, a, f16, bf16)
    if not has_even_rows(a.ptr()):
        raise bad_shape(op, "the rows of a must lie at one distance", ("a", a))
    return 0


cdef int check_inplace(str op, Tensor a) except -1:
    """Check that no two elements of a share memory: which result would be left there, is a race between threads."""
    cdef c.ggml_tensor * pa = a.ptr()
    cdef size_t end = c.ggml_type_size(pa.type)  # of the dimensions with smaller strides, from the first element on
    cdef int k, next, done = 0
    if c.ggml_nelements(pa) == 0:
        return 0
    for _ in range(4):
        next = -1
        for k in range(4):
            if not done >> k & 1 and (next < 0 or pa.nb[k] < pa.nb[next]):
                next = k
        done |= 1 << next
        if pa.ne[next] > (c.ggml_blck_size(pa.type) if next == 0 else 1):
            if pa.nb[next] < end:
                raise bad_shape(op, "elements of a share memory: it cannot be written in place", ("a", a))
            end += (pa.ne[next] // (c.ggml_blck_size(pa.type) if next == 0 else 1) - 1) * pa.nb[next]
    return 0


cdef Tensor elementwise(str op, unary_op call, Context ctx, Tensor a):
    """Return a new tensor, made by an op that kernels have for elements of F32, F16 and BF16."""
    check_floats(op, a, True, True)
    return result(ctx, call(ctx.room(1), a.ptr()), a)


cdef Tensor elementwise_inplace(str op, unary_op call, Context ctx, Tensor a):
    check_inplace(op, a)
    return elementwise(op, call, ctx, a)
