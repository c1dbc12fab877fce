cimport cython

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Owner
from pyggml_adapt.ggml.graph cimport CGraph, Indices


@cython.final
cdef class Sched(Owner):
    cdef c.ggml_backend_sched_t _ptr
    cdef readonly tuple backends
    cdef readonly int graph_size
    cdef Indices _indices
    cdef list _pending, _kept
    cdef set _buffers, _assigned, _members
    cdef object _split  # weak reference to the Context of the graph that was divided last
    cdef object _eval, _error
    cdef CGraph _showing
    cdef bint _served, _stopped, _waiting
    cdef int _n_nodes
    cdef int _check_supported(self, CGraph graph) except -1
    cdef int forget_layout(self) except -1
    cdef int _place_leaves(self, CGraph graph) except -1
    cdef int _place_leaf(self, c.ggml_tensor * t, Backend last) except -1
    cdef int _check_split(self, CGraph graph, str doing) except -1
    cdef list _check_compute(self, CGraph graph)
    cdef c.ggml_status _run(self, CGraph graph, bint wait) except *
    cdef int _end(self, CGraph graph, c.ggml_status status) except -1
    cdef int _ask(self, c.ggml_tensor * t, bint ask) noexcept
