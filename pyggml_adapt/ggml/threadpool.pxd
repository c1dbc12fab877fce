from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport Owner


cdef class Threadpool(Owner):
    cdef c.ggml_threadpool * _ptr
    cdef c.ggml_backend_t _handle  # a backend of its own, through which ggml lets a pool be paused
    cdef readonly int n_threads, poll
    cdef readonly object cpumask, prio
    cdef readonly bint strict_cpu
    cdef bint _marked  # its threads run elsewhere or otherwise than the rest of the process
    cdef c.ggml_threadpool * ptr(self) except NULL
    cdef object enter(self)
    cdef int leave(self, object before) except -1


cdef void * find_cpu(const char * name) noexcept
