"""Plans: a graph prepared to be computed on the CPU over and over."""

cimport cython

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Owner, reach, vacate
from pyggml_adapt.ggml.graph cimport CGraph, raise_status

from pyggml_adapt.errors import AllocError, BackendError


@cython.final
cdef class GraphPlan(Owner):
    """Own what a CPU backend needs to compute a graph as it is now: work memory, and the division over threads.

    Raises: BackendError if the backend is none of the CPU; as CGraph.compute.
    Wraps: ggml_backend_graph_plan_create, ggml_backend_graph_plan_free.
    """

    cdef c.ggml_backend_graph_plan_t _plan
    cdef c.ggml_backend_t _handle  # frees the plan: ggml asks for a backend, which may be closed before
    cdef readonly Backend backend
    cdef readonly CGraph graph
    cdef int _n_cleared, _n_nodes

    def __cinit__(self, Backend backend not None, CGraph graph not None):
        cdef c.ggml_cgraph * g = graph.ptr()
        if backend.threadpool is None or backend.ptr() == NULL:
            raise BackendError(f"{backend.name} has no graph plans: only CPU backends have")
        graph.check_nodes_idle()
        graph._check_supported(backend, reach([graph.ctx, backend]))
        self.backend, self.graph = backend, graph
        self._n_cleared, self._n_nodes = graph._n_cleared, graph.n_nodes
        self._handle = c.ggml_backend_dev_init(backend.device.ptr(), NULL)
        if self._handle == NULL:
            raise AllocError("ggml_backend_dev_init failed")
        self._plan = c.ggml_backend_graph_plan_create(backend._ptr, g)
        if self._plan == NULL:
            raise AllocError("ggml_backend_graph_plan_create failed")
        self.depend_on(backend)
        self.depend_on(graph.ctx)

    def __dealloc__(self):
        self._release()

    cdef bint _is_open(self) noexcept:
        return self._plan != NULL

    cdef void _release(self) noexcept:
        if self._plan != NULL:
            c.ggml_backend_graph_plan_free(self._handle, self._plan)
            self._plan = NULL
        c.ggml_backend_free(self._handle)
        self._handle = NULL

    def compute(self):
        """Compute the graph.  Releases the GIL.

        Raises: as CGraph.compute; BackendError if the graph has changed since.
        Wraps: ggml_backend_graph_plan_compute.
        """
        cdef c.ggml_status status
        cdef CGraph graph = self.graph
        cdef Backend backend = self.backend
        reach([self])
        if graph._n_cleared != self._n_cleared or graph.n_nodes != self._n_nodes:
            raise BackendError("GraphPlan.compute: the graph has changed since the plan was made")
        cdef list owners = graph.begin(backend, [self])
        try:
            before = backend.threadpool.enter()
            try:
                graph.lend(graph._indices)
                with nogil:
                    status = c.ggml_backend_graph_plan_compute(backend._ptr, self._plan)
            finally:
                graph.restore(graph._indices)
                backend.threadpool.leave(before)
        finally:
            vacate(owners)
        raise_status(graph, status, "graph plan compute")
