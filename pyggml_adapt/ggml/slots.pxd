cimport cython

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner
from pyggml_adapt.ggml.graph cimport CGraph


@cython.final
cdef class _Binding(Owner):
    pass


@cython.final
cdef class TensorTable:
    cdef readonly tuple tensors, scales
    cdef readonly object signature
    cdef Py_ssize_t n
    cdef void ** _data
    cdef c.ggml_backend_buffer ** _buffers
    cdef set _owners
    cdef frozenset _readonly  # which tensors are in read-only mappings


@cython.final
cdef class Slots:
    cdef readonly CGraph graph
    cdef readonly TensorTable table
    cdef list _tensors, _scales
    cdef _Binding _binding
    cdef Py_ssize_t n, n_views
    cdef int _n_nodes, _n_cleared
    cdef list _homes  # the other Contexts that own nodes of the graph
    cdef frozenset _written  # which slots nodes of the graph write into
    cdef c.ggml_tensor ** _slots
    cdef c.ggml_tensor ** _views
    cdef int _check_apart(self, TensorTable table) except -1
    cdef int _announce(self) except -1
