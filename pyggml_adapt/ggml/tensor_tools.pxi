# What Tensor uses; context.pyx includes this before tensor.pxi.

cdef int n_dims(c.ggml_tensor * t) noexcept:
    """Return the number of dimensions up to the last that is not 1; ggml_n_dims takes an empty one for absent."""
    cdef int n = c.GGML_MAX_DIMS
    while n > 1 and t.ne[n - 1] == 1:
        n -= 1
    return n


cdef struct Export:  # what a buffer that a tensor gave away needs until it comes back
    PyObject * owner  # of the memory
    Py_ssize_t shape[4]
    Py_ssize_t strides[4]


cdef object spread(size_t size, size_t n, size_t stride):
    """Return the bytes from the first of n pieces of `size` bytes to behind the last, without overflow."""
    return (int(n) - 1) * int(stride) + int(size)


cdef void describe(Export * export, c.ggml_tensor * t, bint as_bytes) noexcept:
    """Fill in shape and strides in NumPy's order; of quantised types and BF16 those of their bytes."""
    cdef int i, k, n = n_dims(t)
    for i in range(n):
        k = n - 1 - i
        export.shape[i], export.strides[i] = t.ne[k], t.nb[k]
    if as_bytes:
        export.shape[n - 1], export.strides[n - 1] = c.ggml_row_size(t.type, t.ne[0]), 1


def _no_rows(Tensor tensor):
    return f"tensor {tensor.name!r} of type {tensor.type.name} has no contiguous rows; use ops.cont first"


cdef char * format_of(bytes code) noexcept:
    """Return the code of a buffer's elements, of bytes for None; it lives as long as the module."""
    for each in _FORMATS.values():
        if each == code:
            return each
    return b"B"


cdef bint grant(Py_buffer * view, int flags) noexcept:
    """Return whether the buffer is as contiguous as was asked for; take away what was not asked for."""
    cdef bint strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES
    if (flags & PyBUF_ANY_CONTIGUOUS) == PyBUF_ANY_CONTIGUOUS:
        if not PyBuffer_IsContiguous(view, b"A"):
            return False
    elif (flags & PyBUF_F_CONTIGUOUS) == PyBUF_F_CONTIGUOUS:
        if not PyBuffer_IsContiguous(view, b"F"):
            return False
    elif not strides or (flags & PyBUF_C_CONTIGUOUS) == PyBUF_C_CONTIGUOUS:
        if not PyBuffer_IsContiguous(view, b"C"):
            return False
    if not strides:
        view.strides = NULL
    if not flags & PyBUF_ND:
        view.shape = NULL
    if not flags & PyBUF_FORMAT:
        view.format = NULL
    return True


cdef int copy_2d(Tensor tensor, data, size_t offset, size_t size, size_t n, size_t stride_tensor, size_t stride_data,
                 bint into) except -1:
    """Copy n pieces of a buffer into a tensor, or the other way, see Tensor.set_2d() and get_2d()."""
    cdef Py_buffer view
    cdef c.ggml_tensor * t
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE if into else PyBUF_WRITABLE)
    try:
        held = acquire([tensor.ctx])
        try:
            t = tensor.range(0, 0)
            for have, end, what in ((tensor.nbytes, int(offset) + spread(size, n, stride_tensor), "the tensor"),
                                    (view.len, spread(size, n, stride_data), "the buffer")):
                if n and end > have:
                    raise ShapeError(f"tensor {tensor.name!r}: {n} pieces end at byte {end} of {have} of {what}")
            if n > 1 and (stride_tensor < size or stride_data < size):
                raise ShapeError(f"tensor {tensor.name!r}: pieces of {size} bytes overlap, {stride_tensor} and "
                                 f"{stride_data} bytes apart")
            if size == 0:
                return 0  # ggml would count n pieces of nothing
            if into:
                tensor.check_writable(held)
            with nogil:
                if into:
                    c.ggml_backend_tensor_set_2d(t, view.buf, offset, size, n, stride_tensor, stride_data)
                else:
                    c.ggml_backend_tensor_get_2d(t, view.buf, offset, size, n, stride_tensor, stride_data)
        finally:
            release(held)
    finally:
        PyBuffer_Release(&view)
    return 0


cdef bytes name_bytes(str name):
    """Return a name as ggml has it: UTF-8, which ends at a NUL."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError as exc:
        raise ParameterError(f"tensor name {name!r} is no UTF-8") from exc
    if b"\0" in encoded:
        raise ParameterError(f"tensor name {name!r} has a NUL")
    return encoded


cdef str place_of(Tensor tensor):
    """Return where the data is, as the end of repr()."""
    cdef c.ggml_tensor * t = tensor._ptr
    cdef c.ggml_backend_buffer * memory = t.buffer if t.view_src == NULL else t.view_src.buffer
    if t.data == NULL or memory == NULL:
        return ", no data"
    try:
        owners = reach([tensor.ctx])
    except ClosedError:
        return ", data closed"
    readonly = any([(<Owner> owner).owns_readonly(memory) for owner in owners])
    name = (<bytes> c.ggml_backend_buft_name(c.ggml_backend_buffer_get_type(memory))).decode()
    return f", {tensor.nbytes} bytes of {name}{', read-only' if readonly else ''}"


cdef Context home_of(Tensor a, Tensor b):
    """Return the context that the result of an operator lives in: of the one that is computed, else the left one's."""
    if a.ctx is b.ctx or a.ptr().op != c.GGML_OP_NONE or b.ptr().op == c.GGML_OP_NONE:
        return a.ctx
    return b.ctx


def _larger_first(Tensor a, Tensor b):
    """Return a and b, or b and a if only a can be broadcast."""
    return (a, b) if c.ggml_can_repeat(b.ptr(), a.ptr()) or not c.ggml_can_repeat(a.ptr(), b.ptr()) else (b, a)


def _ops():
    """Return the module of ops, which knows this one."""
    from pyggml_adapt.ggml import ops

    return ops
