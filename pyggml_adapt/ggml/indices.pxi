# The operands that pick rows or experts: ggml aborts on one out of range, or writes beyond.  graph.pyx includes this.

cdef c.ggml_tensor * indices_of(c.ggml_tensor * t, int * k, int64_t * bound) noexcept:
    """Return the operand that picks rows or experts, src[k], from 0 to bound - 1; NULL if there is none."""
    if t.op == c.GGML_OP_GET_ROWS:
        k[0], bound[0] = 1, t.src[0].ne[1]
    elif t.op == c.GGML_OP_SET_ROWS or t.op == c.GGML_OP_GET_ROWS_BACK:
        k[0], bound[0] = 1, t.ne[1]
    elif t.op == c.GGML_OP_MUL_MAT_ID:
        k[0], bound[0] = 2, t.src[0].ne[2]
    elif t.op == c.GGML_OP_ADD_ID:
        k[0], bound[0] = 2, t.src[1].ne[1]
    elif t.op == c.GGML_OP_SSM_SCAN:
        k[0], bound[0] = 6, t.src[0].ne[3]
    else:
        return NULL
    return t.src[k[0]]


cdef dict writers_of(CGraph graph):
    """Return {address of a tensor: number of nodes that write into its data}; of overlapping leaves, to each."""
    cdef c.ggml_tensor * t
    cdef c.ggml_tensor * src
    cdef size_t address
    cdef int i, k
    writers, leaves = {}, set()
    for i in range(c.ggml_graph_n_nodes(graph._ptr)):
        t = c.ggml_graph_node(graph._ptr, i)
        for address in written_by(t):
            writers[address] = writers.get(address, 0) + 1
        for k in range(c.GGML_MAX_SRC):
            src = t.src[k]
            if src != NULL and (src.type == c.GGML_TYPE_I32 or src.type == c.GGML_TYPE_I64):
                leaves.add(<size_t> root_of(src))
    for address in list(writers):
        t = <c.ggml_tensor *> address
        for other in leaves if t.op == c.GGML_OP_NONE else ():
            src = <c.ggml_tensor *> <size_t> other
            if src != t and src.op == c.GGML_OP_NONE and overlap(src, <char *> t.data, c.ggml_nbytes(t)):
                writers[other] = writers.get(other, 0) + 1
    return writers


cdef tuple trace(CGraph graph, c.ggml_tensor * t, int k, int64_t bound, dict writers):
    """Return (address of a node, j) if the indices t.src[k] are what the node's src[j] holds, a leaf or view of one.

    None if they need not be looked at, as they are in range whatever is computed.
    Raises: IndexRangeError if they are computed by what can pick more than bound rows.
    """
    cdef c.ggml_tensor * node = t
    cdef c.ggml_tensor * cur = t.src[k]
    cdef c.ggml_tensor * root
    while cur != NULL:
        root = root_of(cur)
        if root.op == c.GGML_OP_NONE and writers.get(<size_t> root, 0) == 0:
            return <size_t> node, k
        if is_view(cur):
            cur = cur.src[0]
            continue
        if writers.get(<size_t> root, 0) != 1 or cur.view_src != NULL and cur.op != c.GGML_OP_CPY:
            break  # changed in place by other nodes
        if cur.op in (c.GGML_OP_ARGSORT, c.GGML_OP_TOP_K, c.GGML_OP_ARGMAX):
            if max(cur.src[0].ne[0], 1) <= bound:
                return None
            break
        if cur.op not in (c.GGML_OP_CONT, c.GGML_OP_DUP, c.GGML_OP_CPY) or cur.src[0].type != cur.type:
            break
        node, k, cur = cur, 0, cur.src[0]
    cur = node.src[k] if cur == NULL else cur
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


cdef class Indices:
    """What the leaves of a graph pick rows and experts with.

    read() copies and checks them when a computation starts; between lend() and restore() nodes compute with the copies,
    so that nothing that happens to the leaves meanwhile can bring one out of range.
    """

    def __cinit__(self, CGraph graph not None):
        cdef c.ggml_tensor * t
        cdef int64_t bound
        cdef int i, k
        graph.ptr()
        uses, writers = [], None
        for i in range(c.ggml_graph_n_nodes(graph._ptr)):
            t = c.ggml_graph_node(graph._ptr, i)
            if indices_of(t, &k, &bound) != NULL and c.ggml_nelements(t.src[k]):
                if writers is None:
                    writers = writers_of(graph)
                use = trace(graph, t, k, bound, writers)
                if use is not None:
                    uses.append((*use, bound))
        self._record(uses)

    cdef int _record(self, list uses) except -1:
        """Make room for copies of the leaves, each once."""
        cdef c.ggml_tensor * leaf
        cdef Picked * picked
        cdef size_t nbytes
        cdef Py_ssize_t i
        cdef int d
        numbers = {}  # of each leaf, by address
        self._uses = <Use *> calloc(len(uses) + 1, sizeof(Use))
        self._picked = <Picked *> calloc(len(uses) + 1, sizeof(Picked))
        if self._uses == NULL or self._picked == NULL:
            raise MemoryError
        for i, (address, k, bound) in enumerate(uses):
            self._uses[i].node, self._uses[i].k = <c.ggml_tensor *> <size_t> address, k
            leaf = self._uses[i].node.src[self._uses[i].k]
            self._uses[i].picked = numbers.setdefault(<size_t> leaf, len(numbers))
            picked = &self._picked[self._uses[i].picked]
            picked.bound = min(bound, picked.bound) if picked.leaf != NULL else bound
            picked.leaf = leaf
        self._n_uses = len(uses)
        for i in range(len(numbers)):
            picked = &self._picked[i]
            picked.copy = picked.leaf[0]
            nbytes = c.ggml_type_size(picked.leaf.type)
            for d in range(c.GGML_MAX_DIMS):
                picked.copy.nb[d] = nbytes
                nbytes *= picked.leaf.ne[d]
            picked.copy.view_src, picked.copy.op = NULL, c.GGML_OP_NONE
            picked.copy.data = malloc(nbytes)
            if picked.copy.data == NULL:
                raise MemoryError
            self._n_picked = i + 1
        return 0

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self._n_picked):
            free(self._picked[i].copy.data)
        free(self._picked)
        free(self._uses)

    cdef int read(self, CGraph graph) except -1:
        """Copy what the leaves hold now, and check it.

        Raises: IndexRangeError for one that is out of range.
        """
        cdef Picked * picked
        cdef c.ggml_tensor * t
        cdef int64_t value, j
        cdef Py_ssize_t i
        cdef size_t at, size
        cdef bint contiguous
        for i in range(self._n_picked):
            picked = &self._picked[i]
            t = picked.leaf
            check_data(graph, t)
            picked.copy.buffer = root_of(t).buffer
            if not c.ggml_backend_buffer_is_host(picked.copy.buffer):
                continue  # on a device, whose kernels have checks of their own
            contiguous, size = c.ggml_is_contiguous(t), c.ggml_type_size(t.type)
            for j in range(c.ggml_nelements(t)):
                at = j * size if contiguous else offset_of(t, j)
                if size == 8:
                    value = (<volatile int64_t *> (<char *> t.data + at))[0]
                    (<int64_t *> picked.copy.data)[j] = value
                else:
                    value = (<volatile int32_t *> (<char *> t.data + at))[0]
                    (<int32_t *> picked.copy.data)[j] = <int32_t> value
                if value < 0 or value >= picked.bound:
                    raise IndexRangeError(f"tensor {graph._wrap(t).name!r} picks row {value} of {picked.bound}, "
                                          f"at position {j}")
        return 0

    cdef int lend(self) except -1:
        """Let the nodes compute with what was read; an operand that a scheduler has copied to a device stays."""
        cdef Picked * picked
        cdef Use * use
        cdef Py_ssize_t i
        for i in range(self._n_picked):
            put_in(&self._picked[i].copy, self._picked[i].leaf)
        for i in range(self._n_uses):
            use = &self._uses[i]
            picked = &self._picked[use.picked]
            if use.node.src[use.k] == picked.leaf and c.ggml_backend_buffer_is_host(picked.copy.buffer):
                use.node.src[use.k] = &picked.copy
        return 0

    cdef void restore(self) noexcept:
        cdef Picked * picked
        cdef Use * use
        cdef Py_ssize_t i
        for i in range(self._n_uses):
            use = &self._uses[i]
            picked = &self._picked[use.picked]
            if use.node.src[use.k] == &picked.copy:
                use.node.src[use.k] = picked.leaf
        for i in range(self._n_picked):
            take_out(&self._picked[i].copy)

    cdef void show_copies(self) noexcept:
        """Let the leaves show the copies' data until show_leaves(): a graph that is copied meanwhile computes with it.

        Views do not: ggml points them at what they are views of.
        """
        cdef Picked * picked
        cdef Py_ssize_t i
        for i in range(self._n_picked):
            picked = &self._picked[i]
            picked.data = picked.leaf.data
            if (picked.leaf.view_src == NULL and c.ggml_is_contiguous(picked.leaf)
                    and picked.leaf.buffer != NULL and c.ggml_backend_buffer_is_host(picked.leaf.buffer)):
                picked.leaf.data = picked.copy.data

    cdef void show_leaves(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self._n_picked):
            self._picked[i].leaf.data = self._picked[i].data
