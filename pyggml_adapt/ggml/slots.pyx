"""Slots: leaves of a graph that can be pointed at other tensors' data without building the graph again."""

from libc.stdlib cimport calloc, free, malloc

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor, check_idle, point_view, reach, root_of, uses_changed
from pyggml_adapt.ggml.graph cimport CGraph, homes_of, memory_of, written_roots

from pyggml_adapt.errors import BackendError, DTypeError, ShapeError

cdef size_t n_bindings = 0  # of any Slots, ever
_signatures = {}  # one object for each signature, so that tables compare by identity


cdef c.ggml_tensor * check_source(Tensor tensor) except NULL:
    """Return the pointer if a slot can point at the tensor's data."""
    cdef c.ggml_tensor * t = tensor.with_data()
    cdef Context home = tensor.ctx.home(root_of(t))
    if home.slots is not None and <size_t> root_of(t) in home.slots:
        raise BackendError(f"tensor {tensor.name!r} is a slot, or a view of one: what it shows can change")
    if not c.ggml_is_contiguous(t):
        raise ShapeError(f"tensor {tensor.name!r} is not contiguous: a slot cannot point at it")
    return t


cdef list find_readonly(c.ggml_backend_buffer ** buffers, Py_ssize_t n, list owners):
    """Return which of n buffers are read-only mappings."""
    cdef Py_ssize_t i
    cdef dict known = {}
    found = []
    for i in range(n):
        if <size_t> buffers[i] not in known:
            known[<size_t> buffers[i]] = any([(<Owner> owner).owns_readonly(buffers[i]) for owner in owners])
        if known[<size_t> buffers[i]]:
            found.append(i)
    return found


cdef class _Binding(Owner):
    """What the slots of a graph point at now; the graph's Context depends on it."""

    cdef bint _is_open(self) noexcept:
        return True


cdef class TensorTable:
    """What slots point at: one allocated tensor for each slot, in the slots' order, and the factors of scale nodes.

    tensors: contiguous Tensors that have data; they and their buffers stay alive with the table.
    Raises: ClosedError if a tensor has no data, ShapeError if one is not contiguous, BackendError for a slot.
    """

    def __cinit__(self, tensors, scales=()):
        cdef Py_ssize_t i
        cdef Tensor tensor
        cdef c.ggml_tensor * t
        self.tensors = tuple(tensors)
        self.scales = tuple([<float> each for each in scales])
        self.n = len(self.tensors)
        self._data = <void **> calloc(self.n + 1, sizeof(void *))
        self._buffers = <c.ggml_backend_buffer **> calloc(self.n + 1, sizeof(void *))
        if self._data == NULL or self._buffers == NULL:
            raise MemoryError
        owners = set()
        for i in range(self.n):
            tensor = <Tensor?> self.tensors[i]
            t = check_source(tensor)
            self._data[i] = t.data
            self._buffers[i] = tensor.buffer()
            owners.add(tensor.ctx)
        self._owners = owners
        self._readonly = frozenset(find_readonly(self._buffers, self.n, reach(list(owners))))
        signature = (len(self.scales), *[(each.type, each.ne) for each in self.tensors])
        self.signature = _signatures.setdefault(signature, signature)

    def __dealloc__(self):
        free(self._data)
        free(self._buffers)

    def __len__(self):
        return self.n


cdef class Slots:
    """Leaves of one graph whose data is elsewhere, and can be exchanged without building the graph again.

    ggml keeps addresses in tensors, so a graph computes with other weights as soon as its leaves, and the views of
    them, point at other memory of the same type and shape.  It keeps a scale node's factor in the node likewise.
    """

    def __cinit__(self, CGraph graph not None):
        self.graph = graph
        self._tensors = []
        self._scales = []
        self._binding = _Binding.__new__(_Binding)
        graph.ctx.depend_on(self._binding)

    def __dealloc__(self):
        free(self._slots)
        free(self._views)

    def add(self, Tensor source not None):
        """Return a new leaf with the type, shape and name of `source`, pointing at its data.

        Raises: ClosedError if the source has no data, ShapeError if it is not contiguous, BackendError for a slot, and
        after seal().
        """
        cdef c.ggml_tensor * s = check_source(source)
        if self._slots != NULL:
            raise BackendError("Slots.add: the slots are sealed")
        cdef Tensor leaf = self.graph.ctx.new_tensor(source.type, source.ne, source.name)
        leaf._ptr.data = s.data
        leaf._ptr.buffer = source.buffer()
        self._binding.depend_on(source.ctx)
        if self.graph.ctx.slots is None:
            self.graph.ctx.slots = set()
        self.graph.ctx.slots.add(<size_t> leaf._ptr)
        self._tensors.append((leaf, source))
        return leaf

    def add_scale(self, Tensor node not None):
        """Return `node`, made by ops.scale: its factor can be exchanged too.

        Raises: ShapeError if it is another op's, or another graph's; BackendError after seal().
        """
        cdef c.ggml_tensor * t = node.ptr()
        if t.op != c.GGML_OP_SCALE or node.ctx is not self.graph.ctx:
            raise ShapeError(f"Slots.add_scale: {node!r} is not a scale node of this graph")
        if self._slots != NULL:
            raise BackendError("Slots.add_scale: the slots are sealed")
        self._scales.append(node)
        return node

    def seal(self):
        """Record the slots and their views, once the graph is complete and allocated, and bind them to their sources.

        From here on the graph's Context keeps only the bound table's tensors alive.
        Raises: BackendError when called twice.
        """
        cdef Py_ssize_t i
        cdef int k, n_nodes = c.ggml_graph_n_nodes(self.graph.ptr())
        cdef c.ggml_tensor * t
        if self._slots != NULL:
            raise BackendError("Slots.seal: the slots are sealed already")
        reach([self.graph.ctx])
        self._homes = homes_of(self.graph)
        self._n_cleared = self.graph._n_cleared
        sources = [source for _, source in self._tensors]
        self.table = TensorTable(sources, [(<float *> (<Tensor> node)._ptr.op_params)[0] for node in self._scales])
        self._n_nodes = n_nodes
        self.n = len(self._tensors)
        self._slots = <c.ggml_tensor **> malloc((self.n + 1) * sizeof(void *))
        self._views = <c.ggml_tensor **> malloc((n_nodes + 1) * sizeof(void *))
        if self._slots == NULL or self._views == NULL:
            raise MemoryError
        roots = set()
        for i in range(self.n):
            self._slots[i] = (<Tensor> self._tensors[i][0])._ptr
            roots.add(<size_t> self._slots[i])
        written = written_roots(self.graph)
        self._written = frozenset([i for i in range(self.n) if <size_t> self._slots[i] in written])
        for k in range(n_nodes):
            t = c.ggml_graph_node(self.graph._ptr, k)
            if t.view_src != NULL and <size_t> t.view_src in roots:
                self._views[self.n_views] = t
                self.n_views += 1
        self._tensors = [leaf for leaf, _ in self._tensors]
        self._binding._uses = self.table._owners
        uses_changed()

    def bind(self, TensorTable table not None):
        """Point the slots at the tensors of `table`, if they do not point there already.

        Raises: ShapeError if a type or shape differs from the slot's, BusyError while the graph computes, BackendError
        before seal() or if the graph has changed since; DTypeError if the graph would write into a read-only mapping,
        ShapeError if into memory of its nodes, ClosedError if the graph writes and what it computes with was closed.
        """
        cdef Py_ssize_t i
        if table is self.table:
            return
        if (self._slots == NULL or c.ggml_graph_n_nodes(self.graph.ptr()) != self._n_nodes
                or self.graph._n_cleared != self._n_cleared):
            raise BackendError("Slots.bind: the slots are not sealed yet, or the graph has changed since")
        check_idle(self.graph.ctx)
        for home in self._homes:
            (<Context> home).check()
        if table.signature is not self.table.signature:
            raise ShapeError(f"Slots.bind: the tensors differ in type or shape from the slots: "
                             f"{self._first_difference(table)}")
        if table._readonly and not self._written.isdisjoint(table._readonly):
            names = [table.tensors[i].name for i in self._written & table._readonly]
            raise DTypeError(f"Slots.bind: tensor {names[0]!r} is in a read-only mapping, and the graph writes into it")
        if self._written:
            self._check_apart(table)
        for i in range(len(self._scales)):
            (<float *> (<Tensor> self._scales[i])._ptr.op_params)[0] = table.scales[i]
        for i in range(self.n):
            self._slots[i].data = table._data[i]
            self._slots[i].buffer = table._buffers[i]
        for i in range(self.n_views):
            point_view(self._views[i])
        self.table = table
        self._binding._uses = table._owners
        uses_changed()
        if self._written:
            self.graph._written_in = None
        self._announce()

    cdef int _check_apart(self, TensorTable table) except -1:
        """Check that what would be written is not in memory that the graph's nodes are computed in."""
        cdef size_t start, end, first, last
        cdef Py_ssize_t i
        now, self._binding._uses = self._binding._uses, table._owners  # what is bound now may be closed
        try:
            reach([self.graph.ctx])
        finally:
            self._binding._uses = now
        memory = memory_of(self.graph)
        for i in self._written:
            start = <size_t> table._data[i]
            end = start + c.ggml_nbytes(self._slots[i])
            for first, last in memory:
                if start < last and first < end:
                    raise ShapeError(f"Slots.bind: tensor {table.tensors[i].name!r} is in memory of the graph's nodes, "
                                     f"and the graph writes into it")
        return 0

    cdef int _announce(self) except -1:
        """Let other graphs that show the slots look again."""
        global n_bindings
        cdef bint known = self.graph._last_bind == self.graph.ctx.last_bind
        n_bindings += 1
        self.graph.ctx.last_bind = n_bindings
        if known:
            self.graph._last_bind = n_bindings
        return 0

    def _first_difference(self, TensorTable table):
        if table.n != self.n:
            return f"{table.n} tensors for {self.n} slots"
        for slot, tensor in zip(self._tensors, table.tensors):
            if (slot.type, slot.ne) != (tensor.type, tensor.ne):
                return f"{tensor!r} for {slot!r}"
        return f"{len(table.scales)} factors for {len(self._scales)} scale nodes"

    def __len__(self):
        return len(self._tensors)
