from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner, Tensor


cdef class Device:
    cdef c.ggml_backend_dev_t _ptr
    cdef c.ggml_backend_dev_t ptr(self) except NULL


cdef class BufferType:
    cdef c.ggml_backend_buffer_type_t _ptr
    cdef c.ggml_backend_buffer_type_t ptr(self) except NULL


cdef class Buffer(Owner):
    cdef c.ggml_backend_buffer_t _ptr
    cdef Py_buffer _mapping
    cdef bint _mapped
    cdef c.ggml_backend_buffer_t ptr(self) except NULL


cdef class Backend(Owner):
    cdef c.ggml_backend_t _ptr
    cdef c.ggml_threadpool * _pool
    cdef void (*_pool_free)(c.ggml_threadpool *) noexcept nogil
    cdef int _abort
    cdef readonly int n_threads
    cdef readonly Device device
    cdef c.ggml_backend_t ptr(self) except NULL
    cdef int _start_pool(self) except -1
