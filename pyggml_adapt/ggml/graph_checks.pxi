# What graph.pyx checks before ggml would abort, or use memory that another owner has freed.

cdef enum:
    MAX_NODES = 1 << 15  # of a graph: many times what a model has
    MAX_DEPTH = 1 << 11  # of ggml's recursion, 64 bytes a step: a thread's stack may have 256 KiB


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


cdef int check_room(Context ctx, int size, bint grads) except -1:
    if c.ggml_used_mem(ctx.ptr()) + c.ggml_graph_overhead_custom(size, grads) > ctx.mem_size:
        raise AllocError(f"Context of {ctx.mem_size} bytes has no room for a graph of {size} nodes")
    return 0


cdef object nodes_of(CGraph graph):
    """Return the addresses of the graph's nodes."""
    return [<size_t> c.ggml_graph_node(graph._ptr, i) for i in range(c.ggml_graph_n_nodes(graph._ptr))]


cdef int n_params_of(set addresses) noexcept:
    """Return how many are parameters, which are nodes of a graph even as leaves."""
    cdef size_t address
    cdef int n = 0
    for address in addresses:
        n += (<c.ggml_tensor *> address).flags & c.GGML_TENSOR_FLAG_PARAM != 0
    return n


cdef int check_data(CGraph graph, c.ggml_tensor * t) except -1:
    """Check that a tensor of the graph has data, which its owners must have been checked to have still."""
    if t.data == NULL or root_of(t).buffer == NULL:
        raise ClosedError(f"tensor {graph._wrap(t).name!r} is not allocated: use GAllocr or Sched first")
    return 0


cdef int check_result(CGraph graph, c.ggml_tensor * t, c.ggml_tensor * last) except -1:
    """Check that a result is there in the end: the memory of what lies between is used again."""
    if (t != last and root_of(t).op != c.GGML_OP_NONE
            and not (t.flags | root_of(t).flags) & c.GGML_TENSOR_FLAG_OUTPUT):
        raise ParameterError(f"compute: result {graph._wrap(t).name!r} is neither the last node nor an output, see "
                             f"Tensor.set_output()")
    return 0


cdef int check_not_empty(CGraph graph) except -1:
    """Check that there is something to allocate: ggml aborts when it finds only empty tensors."""
    cdef size_t address
    waiting = without_data(graph)
    for address in waiting:
        if c.ggml_nbytes(<c.ggml_tensor *> address):
            return 0
    if waiting:
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
    for address in graph._expanded or ():  # leaves that no node reads
        each = <c.ggml_tensor *> <size_t> address
        if each.data == NULL and each.view_src == NULL:
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
    count(graph._members(), seen)
    for address in seen:
        t = <c.ggml_tensor *> address
        if t.data == NULL and not graph.ctx.holds(t):
            raise ClosedError(f"tensor {(<bytes> t.name).decode('utf-8', 'replace')!r} of another Context has no data")
    return 0


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
    """Check that no node writes into a read-only mapping, which ends the process, nor into another node's memory."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * root
    cdef size_t address
    cdef set checked = set(), leaves = set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for address in written_by(t):
            root = <c.ggml_tensor *> address
            if root.op == c.GGML_OP_NONE and root.data != NULL:
                leaves.add(address)
            if root.buffer == NULL or <size_t> root.buffer in checked:
                continue
            for owner in owners:
                if (<Owner> owner).owns_readonly(root.buffer):
                    op = (<bytes> c.ggml_op_desc(t)).decode().lower()
                    raise DTypeError(f"{op}: tensor {graph._wrap(root).name!r} is in a read-only mapping")
            checked.add(<size_t> root.buffer)
    for address in leaves:
        check_apart(graph, <c.ggml_tensor *> address)
    graph._written, graph._written_in = list(leaves), None
    return 0


cdef list owners_of_data(list addresses, list owners):
    """Return those of the owners that own the memory that these tensors' data is in."""
    found = []
    buffers = buffers_of(addresses)
    for owner in owners:
        for buffer in buffers:
            if (<Owner> owner).owns(<c.ggml_backend_buffer *> <size_t> buffer):
                found.append(owner)
                break
    return found


cdef bint overlap(c.ggml_tensor * t, char * start, size_t nbytes) noexcept:
    """Return whether some of a tensor's data is among nbytes from start."""
    return t.data != NULL and <char *> t.data < start + nbytes and start < <char *> t.data + c.ggml_nbytes(t)


cdef int check_apart(CGraph graph, c.ggml_tensor * leaf) except -1:
    """Check that a leaf that is written does not lie in the memory of what is computed, as that of an array may."""
    cdef c.ggml_tensor * t
    cdef int i
    cdef set slots = graph.ctx.home(leaf).slots
    cdef bint anywhere = slots is not None and <size_t> leaf in slots
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        # what is in one buffer does not lie together, or one after the other, see Buffer.place; but where slots point
        if t.view_src == NULL and t.op != c.GGML_OP_NONE and (anywhere or t.buffer != leaf.buffer):
            if overlap(t, <char *> leaf.data, c.ggml_nbytes(leaf)):
                raise ShapeError(f"tensor {graph._wrap(leaf).name!r} is written, and lies in the memory of "
                                 f"{graph._wrap(t).name!r}, which is computed")
    return 0


cdef int record_order(Owner allocator, CGraph graph, list placed) except -1:
    """Remember what shares an allocator's memory, which is right for these nodes in this order."""
    cdef size_t address
    allocator.order = {address: i for i, address in enumerate(nodes_of(graph))}
    allocator.shared = {address for address in placed
                        if not (<c.ggml_tensor *> address).flags & c.GGML_TENSOR_FLAG_OUTPUT}
    return 0


cdef int check_order(CGraph graph, list owners) except -1:
    """Check that memory that nodes share is used as it was when an allocator laid it out, perhaps for another graph."""
    cdef c.ggml_tensor * t
    cdef Owner owner
    cdef int i, k, at, last
    for owner in owners:
        last = -1
        for i in range(c.ggml_graph_n_nodes(graph._ptr) if owner.order is not None else 0):
            at = owner.order.get(<size_t> c.ggml_graph_node(graph._ptr, i), last)
            if at < last:
                raise BackendError("the nodes of the graph are in another order than in the one that they were "
                                   "allocated with, whose memory they share")
            last = at
        for i in range(c.ggml_graph_n_nodes(graph._ptr) if last >= 0 else 0):
            t = c.ggml_graph_node(graph._ptr, i)
            for k in range(c.GGML_MAX_SRC if <size_t> t not in owner.order else 0):
                if t.src[k] != NULL and <size_t> root_of(t.src[k]) in owner.shared:
                    raise BackendError(f"{graph._wrap(t)!r} reads {graph._wrap(root_of(t.src[k])).name!r}, whose "
                                       f"memory is used again in the graph that it was allocated with: mark it with "
                                       f"Tensor.set_output() before")
    return 0


cdef int split_norms(CGraph graph) except -1:
    """Let ggml not compute a norm together with a product that is written over what the norm reads."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * product
    cdef int i
    for i in range(c.ggml_graph_n_nodes(graph._ptr) - 1):
        t, product = c.ggml_graph_node(graph._ptr, i), c.ggml_graph_node(graph._ptr, i + 1)
        if t.op == c.GGML_OP_RMS_NORM and product.op == c.GGML_OP_MUL and is_written_over(t.src[0], product):
            t.flags |= c.GGML_TENSOR_FLAG_OUTPUT
    return 0


cdef bint is_written_over(c.ggml_tensor * t, c.ggml_tensor * product) noexcept:
    """Return whether t is in the memory of a product, or may be before they are allocated, but for equal elements."""
    if product.data == NULL or t.data == NULL:
        return product.view_src != NULL
    return (overlap(t, <char *> product.data, c.ggml_nbytes(product))
            and (t.data != product.data or t.nb[1] != product.nb[1] or t.nb[2] != product.nb[2]
                 or t.nb[3] != product.nb[3]))


cdef int prepare(CGraph graph) except -1:
    """Check that an allocator can place what a graph has no memory for, and mark what has to stay there."""
    graph.check_nodes_idle()
    reach([graph.ctx])
    check_foreign(graph)
    check_not_empty(graph)
    return keep_params(graph)


cdef int keep_params(CGraph graph) except -1:
    """Let parameters that are allocated with the graph be there from the first node on, and until the next time."""
    cdef size_t address
    cdef c.ggml_tensor * t
    for address in without_data(graph):
        t = <c.ggml_tensor *> address
        if t.op == c.GGML_OP_NONE and t.flags & c.GGML_TENSOR_FLAG_PARAM:
            t.flags |= c.GGML_TENSOR_FLAG_INPUT | c.GGML_TENSOR_FLAG_OUTPUT
    return 0


cdef int point_views(CGraph graph) except -1:
    """Let each view that nodes use show where its tensor's data is now."""
    cdef int i
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        point_operands(c.ggml_graph_node(graph._ptr, i))
    return 0


cdef size_t last_bind_of(list owners, Context other) noexcept:
    """Return the number of the last binding of Slots of any Context among the owners, but of one."""
    cdef size_t last = 0
    for owner in owners:
        if isinstance(owner, Context) and owner is not other:
            last = max(last, (<Context> owner).last_bind)
    return last


cdef list memory_of(CGraph graph):
    """Return (start, end) of each buffer that nodes of the graph are computed in."""
    cdef c.ggml_tensor * t
    cdef int i
    found = set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        if t.op != c.GGML_OP_NONE and t.view_src == NULL and t.buffer != NULL:
            found.add((<size_t> c.ggml_backend_buffer_get_base(t.buffer),
                       <size_t> c.ggml_backend_buffer_get_base(t.buffer) + c.ggml_backend_buffer_get_size(t.buffer)))
    return list(found)


cdef list homes_of(CGraph graph):
    """Return the other Contexts that own what the graph computes."""
    cdef c.ggml_tensor * t
    cdef Context home = graph.ctx
    found = []
    for i in range(c.ggml_graph_n_nodes(graph._ptr) if graph.ctx.n_foreign else 0):
        t = c.ggml_graph_node(graph._ptr, i)
        if not home.holds(t):
            home = graph.ctx.home(t)
        if home is not graph.ctx and t.op != c.GGML_OP_NONE and home not in found:
            found.append(home)
    return found


cdef bint is_apart(c.ggml_tensor * t, Py_buffer * view, int depth) noexcept:
    """Return whether a node's result can go into a buffer: what it reads is not there.

    depth: 2, as ggml computes a normalisation and a product at once, reading the operands of the former.
    """
    cdef c.ggml_tensor * src
    cdef int k
    for k in range(c.GGML_MAX_SRC):
        src = t.src[k]
        if src != NULL and (overlap(src, <char *> view.buf, view.len)
                            or depth > 1 and not is_apart(src, view, depth - 1)):
            return False
    return True
