"""Context, which owns tensors, and Tensor, which borrows one of them."""

cimport cython
from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS, PyBUF_C_CONTIGUOUS, PyBUF_F_CONTIGUOUS, PyBUF_FORMAT, PyBUF_ND, PyBUF_SIMPLE, PyBUF_STRIDES,
    PyBUF_WRITABLE, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_RawFree, PyMem_RawMalloc
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c

from numbers import Real

import numpy as np

from pyggml_adapt.errors import (
    AllocError, BackendError, BusyError, ClosedError, DTypeError, ParameterError, ShapeError,
)
from pyggml_adapt.ggml.enums import Type

cdef class Owner:
    """Base of the classes that own something of ggml's: they can be closed, and not while ggml uses them."""

    def __cinit__(self, *args, **kwargs):
        self._uses = set()

    cdef bint _is_open(self) noexcept:
        return False

    cdef void _release(self) noexcept:
        pass

    cdef int check(self) except -1:
        if not self._is_open():
            raise ClosedError(f"{type(self).__name__} is closed")
        return 0

    cdef int depend_on(self, Owner other) except -1:
        """Keep `other` alive as long as self, and in use while self is computed with."""
        if other is not self and other not in self._uses:
            self._uses.add(other)
            uses_changed()
        return 0

    cdef bint owns(self, c.ggml_backend_buffer * buffer) noexcept:
        """Return whether this owner frees the buffer."""
        return False

    cdef bint owns_readonly(self, c.ggml_backend_buffer * buffer) noexcept:
        return False

    @property
    def closed(self):
        """Return whether close() was called."""
        return not self._is_open()

    def close(self):
        """Free what is owned; closing twice is allowed.

        Raises: BusyError while it is computed with, or an array shows its memory, see Tensor.to_numpy().
        """
        check_idle(self)
        if self._n_exports:
            raise BusyError(f"{type(self).__name__} cannot be closed: {self._n_exports} array(s) still show its memory")
        self._release()
        self._uses.clear()
        uses_changed()

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, *exc):
        self.close()


cdef int check_idle(Owner owner) except -1:
    """Check that no computation, and no transfer, uses `owner`."""
    if owner._in_use:
        raise BusyError(f"{type(owner).__name__} is in use by a computation that has not ended")
    return 0


cdef list reach(list owners):
    """Return every owner that `owners` depend on, themselves included, each checked to be open."""
    cdef list found = list(owners)
    cdef set seen = set(found)
    cdef Owner owner
    cdef Py_ssize_t i = 0
    while i < len(found):
        if found[i] is None:  # of a Tensor that was made by Tensor.__new__
            raise ClosedError("the Context of this Tensor is closed")
        owner = <Owner> found[i]
        owner.check()
        for other in owner._uses:
            if other not in seen:
                seen.add(other)
                found.append(other)
        i += 1
    return found


cdef size_t n_changes = 1  # how often an owner was closed, or came to depend on others


cdef void uses_changed() noexcept:
    """Let check_open() look again."""
    global n_changes
    n_changes += 1


cdef int check_open(Context ctx) except -1:
    """Check that a Context, and every owner that it depends on, is open: what reach() finds holds until a change."""
    if ctx._reached != n_changes:
        reach([ctx])
        ctx._reached = n_changes
    return 0


cdef list acquire(list owners):
    """Return every owner that `owners` depend on, each checked to be open and marked as in use."""
    cdef list found = reach(owners)
    cdef Owner owner
    for owner in found:
        owner._in_use += 1
    return found


cdef void release(list owners) noexcept:
    cdef Owner owner
    for owner in owners:
        owner._in_use -= 1


cdef list occupy(list owners):
    """Do what acquire() does for a computation: until vacate(), nobody but its graph writes into their memory."""
    cdef list found = acquire(owners)
    cdef Owner owner
    for owner in found:
        owner._computing += 1
    return found


cdef void vacate(list owners) noexcept:
    cdef Owner owner
    for owner in owners:
        owner._computing -= 1
    release(owners)


cdef set stand_ins = set()  # the addresses of those that graphs compute with now


cdef int put_in(c.ggml_tensor * stand_in, c.ggml_tensor * t) except -1:
    """Let a copy of t be known as what stands in for it in a graph, until take_out()."""
    stand_in.flags |= STAND_IN
    stand_in.extra = t
    stand_ins.add(<size_t> stand_in)
    return 0


cdef void take_out(c.ggml_tensor * stand_in) noexcept:
    stand_ins.discard(<size_t> stand_in)


cdef c.ggml_tensor * original(c.ggml_tensor * t) noexcept:
    """Return t, or the tensor that it stands in for while a graph is computed."""
    return <c.ggml_tensor *> t.extra if t.flags & STAND_IN else t


cdef c.ggml_tensor * root_of(c.ggml_tensor * t) noexcept:
    """Return the tensor whose data t shows."""
    while t.view_src != NULL:
        t = t.view_src
    return t


cdef void point_view(c.ggml_tensor * t) noexcept:
    """Let t, if it is a view, show where its tensor's data is now: Slots may have pointed that elsewhere."""
    if t.view_src != NULL and t.data != NULL:
        t.data = <char *> t.view_src.data + t.view_offs
        if t.buffer != NULL:
            t.buffer = t.view_src.buffer


cdef void point_operands(c.ggml_tensor * node) noexcept:
    """Let a node, and what it is computed from, show where the data is now, before ggml looks at their buffers."""
    cdef int k
    point_view(node)
    for k in range(c.GGML_MAX_SRC):
        if node.src[k] != NULL:
            point_view(node.src[k])


cdef bint is_view(c.ggml_tensor * t) noexcept:
    """Return whether t only shows another tensor's data."""
    return t.op in (c.GGML_OP_VIEW, c.GGML_OP_RESHAPE, c.GGML_OP_PERMUTE, c.GGML_OP_TRANSPOSE)


cdef int count(list todo, set seen) except -1:
    """Add to `seen` the addresses in `todo` and of all that these are computed from; return how many no op computes."""
    cdef c.ggml_tensor * t
    cdef size_t src
    cdef int i, n_leaves = 0
    seen.update(todo)
    while todo:
        t = <c.ggml_tensor *> <size_t> todo.pop()
        n_leaves += t.op == c.GGML_OP_NONE
        for i in range(c.GGML_MAX_SRC):
            if t.src[i] != NULL:
                src = <size_t> original(t.src[i])
                if src not in seen:
                    seen.add(src)
                    todo.append(src)
    return n_leaves


cdef int read_ne(int64_t * dims, str op, ne) except -1:
    """Fill dims from ne, 1 to 4 dimensions, padded with ones, and check that a tensor can have that shape."""
    cdef tuple given = <tuple> ne if type(ne) is tuple else tuple(ne)
    cdef int i, n_dims = len(given)
    cdef double n_elements = 1
    if not 1 <= n_dims <= c.GGML_MAX_DIMS:
        raise ShapeError(f"{op}: {n_dims} dimensions, not 1 to {c.GGML_MAX_DIMS}")
    dims[0] = dims[1] = dims[2] = dims[3] = 1
    try:
        for i in range(n_dims):
            dims[i] = given[i]
    except OverflowError:
        dims[i] = -1
    for i in range(c.GGML_MAX_DIMS):
        n_elements *= max(dims[i], 1)
        if dims[i] < 0 or n_elements > MAX_ELEMENTS:
            raise ShapeError(f"{op}: impossible shape {list(ne)}")
    return 0


cdef int check_same_layout(Tensor src, Tensor dst) except -1:
    """Check that the bytes of src can be those of dst, and that these are no other tensor's."""
    cdef c.ggml_tensor * s = src.ptr()
    cdef c.ggml_tensor * d = dst.ptr()
    if s.type != d.type or src.ne != dst.ne or src.nb != dst.nb:
        raise ShapeError(f"copy: {src!r} and {dst!r} differ in type, shape or strides")
    cdef size_t size = c.ggml_nbytes(s)
    if size != c.ggml_nelements(s) // c.ggml_blck_size(s.type) * c.ggml_type_size(s.type):
        raise ShapeError(f"copy: between the elements of {src!r} are others")
    if s.data != d.data and <char *> s.data < <char *> d.data + size and <char *> d.data < <char *> s.data + size:
        raise ShapeError(f"copy: {src!r} and {dst!r} overlap")
    return 0


cdef class Context(Owner):
    """Own the metadata of tensors and graphs; their data lives in buffers.

    mem_size: bytes for metadata, see `size_for`.
    Wraps: ggml_init (with no_alloc), ggml_free.
    """

    def __cinit__(self, size_t mem_size):
        self._mem = PyMem_RawMalloc(mem_size if mem_size else 1)
        if self._mem == NULL:
            raise AllocError(f"Context: no memory for {mem_size} bytes of tensor metadata")
        self.mem_size = mem_size
        self._ptr = c.ggml_init(c.ggml_init_params(mem_size, self._mem, True))
        if self._ptr == NULL:
            raise AllocError(f"ggml_init: no memory for a context of {mem_size} bytes")

    def __dealloc__(self):
        c.ggml_free(self._ptr)
        PyMem_RawFree(self._mem)

    cdef bint _is_open(self) noexcept:
        return self._ptr != NULL

    cdef void _release(self) noexcept:
        c.ggml_free(self._ptr)
        PyMem_RawFree(self._mem)
        self._ptr = NULL
        self._mem = NULL

    cdef c.ggml_context * ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError("Context is closed")
        return self._ptr

    cdef c.ggml_context * room(self, int n_tensors) except NULL:
        """Return the pointer if n_tensors more fit: ggml would abort on a full context."""
        cdef c.ggml_context * ptr = self.ptr()
        if c.ggml_used_mem(ptr) + n_tensors * c.ggml_tensor_overhead() > self.mem_size:
            raise AllocError(f"Context of {self.mem_size} bytes is full: {c.ggml_used_mem(ptr)} bytes are used")
        self.n_tensors += n_tensors
        return ptr

    cdef bint holds(self, c.ggml_tensor * tensor) noexcept:
        return <char *> self._mem <= <char *> tensor < <char *> self._mem + self.mem_size

    cdef Context home(self, c.ggml_tensor * tensor):
        """Return the Context that owns `tensor`: this one, or one that this one depends on."""
        if self.holds(tensor):
            return self
        for owner in reach([self]):
            if isinstance(owner, Context) and (<Context> owner).holds(tensor):
                return owner
        if <size_t> tensor in stand_ins:
            return self.home(original(tensor))
        raise ClosedError("the Context of this Tensor is closed")

    cdef Tensor wrap(self, c.ggml_tensor * tensor):
        cdef Tensor view = Tensor.__new__(Tensor)
        view._ptr = original(tensor)
        view.ctx = self
        return view

    @staticmethod
    def size_for(int n_tensors, int graph_size=0):
        """Return the bytes that n_tensors tensors, and one graph of graph_size nodes if not 0, need.

        Raises: ParameterError for negative numbers.
        Wraps: ggml_tensor_overhead, ggml_graph_overhead_custom.
        """
        if n_tensors < 0 or graph_size < 0:
            raise ParameterError(f"size_for: {n_tensors} tensors and a graph of {graph_size} nodes")
        cdef size_t size = n_tensors * c.ggml_tensor_overhead()
        if graph_size:
            size += c.ggml_graph_overhead_custom(graph_size, False)
        return size

    def new_tensor(self, type, ne, str name=None):
        """Return a new tensor without data, shape ne = (ne0, ...) of 1 to 4 dimensions.

        Raises: ShapeError for a bad shape, AllocError when the context is full.
        Wraps: ggml_new_tensor, ggml_set_name.
        """
        cdef int64_t dims[4]
        cdef int t = Type(type)
        read_ne(dims, "new_tensor", ne)
        if dims[0] % c.ggml_blck_size(<c.ggml_type> t):
            raise ShapeError(f"new_tensor: ne0 = {dims[0]} is not a multiple of {Type(t).name}'s block size")
        cdef Tensor tensor = self.wrap(c.ggml_new_tensor(self.room(1), <c.ggml_type> t, c.GGML_MAX_DIMS, dims))
        if name is not None:
            tensor.name = name
        return tensor

    def tensors(self):
        """Return the tensors that were made in it, in order.  Wraps: ggml_get_first_tensor, ggml_get_next_tensor."""
        cdef c.ggml_tensor * t = c.ggml_get_first_tensor(self.ptr())
        found = []
        while t != NULL:
            found.append(self.wrap(t))
            t = c.ggml_get_next_tensor(self._ptr, t)
        return found

    def tensor(self, str name not None):
        """Return the first tensor that was made in it with this name, or None.  Wraps: ggml_get_tensor."""
        cdef c.ggml_tensor * t = c.ggml_get_tensor(self.ptr(), name_bytes(name))
        return None if t == NULL else self.wrap(t)

    def alloc_tensors(self, buffer_type):
        """Return a new Buffer of a BufferType in which every tensor is placed that has no data; it is kept alive.

        Raises: AllocError when there is not enough memory, ShapeError if no tensor needs any.
        Wraps: ggml_backend_alloc_ctx_tensors_from_buft.
        """
        from pyggml_adapt.ggml.backend import Buffer

        return Buffer.for_context(self, buffer_type)

    @property
    def used_mem(self):
        """Return how many bytes of mem_size are used.  Wraps: ggml_used_mem."""
        return c.ggml_used_mem(self.ptr())

    def set_data(self, tuple tensors not None, tuple data not None):
        """Copy one contiguous buffer into each of some tensors of this Context; what owns them is looked at once.

        Raises: ShapeError if a tensor is another Context's, or the numbers differ; as Tensor.set_data: those before
        are written then.  Releases the GIL.
        Wraps: ggml_backend_tensor_set.
        """
        cdef Py_ssize_t i
        cdef Tensor tensor
        cdef list held = acquire([self])
        try:
            if len(tensors) != len(data):
                raise ShapeError(f"set_data: {len(data)} buffers for {len(tensors)} tensors")
            for i in range(len(tensors)):
                tensor = <Tensor?> tensors[i]
                if tensor.ctx is not self:
                    raise ShapeError(f"set_data: {tensor!r} belongs to another Context")
                tensor.copy_in(data[i], 0, held)
        finally:
            release(held)


include "tensor_tools.pxi"
include "tensor.pxi"
