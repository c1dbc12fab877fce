# What graph.pyx checks before ggml would abort, or use memory that another owner has freed.

cdef enum:
    MAX_NODES = 1 << 15  # of a graph: ggml visits operands recursively, and a chain of more would exhaust the C stack


cdef int check_idle(Owner owner) except -1:
    """Check that no other thread computes with `owner`."""
    if owner._in_use:
        raise BusyError(f"{type(owner).__name__} is in use by a computation on another thread")
    return 0


cdef int check_size(int size) except -1:
    if not 1 <= size <= MAX_NODES:
        raise ShapeError(f"a graph of {size} nodes, not 1 to {MAX_NODES}")
    return 0


cdef object nodes_of(CGraph graph):
    """Return the addresses of the graph's nodes."""
    return [<size_t> c.ggml_graph_node(graph._ptr, i) for i in range(c.ggml_graph_n_nodes(graph._ptr))]


cdef int check_not_empty(CGraph graph) except -1:
    """Check that there is something to allocate: ggml aborts when it finds only empty tensors."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * each
    cdef int i, k
    cdef bint found = False
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for k in range(c.GGML_MAX_SRC + 1):
            each = t.src[k] if k < c.GGML_MAX_SRC else t
            if each != NULL and each.data == NULL and each.view_src == NULL:
                if c.ggml_nbytes(each):
                    return 0
                found = True
    if found:
        raise ShapeError("alloc_graph: every tensor that has no data yet is empty")
    return 0


cdef int check_foreign(CGraph graph) except -1:
    """Check that every operand from another Context has data: else it would be allocated with the graph, and freed."""
    cdef c.ggml_tensor * t
    cdef size_t address
    if not graph.ctx.n_foreign:
        return 0
    seen = set()
    count(nodes_of(graph), seen)
    for address in seen:
        t = <c.ggml_tensor *> address
        if t.data == NULL and not graph.ctx.holds(t):
            raise ClosedError(f"tensor {(<bytes> t.name).decode('utf-8', 'replace')!r} of another Context has no data")
    return 0


cdef c.ggml_tensor * check_source(Tensor tensor) except NULL:
    """Return the pointer if a slot can point at the tensor's data."""
    cdef c.ggml_tensor * t = tensor.with_data()
    if not c.ggml_is_contiguous(t):
        raise ShapeError(f"tensor {tensor.name!r} is not contiguous: a slot cannot point at it")
    return t


cdef list find_indices(CGraph graph):
    """Return (address, bound) of each leaf, or view of one, that picks rows or experts: all from 0 to bound - 1."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * ids
    cdef int64_t bound
    cdef dict bounds = {}
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        if t.op == c.GGML_OP_GET_ROWS:
            ids, bound = t.src[1], t.src[0].ne[1]
        elif t.op == c.GGML_OP_SET_ROWS:
            ids, bound = t.src[1], t.ne[1]
        elif t.op == c.GGML_OP_MUL_MAT_ID:
            ids, bound = t.src[2], t.src[0].ne[2]
        elif t.op == c.GGML_OP_ADD_ID:
            ids, bound = t.src[2], t.src[1].ne[1]
        else:
            continue
        if (ids if ids.view_src == NULL else ids.view_src).op == c.GGML_OP_NONE:
            bounds[<size_t> ids] = min(bound, bounds.get(<size_t> ids, bound))
    return list(bounds.items())


cdef size_t offset_of(c.ggml_tensor * t, int64_t i) noexcept:
    """Return the byte at which element i of a tensor of any strides is."""
    cdef size_t at = 0
    cdef int k
    for k in range(c.GGML_MAX_DIMS):
        at += <size_t> (i % t.ne[k]) * t.nb[k]
        i //= t.ne[k]
    return at


cdef int check_indices(CGraph graph, list indices) except -1:
    """Check the values of the leaves that find_indices found: ggml aborts on one out of range, or writes beyond."""
    cdef c.ggml_tensor * t
    cdef size_t address
    cdef int64_t bound, value, i
    cdef size_t at, size
    cdef bint contiguous
    for address, bound in indices:
        t = <c.ggml_tensor *> address
        if not c.ggml_backend_buffer_is_host(t.buffer if t.view_src == NULL else t.view_src.buffer):
            continue  # on a device, whose kernels have checks of their own
        contiguous, size = c.ggml_is_contiguous(t), c.ggml_type_size(t.type)
        for i in range(c.ggml_nelements(t)):
            at = i * size if contiguous else offset_of(t, i)
            value = (<int64_t *> (<char *> t.data + at))[0] if size == 8 else (<int32_t *> (<char *> t.data + at))[0]
            if value < 0 or value >= bound:
                raise IndexRangeError(f"tensor {graph._wrap(t).name!r} picks row {value} of {bound}, at position {i}")
    return 0
