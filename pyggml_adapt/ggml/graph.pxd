from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor


cdef int check_idle(Owner owner) except -1
cdef int check_backend_idle(Backend backend) except -1
cdef int check_size(int size) except -1
cdef object nodes_of(CGraph graph)
cdef int check_not_empty(CGraph graph) except -1
cdef list without_data(CGraph graph)
cdef set buffers_of(list addresses)
cdef int check_foreign(CGraph graph) except -1
cdef set written_roots(CGraph graph)
cdef int check_writable(CGraph graph, list owners) except -1
cdef list find_indices(CGraph graph)
cdef int check_indices(CGraph graph, list indices) except -1
cdef int raise_status(CGraph graph, c.ggml_status status, str doing) except -1


cdef class CGraph:
    cdef c.ggml_cgraph * _ptr
    cdef readonly Context ctx
    cdef readonly int size
    cdef readonly bint grads
    cdef object _supported_by, _sched
    cdef list _indices, _callbacks
    cdef int _n_cleared, _n_backward
    cdef c.ggml_cgraph * ptr(self) except NULL
    cdef Tensor _wrap(self, c.ggml_tensor * t)
    cdef int _changed(self) except -1
    cdef int _check_node(self, Backend backend, c.ggml_tensor * t) except -1
    cdef int _check_supported(self, Backend backend, list owners) except -1
    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *


cdef class GAllocr(Owner):
    cdef c.ggml_gallocr_t _ptr
    cdef bint _served
    cdef set _buffers
