from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor


cdef class CGraph:
    cdef c.ggml_cgraph * _ptr
    cdef readonly Context ctx
    cdef readonly int size
    cdef object _supported_by, _sched
    cdef list _indices
    cdef c.ggml_cgraph * ptr(self) except NULL
    cdef Tensor _wrap(self, c.ggml_tensor * t)
    cdef int _check_node(self, Backend backend, c.ggml_tensor * t, list owners) except -1
    cdef int _check_supported(self, Backend backend, list owners) except -1
    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *


cdef class GAllocr(Owner):
    cdef c.ggml_gallocr_t _ptr
    cdef bint _served


cdef class Sched(Owner):
    cdef c.ggml_backend_sched_t _ptr
    cdef readonly list backends
    cdef readonly int graph_size
    cdef list _indices
    cdef bint _served
    cdef int _n_nodes
    cdef int _check_supported(self, CGraph graph) except -1


cdef class _Binding(Owner):
    pass


cdef class TensorTable:
    cdef readonly list tensors, scales
    cdef readonly object signature
    cdef Py_ssize_t n
    cdef void ** _data
    cdef c.ggml_backend_buffer ** _buffers
    cdef set _owners


cdef class Slots:
    cdef readonly CGraph graph
    cdef readonly TensorTable table
    cdef list _tensors, _scales
    cdef _Binding _binding
    cdef Py_ssize_t n, n_views
    cdef int _n_nodes
    cdef c.ggml_tensor ** _slots
    cdef c.ggml_tensor ** _views
