# What ops.pyx checks: the preconditions of ggml's builders, and of its CPU kernels, which check less than they need.


cdef object bad_shape(str op, str why, operands):
    shapes = ", ".join(f"{name} {list((<Tensor> t).ne)}" for name, t in operands if t is not None)
    return ShapeError(f"{op}: {why} ({shapes})")


cdef object bad_type(str op, str why, operands):
    types = ", ".join(f"{name} {(<Tensor> t).type.name}" for name, t in operands if t is not None)
    return DTypeError(f"{op}: {why} ({types})")


cdef inline bint is_float(c.ggml_tensor * t) noexcept nogil:
    return t.type == c.GGML_TYPE_F32 or t.type == c.GGML_TYPE_F16


cdef inline bint is_weight(c.ggml_tensor * t) noexcept nogil:
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


cdef inline bint has_rows(c.ggml_tensor * t) noexcept nogil:
    """Return whether each row is contiguous; ggml_is_contiguous_rows lets rows of one element pass."""
    return t.nb[0] == c.ggml_type_size(t.type)


cdef inline bint has_even_rows(c.ggml_tensor * t) noexcept nogil:
    """Return whether row r is at r * nb1: kernels rely on it; ggml_is_contiguous says so only if ne1 > 1."""
    return ((t.ne[2] == 1 or t.nb[2] == t.ne[1] * t.nb[1])
            and (t.ne[3] == 1 or t.nb[3] == t.ne[1] * t.ne[2] * t.nb[1]))


cdef int check_rows(str op, Tensor a) except -1:
    """Check that a is F32 with contiguous rows, as the row-wise ops need."""
    cdef c.ggml_tensor * pa = a.ptr()
    if pa.type != c.GGML_TYPE_F32:
        raise bad_type(op, "a must be F32", [("a", a)])
    if not has_rows(pa):
        raise bad_shape(op, "the rows of a must be contiguous", [("a", a)])
    return 0


cdef int check_even_rows(str op, Tensor a) except -1:
    """Check that a is F32 with contiguous rows at one distance."""
    check_rows(op, a)
    if not has_even_rows(a.ptr()):
        raise bad_shape(op, "the rows of a must lie at one distance", [("a", a)])
    return 0


cdef int check_size(str op, double n_elements, operands) except -1:
    """Check that a result can have so many elements."""
    if n_elements > MAX_ELEMENTS:
        raise bad_shape(op, "the result is too large", operands)
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


cdef int check_blocks(str op, c.ggml_type type, int64_t ne0, Tensor a) except -1:
    if ne0 % c.ggml_blck_size(type):
        raise bad_shape(op, f"ne0 = {ne0} is not a multiple of {Type(<int> type).name}'s block size", [("a", a)])
    return 0


cdef int fill(int64_t * dims, str op, Tensor a, tuple ne) except -1:
    """Fill dims from ne, padded with ones, and check that it holds as many elements as a."""
    read_ne(dims, op, ne)
    if dims[0] * dims[1] * dims[2] * dims[3] != c.ggml_nelements(a.ptr()):
        raise bad_shape(op, f"{list(ne)} has another number of elements", [("a", a)])
    return check_blocks(op, a.ptr().type, dims[0], a)


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
        raise bad_type("cast", f"cannot convert to {Type(<int> type).name}", [("a", a)])
    if c.ggml_is_quantized(type) and not has_rows(pa):
        raise bad_shape("cast", "the rows of a must be contiguous", [("a", a)])
    return check_blocks("cast", type, pa.ne[0], a)
