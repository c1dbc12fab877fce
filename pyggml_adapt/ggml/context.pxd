cimport cython
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c


cdef class Owner:
    cdef object __weakref__
    cdef int _in_use, _computing, _n_exports
    cdef set _uses
    cdef dict order  # of an allocator: {address: position} of the nodes of its graph
    cdef set shared  # and the addresses of what it placed where other nodes may be too
    cdef bint _is_open(self) noexcept
    cdef void _release(self) noexcept
    cdef int check(self) except -1
    cdef int depend_on(self, Owner other) except -1
    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept
    cdef bint owns_readonly(self, c.ggml_backend_buffer * buffer) noexcept


cdef extern from *:
    """
    #define PYGGML_ADAPT_MAX_ELEMENTS 4398046511104.0
    """
    const double MAX_ELEMENTS "PYGGML_ADAPT_MAX_ELEMENTS"  # of a tensor: ggml adds up sizes without overflow checks


cdef enum:
    STAND_IN = 1 << 30  # flag of a copy of a tensor that a graph computes with instead; `extra` is the tensor


cdef list reach(list owners)
cdef void uses_changed() noexcept
cdef int check_open(Context ctx) except -1
cdef int check_idle(Owner owner) except -1
cdef list acquire(list owners)
cdef void release(list owners) noexcept
cdef list occupy(list owners)
cdef void vacate(list owners) noexcept
cdef int put_in(c.ggml_tensor * stand_in, c.ggml_tensor * t) except -1
cdef void take_out(c.ggml_tensor * stand_in) noexcept
cdef c.ggml_tensor * original(c.ggml_tensor * t) noexcept
cdef c.ggml_tensor * root_of(c.ggml_tensor * t) noexcept
cdef bint is_view(c.ggml_tensor * t) noexcept
cdef bytes name_bytes(str name)
cdef void point_view(c.ggml_tensor * t) noexcept
cdef void point_operands(c.ggml_tensor * node) noexcept
cdef int count(list todo, set seen) except -1
cdef int check_same_layout(Tensor src, Tensor dst) except -1
cdef int read_ne(int64_t * dims, str op, ne) except -1


@cython.final
cdef class Context(Owner):
    cdef c.ggml_context * _ptr
    cdef void * _mem
    cdef readonly size_t mem_size
    cdef size_t n_tensors, n_foreign
    cdef size_t _reached  # n_changes when all that it depends on was found open
    cdef size_t last_bind  # the number, of all that there were, of the last binding of Slots of its graphs
    cdef int n_lent  # computations that have exchanged operands of its nodes for the moment
    cdef set slots  # the addresses of those that are Slots'
    cdef c.ggml_context * ptr(self) except NULL
    cdef c.ggml_context * room(self, int n_tensors) except NULL
    cdef bint holds(self, c.ggml_tensor * tensor) noexcept
    cdef Context home(self, c.ggml_tensor * tensor)
    cdef Tensor wrap(self, c.ggml_tensor * tensor)


@cython.final
cdef class Tensor:
    cdef c.ggml_tensor * _ptr
    cdef readonly Context ctx
    cdef c.ggml_tensor * ptr(self) except NULL
    cdef c.ggml_tensor * with_data(self) except NULL
    cdef c.ggml_backend_buffer * buffer(self) except NULL
    cdef int copy_in(self, data, size_t offset, list held) except -1
    cdef int check_writable(self, list held, list queued=*) except -1
    cdef int check_settable(self) except -1
    cdef c.ggml_tensor * range(self, size_t offset, size_t nbytes) except NULL
