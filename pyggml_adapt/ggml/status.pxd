from pyggml_adapt.ggml cimport libggml as c

cdef int check(c.ggml_status status, str doing) except -1
