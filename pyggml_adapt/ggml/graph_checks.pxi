# What graph.pyx checks before ggml would abort, or use memory that another owner has freed.

cdef enum:
    MAX_NODES = 1 << 15  # of a graph: ggml visits operands recursively, and a chain of more would exhaust the C stack


cdef int check_idle(Owner owner) except -1:
    """Check that no other thread computes with `owner`."""
    if owner._in_use:
        raise BusyError(f"{type(owner).__name__} is in use by a computation on another thread")
    return 0


cdef int check_backend_idle(Backend backend) except -1:
    """Check that no other thread computes with the backend, nor another backend with its threads."""
    check_idle(backend)
    if backend.threadpool is not None:
        check_idle(backend.threadpool)
    return 0


cdef int check_size(int size) except -1:
    if not 1 <= size <= MAX_NODES:
        raise ShapeError(f"a graph of {size} nodes, not 1 to {MAX_NODES}")
    return 0


cdef object nodes_of(CGraph graph):
    """Return the addresses of the graph's nodes."""
    return [<size_t> c.ggml_graph_node(graph._ptr, i) for i in range(c.ggml_graph_n_nodes(graph._ptr))]


cdef int check_data(CGraph graph, c.ggml_tensor * t) except -1:
    """Check that a tensor of the graph has data, which its owners must have been checked to have still."""
    if t.data == NULL or root_of(t).buffer == NULL:
        raise ClosedError(f"tensor {graph._wrap(t).name!r} is not allocated: use GAllocr or Sched first")
    return 0


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


cdef list without_data(CGraph graph):
    """Return the addresses of the nodes and leaves that have no data, views aside."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * each
    cdef int i, k
    found = []
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for k in range(c.GGML_MAX_SRC + 1):
            each = t.src[k] if k < c.GGML_MAX_SRC else t
            if each != NULL and each.data == NULL and each.view_src == NULL:
                found.append(<size_t> each)
    return found


cdef set buffers_of(list addresses):
    """Return the addresses of the buffers that these tensors' data is in."""
    return {<size_t> (<c.ggml_tensor *> <size_t> address).buffer for address in addresses}


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


cdef bint is_view(c.ggml_tensor * t) noexcept:
    """Return whether t only shows another tensor's data."""
    return t.op in (c.GGML_OP_VIEW, c.GGML_OP_RESHAPE, c.GGML_OP_PERMUTE, c.GGML_OP_TRANSPOSE)


cdef c.ggml_tensor * root_of(c.ggml_tensor * t) noexcept:
    """Return the tensor whose data t shows."""
    while t.view_src != NULL:
        t = t.view_src
    return t


cdef list written_by(c.ggml_tensor * t):
    """Return the addresses of the tensors whose data the node writes."""
    if t.op == c.GGML_OP_NONE or is_view(t):
        return []
    if t.op == c.GGML_OP_OPT_STEP_ADAMW:  # the moments, beside the parameters
        return [<size_t> root_of(t), <size_t> root_of(t.src[2]), <size_t> root_of(t.src[3])]
    return [<size_t> root_of(t)]


cdef set written_roots(CGraph graph):
    """Return the addresses of the tensors that the graph writes into."""
    found = set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        found.update(written_by(c.ggml_graph_node(graph._ptr, i)))
    return found


cdef int check_writable(CGraph graph, list owners) except -1:
    """Check that no node writes into a read-only mapping: the process would be ended."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * root
    cdef size_t address
    cdef set checked = set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for address in written_by(t):
            root = <c.ggml_tensor *> address
            if root.buffer == NULL or <size_t> root.buffer in checked:
                continue
            for owner in owners:
                if (<Owner> owner).owns_readonly(root.buffer):
                    op = (<bytes> c.ggml_op_desc(t)).decode().lower()
                    raise DTypeError(f"{op}: tensor {graph._wrap(root).name!r} is in a read-only mapping")
            checked.add(<size_t> root.buffer)
    return 0


cdef c.ggml_tensor * indices_of(c.ggml_tensor * t, int64_t * bound) noexcept:
    """Return the operand that picks rows or experts, from 0 to bound - 1, NULL if there is none."""
    if t.op == c.GGML_OP_GET_ROWS:
        bound[0] = t.src[0].ne[1]
        return t.src[1]
    if t.op == c.GGML_OP_SET_ROWS or t.op == c.GGML_OP_GET_ROWS_BACK:
        bound[0] = t.ne[1]
        return t.src[1]
    if t.op == c.GGML_OP_MUL_MAT_ID:
        bound[0] = t.src[0].ne[2]
        return t.src[2]
    if t.op == c.GGML_OP_ADD_ID:
        bound[0] = t.src[1].ne[1]
        return t.src[2]
    if t.op == c.GGML_OP_SSM_SCAN:
        bound[0] = t.src[0].ne[3]
        return t.src[6]
    return NULL


cdef list find_indices(CGraph graph):
    """Return (address, bound) of each leaf, or view of one, that picks rows or experts: all from 0 to bound - 1.

    Indices that are computed are left out if they are in range whatever is computed, and refused otherwise.
    """
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * ids
    cdef c.ggml_tensor * leaf
    cdef int64_t bound
    cdef dict bounds = {}
    writers = None
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        ids = indices_of(t, &bound)
        if ids == NULL or not c.ggml_nelements(ids):
            continue
        if writers is None:
            writers = writers_of(graph)
        leaf = trace(graph, t, ids, bound, writers)
        if leaf != NULL:
            bounds[<size_t> leaf] = min(bound, bounds.get(<size_t> leaf, bound))
    return list(bounds.items())


cdef dict writers_of(CGraph graph):
    """Return {address of a tensor: number of nodes that write into its data}; of overlapping leaves, to each."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * src
    cdef size_t address, start, end
    cdef int k
    writers, leaves = {}, set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for address in written_by(t):
            writers[address] = writers.get(address, 0) + 1
        for k in range(c.GGML_MAX_SRC):
            src = t.src[k]
            if src != NULL and (src.type == c.GGML_TYPE_I32 or src.type == c.GGML_TYPE_I64):
                src = root_of(src)
                if src.op == c.GGML_OP_NONE and src.data != NULL:
                    leaves.add(<size_t> src)
    for address in list(writers):
        t = <c.ggml_tensor *> address
        if t.op == c.GGML_OP_NONE and t.data != NULL:
            start, end = <size_t> t.data, <size_t> t.data + c.ggml_nbytes(t)
            for other in leaves:
                src = <c.ggml_tensor *> <size_t> other
                if src != t and <size_t> src.data < end and start < <size_t> src.data + c.ggml_nbytes(src):
                    writers[other] = writers.get(other, 0) + 1
    return writers


cdef c.ggml_tensor * trace(CGraph graph, c.ggml_tensor * t, c.ggml_tensor * ids, int64_t bound,
                           dict writers) except? NULL:
    """Return the leaf, or view of one, that the indices of node t are, NULL if they need not be looked at.

    Raises: IndexRangeError if they are computed by what can pick more than bound rows.
    """
    cdef c.ggml_tensor * cur = ids
    cdef c.ggml_tensor * root
    while True:
        root = root_of(cur)
        if root.op == c.GGML_OP_NONE and writers.get(<size_t> root, 0) == 0:
            return cur
        if is_view(cur):
            ids = cur.src[0]
        elif writers.get(<size_t> root, 0) != 1 or cur.view_src != NULL and cur.op != c.GGML_OP_CPY:
            break  # changed in place by other nodes
        elif cur.op in (c.GGML_OP_ARGSORT, c.GGML_OP_TOP_K, c.GGML_OP_ARGMAX):
            if max(cur.src[0].ne[0], 1) <= bound:
                return NULL
            break
        elif cur.op in (c.GGML_OP_CONT, c.GGML_OP_DUP, c.GGML_OP_CPY) and cur.src[0].type == cur.type:
            ids = cur.src[0]
        else:
            break
        if ids == NULL:
            break
        cur = ids
    op = (<bytes> c.ggml_op_desc(t)).decode().lower()
    raise IndexRangeError(f"{op}: the indices {graph._wrap(cur).name!r} are computed by "
                          f"{(<bytes> c.ggml_op_desc(cur)).decode()}, and may not be from 0 to {bound - 1}")


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
