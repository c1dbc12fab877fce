cimport cython

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Context, Owner, Tensor
from pyggml_adapt.ggml.threadpool cimport Threadpool


@cython.final
cdef class Device:
    cdef c.ggml_backend_dev_t _ptr
    cdef c.ggml_backend_dev_t ptr(self) except NULL


@cython.final
cdef class BufferType:
    cdef c.ggml_backend_buffer_type_t _ptr
    cdef c.ggml_backend_buffer_type_t ptr(self) except NULL


@cython.final
cdef class Buffer(Owner):
    cdef c.ggml_backend_buffer_t _ptr
    cdef Py_buffer _mapping
    cdef size_t _pad
    cdef bint _mapped
    cdef set _parts  # the buffers that it is made of, if more than one
    cdef c.ggml_backend_buffer_t ptr(self) except NULL


@cython.final
cdef class Backend(Owner):
    cdef c.ggml_backend_t _ptr
    cdef int _flags[3]  # whether computations are to stop: as abort_flag says, since a callback has failed; if one did
    cdef bint _async
    cdef list _pending, _computed, _exports  # what transfers, and computations, that have not ended use
    cdef readonly Threadpool threadpool
    cdef readonly int n_threads
    cdef readonly Device device
    cdef c.ggml_backend_t ptr(self) except NULL
    cdef int check_queue(self, list owners) except -1
    cdef int queue(self, list owners, object export) except -1
    cdef _transfer(self, Tensor tensor, export, size_t offset, bint into)
    cdef int _check_place(self, Tensor tensor, list owners, bint into) except -1


@cython.final
cdef class Event(Owner):
    cdef c.ggml_backend_event_t _ptr
    cdef readonly Device device
    cdef c.ggml_backend_event_t ptr(self) except NULL
