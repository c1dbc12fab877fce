# The memory of a graph's nodes; graph.pyx includes this.

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

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        return self._buffers is not None and <size_t> buffer in self._buffers

    def alloc_graph(self, CGraph graph not None):
        """Allocate every node and input of `graph` that has no data.

        Raises: AllocError when there is not enough memory, BackendError for a second graph, ClosedError if an operand
        from another Context has no data, ShapeError if all that has no data yet is empty.
        Wraps: ggml_gallocr_alloc_graph.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        cdef bint ok
        self.check()
        if self._served:
            raise BackendError("alloc_graph: this allocator serves a graph already")
        prepare(graph)
        self._served = True
        waiting = without_data(graph)
        # with the GIL: nobody can close what the graph uses meanwhile; of no nodes ggml makes a set without memory, and
        # a graph of as many as the reserved one it would lay out as that
        ok = not graph._members() or (not self._reserved or c.ggml_gallocr_reserve(self._ptr, g)) and (
            c.ggml_gallocr_alloc_graph(self._ptr, g))
        if not ok:
            raise AllocError(f"no memory for the compute buffer of a graph of {graph.n_nodes} nodes: {last_log()}")
        self._buffers = buffers_of(waiting)
        record_order(self, graph, waiting)
        graph.ctx.depend_on(self)

    def reserve(self, CGraph graph not None):
        """Allocate the memory that `graph` needs, but none of its tensors: alloc_graph() of one not larger is quick.

        Raises: as alloc_graph().
        Wraps: ggml_gallocr_reserve.
        """
        cdef c.ggml_cgraph * g = graph.ptr()
        self.check()
        if self._served:
            raise BackendError("reserve: this allocator serves a graph already")
        prepare(graph)
        self._reserved = True
        if graph._members() and not c.ggml_gallocr_reserve(self._ptr, g):
            raise AllocError(f"no memory for the compute buffer of a graph of {graph.n_nodes} nodes: {last_log()}")

    @property
    def nbytes(self):
        """Return the bytes that were allocated.  Wraps: ggml_gallocr_get_buffer_size."""
        self.check()
        return c.ggml_gallocr_get_buffer_size(self._ptr, 0)
