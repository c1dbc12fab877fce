cimport cython

from pyggml_adapt.ggml cimport libops as c
from pyggml_adapt.ggml.context cimport Context, Owner


@cython.final
cdef class Callback(Owner):
    cdef object call, error
    cdef Context ctx
    cdef object backends
    cdef int n_tasks
    cdef int run(self, c.ggml_tensor * dst, int ith, int nth) except -1


cdef list find_callbacks(c.ggml_cgraph * graph)
cdef int arm(list callbacks, Context ctx, backends) except -1
cdef object disarm(list callbacks)
cdef int check_callback(str op, object fun, int n_tasks) except -1
cdef Callback new_callback(object fun, int n_tasks)
cdef void call_back(c.ggml_tensor * dst, int ith, int nth, void * userdata) noexcept nogil
