"""Graphs, what allocates and computes them, and slots: leaves that can be pointed at other tensors' data."""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free, malloc

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.backend cimport Backend, BufferType
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor, acquire, count, reach, release
from pyggml_adapt.ggml.status cimport check

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, DTypeError, IndexRangeError, ShapeError,
)
from pyggml_adapt.ggml.status import last_log


include "graph_checks.pxi"


cdef class CGraph:
    """Borrow a graph that lives in a Context: the nodes to compute, in order.

    size: the most nodes, and the most leaves, that it can take, up to 32768.
    Raises: AllocError if the Context has no room, see Context.size_for.
    Wraps: ggml_new_graph_custom.
    """

    def __cinit__(self, Context ctx not None, int size=2048):
        check_size(size)
        if c.ggml_used_mem(ctx.ptr()) + c.ggml_graph_overhead_custom(size, False) > ctx.mem_size:
            raise AllocError(f"Context of {ctx.mem_size} bytes has no room for a graph of {size} nodes")
        self.ctx = ctx
        self.size = size
        self._ptr = c.ggml_new_graph_custom(ctx.ptr(), size, False)

    cdef c.ggml_cgraph * ptr(self) except NULL:
        self.ctx.ptr()
        return self._ptr

    def expand(self, Tensor tensor not None):
        """Add `tensor` and everything that it is computed from, unless they are in the graph already.

        Raises: AllocError if the graph is too small.
        Wraps: ggml_build_forward_expand.
        """
        cdef c.ggml_tensor * t = tensor.ptr()
        if tensor.ctx is not self.ctx:
            raise ShapeError(f"expand: tensor {tensor.name!r} belongs to another Context than the graph")
        self.ptr()
        check_idle(self.ctx)
        reach([self.ctx])
        if self.ctx.n_tensors + self.ctx.n_foreign > <size_t> self.size:
            seen = {<size_t> t}
            n_leaves = count(nodes_of(self) + [<size_t> t], seen)
            if max(n_leaves, len(seen) - n_leaves) > self.size:
                raise AllocError(f"a graph of {self.size} nodes is too small for {tensor.name!r} and its operands")
        self._supported_by = None
        c.ggml_build_forward_expand(self._ptr, t)
        return tensor

    @property
    def n_nodes(self):
        """Return how many nodes it has.  Wraps: ggml_graph_n_nodes."""
        return c.ggml_graph_n_nodes(self.ptr())

    def node(self, int i):
        """Return node i; negative counts from the end.

        Raises: IndexError.  Wraps: ggml_graph_node.
        """
        cdef int n = c.ggml_graph_n_nodes(self.ptr())
        if not -n <= i < n:
            raise IndexError(f"node {i} of a graph of {n} nodes")
        return self._wrap(c.ggml_graph_node(self._ptr, i))

    def tensor(self, str name not None):
        """Return the node or leaf with this name, or None.  Wraps: ggml_graph_get_tensor."""
        reach([self.ctx])
        cdef c.ggml_tensor * t = c.ggml_graph_get_tensor(self.ptr(), name.encode())
        return None if t == NULL else self._wrap(t)

    cdef Tensor _wrap(self, c.ggml_tensor * t):
        return self.ctx.home(t).wrap(t)

    cdef int _check_node(self, Backend backend, c.ggml_tensor * t, list owners) except -1:
        """Raise unless the node and its operands have data, writable where it must be, and the backend has the op."""
        cdef c.ggml_tensor * src
        cdef int k
        if not c.ggml_backend_supports_op(backend.ptr(), t):
            raise BackendError(f"{backend.name} cannot compute {self._wrap(t)!r} "
                               f"from {[self._wrap(t.src[k]) for k in range(c.GGML_MAX_SRC) if t.src[k]]}")
        for k in range(c.GGML_MAX_SRC + 1):
            src = t.src[k] if k < c.GGML_MAX_SRC else t
            if src != NULL and src.data == NULL and c.ggml_nbytes(src):
                raise ClosedError(f"tensor {self._wrap(src).name!r} is not allocated: use GAllocr or Sched first")
        if t.op == c.GGML_OP_SET_ROWS:
            for owner in owners:
                if (<Owner> owner).owns_readonly(t.view_src.buffer):
                    raise DTypeError(f"set_rows: tensor {self._wrap(t.view_src).name!r} is in a read-only mapping")
        return 0

    cdef int _check_supported(self, Backend backend, list owners) except -1:
        """Raise unless the backend can compute every node; remembered until the graph grows."""
        cdef int i
        if self._supported_by is backend:
            return 0
        for i in range(c.ggml_graph_n_nodes(self._ptr)):
            self._check_node(backend, c.ggml_graph_node(self._ptr, i), owners)
        self._indices = find_indices(self)
        self._supported_by = backend
        return 0

    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *:
        """Compute, and leave the bytes of `result` in the buffer `out`."""
        cdef Py_buffer view
        cdef c.ggml_tensor * t
        cdef void * own
        cdef c.ggml_status status
        cdef int last = c.ggml_graph_n_nodes(self._ptr) - 1
        cdef bint at_once
        if result.ctx is not self.ctx:
            raise ShapeError(f"compute: tensor {result.name!r} belongs to another Context than the graph")
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            t = result.range(0, 0)
            own = t.data
            if <size_t> view.len != c.ggml_nbytes(t):
                raise ShapeError(f"compute: {view.len} bytes for tensor {result.name!r} of {c.ggml_nbytes(t)}")
            # of the last node no other reads, so a CPU can as well write it elsewhere; device memory goes by address
            at_once = (backend._pool != NULL and t.view_src == NULL
                       and last >= 0 and t == c.ggml_graph_node(self._ptr, last))
            if at_once:
                t.data = view.buf
            with nogil:
                status = c.ggml_backend_graph_compute(backend._ptr, self._ptr)
                t.data = own
                if not at_once and status == c.GGML_STATUS_SUCCESS:
                    c.ggml_backend_tensor_get(t, view.buf, 0, view.len)
        finally:
            PyBuffer_Release(&view)
        return status

    def compute(self, Backend backend not None, Tensor result=None, out=None):
        """Compute every node.  Releases the GIL.

        result, out: a contiguous tensor, and the writable contiguous buffer that its bytes are wanted in; of the last
        node they are not copied but computed there.
        Raises: ShapeError if `out` has another size or `result` another Context; ClosedError if an owner of a tensor
        was closed, BackendError if the backend cannot compute a node, IndexRangeError if an input picks a row or expert
        that is not there, BusyError if another thread computes with the backend or the graph, ComputeAborted if the
        backend's abort flag was set.
        Wraps: ggml_backend_graph_compute.
        """
        cdef c.ggml_cgraph * graph = self.ptr()
        cdef c.ggml_backend_t b = backend.ptr()
        cdef c.ggml_status status
        cdef list owners = [self.ctx, backend]
        check_idle(self.ctx)
        check_idle(backend)
        owners = acquire(owners)
        try:
            self._check_supported(backend, owners)
            check_indices(self, self._indices)
            if result is not None:
                status = self._compute_into(backend, result, out)
            else:
                with nogil:
                    status = c.ggml_backend_graph_compute(b, graph)
        finally:
            release(owners)
        check(status, "graph compute")

    def __repr__(self):
        return f"<CGraph of {self.n_nodes} nodes>"


cdef class GAllocr(Owner):
    """Own the memory of the nodes of one graph.

    One allocator serves one graph: ggml's takes a tensor that has data for allocated, so an allocator that moved on
    to another graph would leave the first one's nodes dangling.
    Wraps: ggml_gallocr_new, ggml_gallocr_free.
    """

    def __cinit__(self, BufferType buffer_type not None):
        self._ptr = c.ggml_gallocr_new(buffer_type.ptr())
        if self._ptr == NULL:
            raise AllocError("ggml_gallocr_new failed")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_gallocr_free(self._ptr)
            self._ptr = NULL

    def alloc_graph(self, CGraph graph not None):
        """Allocate every node and input of `graph` that has no data.

        Raises: AllocError when there is not enough memory, BackendError for a second graph, ClosedError if an operand
        from another Context has no data.
        Wraps: ggml_gallocr_alloc_graph.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef bint ok
        self.check()
        if self._served:
            raise BackendError("alloc_graph: this allocator serves a graph already")
        check_idle(graph.ctx)
        reach([graph.ctx])
        check_foreign(graph)
        check_not_empty(graph)
        self._served = True
        ok = c.ggml_gallocr_alloc_graph(self._ptr, g)  # with the GIL: nobody can close what the graph uses meanwhile
        if not ok:
            raise AllocError(f"no memory for the compute buffer of a graph of {graph.n_nodes} nodes: {last_log()}")
        graph.ctx.depend_on(self)

    @property
    def nbytes(self):
        """Return the bytes that were allocated.  Wraps: ggml_gallocr_get_buffer_size."""
        self.check()
        return c.ggml_gallocr_get_buffer_size(self._ptr, 0)


cdef class Sched(Owner):
    """Own the allocation and execution of graphs over several backends; the last must be a CPU's.

    One Sched serves one graph, as one GAllocr does.  graph_size: the most nodes and leaves of it, together.
    Wraps: ggml_backend_sched_new, ggml_backend_sched_free.
    """

    def __cinit__(self, backends, int graph_size=2048):
        cdef c.ggml_backend_t ptrs[16]
        check_size(graph_size)
        self.graph_size = graph_size
        self.backends = list(backends)
        if not 1 <= len(self.backends) <= 16:
            raise BackendError(f"Sched: {len(self.backends)} backends, not 1 to 16")
        for i, backend in enumerate(self.backends):
            ptrs[i] = (<Backend?> backend).ptr()
            self.depend_on(backend)
        if (<Backend> self.backends[-1]).device.backend_name != "CPU":
            raise BackendError("Sched: the last backend must be a CPU backend")
        self._ptr = c.ggml_backend_sched_new(ptrs, NULL, len(self.backends), graph_size, False, True)
        if self._ptr == NULL:
            raise AllocError("ggml_backend_sched_new failed")

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        if self._ptr != NULL:
            c.ggml_backend_sched_free(self._ptr)
            self._ptr = NULL

    def alloc_graph(self, CGraph graph not None):
        """Divide `graph` over the backends and allocate it.

        Raises: AllocError when there is not enough memory or the graph is larger than graph_size, BackendError for a
        second graph or a node that no backend can compute, ClosedError if an operand from another Context has no data.
        Wraps: ggml_backend_sched_alloc_graph.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef bint ok
        if self._served:
            raise BackendError("alloc_graph: this scheduler serves a graph already")
        check_idle(graph.ctx)
        reach([graph.ctx, self])
        check_foreign(graph)
        check_not_empty(graph)
        seen = set()
        count(nodes_of(graph), seen)
        if len(seen) > self.graph_size:
            raise AllocError(f"a graph of {len(seen)} nodes and leaves for a scheduler of {self.graph_size}")
        self._check_supported(graph)
        self._served = True
        self._indices = find_indices(graph)
        ok = c.ggml_backend_sched_alloc_graph(self._ptr, g)  # with the GIL, as GAllocr's
        if not ok:
            raise AllocError(f"no memory for a graph of {graph.n_nodes} nodes: {last_log()}")
        graph.ctx.depend_on(self)
        graph._sched = self
        self._n_nodes = graph.n_nodes

    cdef int _check_supported(self, CGraph graph) except -1:
        cdef c.ggml_tensor * t
        cdef int i
        for i in range(c.ggml_graph_n_nodes(graph._ptr)):
            t = c.ggml_graph_node(graph._ptr, i)
            for backend in self.backends:
                if c.ggml_backend_supports_op((<Backend> backend).ptr(), t):
                    break
            else:
                raise BackendError(f"no backend of the scheduler can compute {graph._wrap(t)!r}")
        return 0

    def compute(self, CGraph graph not None):
        """Compute a graph that alloc_graph allocated.  Releases the GIL.

        Raises: as CGraph.compute.
        Wraps: ggml_backend_sched_graph_compute.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef c.ggml_status status
        cdef list owners = [graph.ctx, self]
        self.check()
        if graph._sched is not self or graph.n_nodes != self._n_nodes:
            raise BackendError("compute: the graph was not allocated by this scheduler, or has grown since")
        check_idle(graph.ctx)
        for backend in self.backends:
            check_idle(backend)
        owners = acquire(owners)
        try:
            check_indices(graph, self._indices)
            with nogil:
                status = c.ggml_backend_sched_graph_compute(self._ptr, g)
        finally:
            release(owners)
        check(status, "sched graph compute")

    @property
    def n_splits(self):
        """Return into how many parts the last graph was divided.  Wraps: ggml_backend_sched_get_n_splits."""
        self.check()
        return c.ggml_backend_sched_get_n_splits(self._ptr)


_signatures = {}  # one object for each signature, so that tables compare by identity


cdef class _Binding(Owner):
    """What the slots of a graph point at now; the graph's Context depends on it."""

    cdef bint _is_open(self) noexcept:
        return True


cdef class TensorTable:
    """What slots point at: one allocated tensor for each slot, in the slots' order, and the factors of scale nodes.

    tensors: contiguous Tensors that have data; they and their buffers stay alive with the table.
    Raises: ClosedError if a tensor has no data, ShapeError if one is not contiguous.
    """

    def __cinit__(self, tensors, scales=()):
        cdef Py_ssize_t i
        cdef Tensor tensor
        cdef c.ggml_tensor * t
        self.tensors = list(tensors)
        self.scales = [<float> each for each in scales]
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

        Raises: ClosedError if the source has no data, ShapeError if it is not contiguous, BackendError after seal().
        """
        cdef c.ggml_tensor * s = check_source(source)
        if self._slots != NULL:
            raise BackendError("Slots.add: the slots are sealed")
        cdef Tensor leaf = self.graph.ctx.new_tensor(source.type, source.ne, source.name)
        leaf._ptr.data = s.data
        leaf._ptr.buffer = source.buffer()
        self._binding.depend_on(source.ctx)
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
        for k in range(n_nodes):
            t = c.ggml_graph_node(self.graph._ptr, k)
            if t.view_src != NULL and <size_t> t.view_src in roots:
                self._views[self.n_views] = t
                self.n_views += 1
        self._tensors = [leaf for leaf, _ in self._tensors]
        self._binding._uses = self.table._owners

    def bind(self, TensorTable table not None):
        """Point the slots at the tensors of `table`, if they do not point there already.

        Raises: ShapeError if a type or shape differs from the slot's, BusyError while the graph computes, BackendError
        before seal() or if the graph has grown since.
        """
        cdef Py_ssize_t i
        cdef c.ggml_tensor * t
        if table is self.table:
            return
        if self._slots == NULL or c.ggml_graph_n_nodes(self.graph.ptr()) != self._n_nodes:
            raise BackendError("Slots.bind: the slots are not sealed yet, or the graph has grown since")
        check_idle(self.graph.ctx)
        if table.signature is not self.table.signature:
            raise ShapeError(f"Slots.bind: the tensors differ in type or shape from the slots: "
                             f"{self._first_difference(table)}")
        for i in range(len(self._scales)):
            (<float *> (<Tensor> self._scales[i])._ptr.op_params)[0] = table.scales[i]
        for i in range(self.n):
            self._slots[i].data = table._data[i]
            self._slots[i].buffer = table._buffers[i]
        for i in range(self.n_views):
            t = self._views[i]
            t.data = <char *> t.view_src.data + t.view_offs
            t.buffer = t.view_src.buffer
        self.table = table
        self._binding._uses = table._owners

    def _first_difference(self, TensorTable table):
        if table.n != self.n:
            return f"{table.n} tensors for {self.n} slots"
        for slot, tensor in zip(self._tensors, table.tensors):
            if (slot.type, slot.ne) != (tensor.type, tensor.ne):
                return f"{tensor!r} for {slot!r}"
        return f"{len(table.scales)} factors for {len(self._scales)} scale nodes"

    def __len__(self):
        return len(self._tensors)
