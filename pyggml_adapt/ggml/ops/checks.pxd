from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Tensor

cdef enum:
    MAX_INT = 0x7FFF0000  # what kernels hold in int, less what they add when they divide rows among threads

ctypedef c.ggml_tensor * (*unary_op)(c.ggml_context *, c.ggml_tensor *)
ctypedef c.ggml_tensor * (*binary_op)(c.ggml_context *, c.ggml_tensor *, c.ggml_tensor *)

cdef Tensor result(Context ctx, c.ggml_tensor * t, Tensor a, Tensor b=*, Tensor d=*, Tensor e=*, Tensor f=*)

cdef object bad_shape(str op, str why, tuple operands)
cdef object bad_type(str op, str why, tuple operands)

cdef object bad_value(str op, str why)
cdef str type_name(c.ggml_type type)
cdef c.ggml_type type_of(object type) except? c.GGML_TYPE_COUNT

cdef bint is_weight(c.ggml_tensor * t) noexcept nogil
cdef bint is_writable(c.ggml_type type) noexcept nogil
cdef int keep_apart(c.ggml_tensor * t, Tensor operand) except -1
cdef int check_rows(str op, Tensor a) except -1
cdef int check_even_rows(str op, Tensor a) except -1
cdef int check_counts(str op, Tensor a) except -1
cdef int check_floats(str op, Tensor a, bint f16, bint bf16) except -1
cdef int check_even_floats(str op, Tensor a, bint f16, bint bf16) except -1
cdef int check_inplace(str op, Tensor a) except -1
cdef Tensor elementwise(str op, unary_op call, Context ctx, Tensor a)
cdef Tensor elementwise_inplace(str op, unary_op call, Context ctx, Tensor a)
cdef int check_size(str op, double n_elements, operands) except -1
cdef int check_weights(str op, c.ggml_tensor * pa, c.ggml_tensor * pb, operands) except -1
cdef int check_blocks(str op, c.ggml_type type, int64_t ne0, Tensor a) except -1


cdef inline bint is_float(c.ggml_tensor * t) noexcept nogil:
    return t.type == c.GGML_TYPE_F32 or t.type == c.GGML_TYPE_F16


cdef inline bint has_rows(c.ggml_tensor * t) noexcept nogil:
    """Return whether each row is contiguous; ggml_is_contiguous_rows lets rows of one element pass."""
    return t.nb[0] == c.ggml_type_size(t.type)


cdef inline bint has_even_rows(c.ggml_tensor * t) noexcept nogil:
    """Return whether row r is at r * nb1: kernels rely on it; ggml_is_contiguous says so only if ne1 > 1."""
    return ((t.ne[2] == 1 or t.nb[2] == t.ne[1] * t.nb[1])
            and (t.ne[3] == 1 or t.nb[3] == t.ne[1] * t.ne[2] * t.nb[1]))


cdef inline bint fits(c.ggml_tensor * t) noexcept nogil:
    """Return whether kernels can count t's elements along each dimension, and its rows, with int."""
    cdef double n_rows = 1
    cdef int i
    if t == NULL:
        return True
    for i in range(4):
        n_rows *= t.ne[i] if i else 1
        if t.ne[i] > MAX_INT or n_rows > MAX_INT:
            return False
    return True


cdef inline bint is_packed(c.ggml_tensor * t) noexcept nogil:
    """Return whether each stride is the product of those before, also where ne is 1 and ggml does not look at it."""
    cdef size_t nb = c.ggml_type_size(t.type)
    cdef int i
    for i in range(4):
        if t.nb[i] != nb:
            return False
        nb *= t.ne[i] if i else t.ne[i] // c.ggml_blck_size(t.type)
    return True
