from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c


cdef class Owner:
    cdef object __weakref__
    cdef int _in_use
    cdef set _uses
    cdef bint _is_open(self) noexcept
    cdef void _release(self) noexcept
    cdef int check(self) except -1
    cdef int depend_on(self, Owner other) except -1


cdef list acquire(list owners)
cdef void release(list owners) noexcept


cdef class Context(Owner):
    cdef c.ggml_context * _ptr
    cdef void * _mem
    cdef readonly size_t mem_size
    cdef bint uses_foreign
    cdef c.ggml_context * ptr(self) except NULL
    cdef c.ggml_context * room(self, int n_tensors) except NULL
    cdef Tensor wrap(self, c.ggml_tensor * tensor)


cdef class Tensor:
    cdef c.ggml_tensor * _ptr
    cdef readonly Context ctx
    cdef c.ggml_tensor * ptr(self) except NULL
    cdef c.ggml_tensor * with_data(self) except NULL
    cdef c.ggml_tensor * range(self, size_t offset, size_t nbytes) except NULL
