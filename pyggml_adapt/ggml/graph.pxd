cimport cython
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.backend cimport Backend
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor


cdef int check_backend_idle(Backend backend) except -1
cdef int check_size(int size) except -1
cdef object nodes_of(CGraph graph)
cdef list without_data(CGraph graph)
cdef set buffers_of(list addresses)
cdef int check_foreign(CGraph graph) except -1
cdef set written_roots(CGraph graph)
cdef int check_work(CGraph graph, Backend backend) except -1
cdef int check_writable(CGraph graph, list owners) except -1
cdef int prepare(CGraph graph) except -1
cdef int point_views(CGraph graph) except -1
cdef void fill_zeros(c.ggml_tensor * t) noexcept
cdef int record_order(Owner allocator, CGraph graph, list placed) except -1
cdef int check_order(CGraph graph, list owners) except -1
cdef int split_norms(CGraph graph) except -1
cdef list homes_of(CGraph graph)
cdef list memory_of(CGraph graph)
cdef int raise_status(CGraph graph, c.ggml_status status, str doing) except -1


cdef struct Use:  # of a leaf, by one node
    c.ggml_tensor * node
    int k  # node.src[k]
    Py_ssize_t picked  # which leaf


cdef struct Picked:  # a leaf, or view of one
    c.ggml_tensor * leaf
    c.ggml_tensor copy  # whose data is ours
    void * data  # of the leaf, while it shows that of the copy
    int64_t bound  # all are from 0 to bound - 1


@cython.final
cdef class Indices:
    cdef Use * _uses
    cdef Picked * _picked
    cdef Py_ssize_t _n_uses, _n_picked
    cdef int _record(self, list uses) except -1
    cdef int read(self, CGraph graph) except -1
    cdef int lend(self) except -1
    cdef void restore(self) noexcept
    cdef void show_copies(self) noexcept
    cdef void show_leaves(self) noexcept


@cython.final
cdef class CGraph:
    cdef c.ggml_cgraph * _ptr
    cdef readonly Context ctx
    cdef readonly int size
    cdef readonly bint grads
    cdef object _supported_by, _sched
    cdef size_t _last_bind, _foreign_bind  # of Slots of its Context, and of others, when it was checked
    cdef Indices _indices
    cdef list _callbacks
    cdef list _homes  # the other Contexts that own nodes of it
    cdef list _written  # the addresses of the leaves that it writes into
    cdef list _written_in  # the owners of their memory; None if Slots have pointed them elsewhere since
    cdef set _expanded  # addresses of leaves that expand() was given, and of all that _expand_deep() has added
    cdef int _n_cleared, _n_backward
    cdef c.ggml_cgraph * ptr(self) except NULL
    cdef Tensor _wrap(self, c.ggml_tensor * t)
    cdef int _changed(self) except -1
    cdef int _check_node(self, Backend backend, c.ggml_tensor * t) except -1
    cdef int _check_supported(self, Backend backend, list owners) except -1
    cdef list _members(self)
    cdef int _check_still(self) except -1
    cdef bint was_checked(self, by, list owners) noexcept
    cdef int remember(self, by, list owners) except -1
    cdef int _expand_deep(self, c.ggml_tensor * t) except -1
    cdef int check_nodes_idle(self) except -1
    cdef int check_alone(self, list owners) except -1
    cdef list begin(self, Backend backend, list owners)
    cdef int lend(self, Indices indices) except -1
    cdef int restore(self, Indices indices) except -1
    cdef c.ggml_status _compute(self, Backend backend, Tensor result, out) except *
    cdef c.ggml_status _compute_into(self, Backend backend, Tensor result, out) except *


@cython.final
cdef class GAllocr(Owner):
    cdef c.ggml_gallocr_t _ptr
    cdef bint _served, _reserved
    cdef set _buffers
