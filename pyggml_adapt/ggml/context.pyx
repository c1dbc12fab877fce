"""Context, which owns tensors, and Tensor, which borrows one of them."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c

import numpy as np

from pyggml_adapt.errors import AllocError, BusyError, ClosedError, DTypeError, ShapeError
from pyggml_adapt.ggml.enums import Type

_NUMPY_TYPES = {
    Type.F32: "f", Type.F16: "e", Type.F64: "d", Type.I8: "b", Type.I16: "h", Type.I32: "i", Type.I64: "q",
}


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
        if other is not self:
            self._uses.add(other)
        return 0

    cdef bint owns_readonly(self, c.ggml_backend_buffer * buffer) noexcept:
        return False

    @property
    def closed(self):
        """Return whether close() was called."""
        return not self._is_open()

    def close(self):
        """Free what is owned; closing twice is allowed.

        Raises: BusyError while another thread computes with it.
        """
        if self._in_use:
            raise BusyError(f"{type(self).__name__} is in use by a computation on another thread")
        self._release()
        self._uses.clear()

    def __enter__(self):
        self.check()
        return self

    def __exit__(self, *exc):
        self.close()


cdef list reach(list owners):
    """Return every owner that `owners` depend on, themselves included, each checked to be open."""
    cdef list found = list(owners)
    cdef set seen = set(found)
    cdef Owner owner
    cdef Py_ssize_t i = 0
    while i < len(found):
        owner = <Owner> found[i]
        owner.check()
        for other in owner._uses:
            if other not in seen:
                seen.add(other)
                found.append(other)
        i += 1
    return found


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


cdef int count(list todo, set seen) except -1:
    """Add to `seen` the addresses in `todo` and of all that these are computed from; return how many are leaves."""
    cdef c.ggml_tensor * t
    cdef int i, n_leaves = 0
    seen.update(todo)
    while todo:
        t = <c.ggml_tensor *> <size_t> todo.pop()
        n_leaves += t.op == c.GGML_OP_NONE
        for i in range(c.GGML_MAX_SRC):
            if t.src[i] != NULL and <size_t> t.src[i] not in seen:
                seen.add(<size_t> t.src[i])
                todo.append(<size_t> t.src[i])
    return n_leaves


cdef int read_ne(int64_t * dims, str op, ne) except -1:
    """Fill dims from ne, 1 to 4 dimensions, padded with ones, and check that a tensor can have that shape."""
    cdef int i, n_dims = len(ne)
    cdef double n_elements = 1
    if not 1 <= n_dims <= c.GGML_MAX_DIMS:
        raise ShapeError(f"{op}: {n_dims} dimensions, not 1 to {c.GGML_MAX_DIMS}")
    for i in range(c.GGML_MAX_DIMS):
        dims[i] = 1
        if i < n_dims:
            try:
                dims[i] = ne[i]
            except OverflowError:
                dims[i] = -1
        n_elements *= max(dims[i], 1)
        if dims[i] < 0 or n_elements > MAX_ELEMENTS:
            raise ShapeError(f"{op}: impossible shape {list(ne)}")
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
        raise ClosedError("the Context of this Tensor is closed")

    cdef Tensor wrap(self, c.ggml_tensor * tensor):
        cdef Tensor view = Tensor.__new__(Tensor)
        view._ptr = tensor
        view.ctx = self
        return view

    @staticmethod
    def size_for(int n_tensors, int graph_size=0):
        """Return the bytes that n_tensors tensors, and one graph of graph_size nodes if not 0, need.

        Wraps: ggml_tensor_overhead, ggml_graph_overhead_custom.
        """
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


cdef class Tensor:
    """Borrow one ggml_tensor; its Context stays alive with it."""

    def __init__(self):
        raise TypeError("tensors come from Context.new_tensor or from an op")

    cdef c.ggml_tensor * ptr(self) except NULL:
        if self.ctx is None or self.ctx._ptr == NULL:  # None: made by Tensor.__new__
            raise ClosedError("the Context of this Tensor is closed")
        return self._ptr

    cdef c.ggml_tensor * with_data(self) except NULL:
        """Return the pointer if the tensor has data in an open buffer."""
        cdef c.ggml_tensor * t = self.ptr()
        reach([self.ctx])
        self.buffer()
        return t

    cdef c.ggml_backend_buffer * buffer(self) except NULL:
        """Return the buffer that the tensor's data is in; its owners must have been checked to be open."""
        cdef c.ggml_tensor * t = self.ptr()
        cdef c.ggml_backend_buffer * found = NULL
        if t.data != NULL:
            found = t.buffer if t.view_src == NULL else t.view_src.buffer
        if found == NULL:
            raise ClosedError(f"tensor {self.name!r} has no data: it is not allocated")
        return found

    cdef c.ggml_tensor * range(self, size_t offset, size_t nbytes) except NULL:
        """Return the pointer if the tensor has data, and bytes offset to offset + nbytes are inside it."""
        cdef c.ggml_tensor * t = self.ptr()
        self.buffer()
        cdef size_t size = c.ggml_nbytes(t)
        if offset > size or nbytes > size - offset:
            raise ShapeError(f"tensor {self.name!r} has {size} bytes, not {nbytes} at offset {offset}")
        return t

    @property
    def type(self):
        """Return the element type.  Wraps: ggml_tensor.type."""
        return Type(<int> self.ptr().type)

    @property
    def ne(self):
        """Return the numbers of elements (ne0, ne1, ne2, ne3).  Wraps: ggml_tensor.ne."""
        cdef c.ggml_tensor * t = self.ptr()
        return (t.ne[0], t.ne[1], t.ne[2], t.ne[3])

    @property
    def nb(self):
        """Return the strides in bytes (nb0, nb1, nb2, nb3).  Wraps: ggml_tensor.nb."""
        cdef c.ggml_tensor * t = self.ptr()
        return (t.nb[0], t.nb[1], t.nb[2], t.nb[3])

    @property
    def nbytes(self):
        """Return the bytes from the first element to behind the last.  Wraps: ggml_nbytes."""
        return c.ggml_nbytes(self.ptr())

    @property
    def name(self):
        """Return the name, "" if it has none.  Wraps: ggml_tensor.name."""
        return (<bytes> self.ptr().name).decode("utf-8", "replace")

    @name.setter
    def name(self, str value):
        cdef bytes encoded = value.encode()
        if len(encoded) >= c.GGML_MAX_NAME:
            raise ShapeError(f"tensor name {value!r} has {len(encoded)} bytes; ggml takes {c.GGML_MAX_NAME - 1}")
        c.ggml_set_name(self.ptr(), encoded)

    @property
    def op(self):
        """Return the name of the op that makes this tensor, "NONE" for a leaf.  Wraps: ggml_op_desc."""
        return (<bytes> c.ggml_op_desc(self.ptr())).decode()

    @property
    def is_allocated(self):
        """Return whether the tensor has data.  Wraps: ggml_tensor.data."""
        return self.ptr().data != NULL

    @property
    def is_contiguous(self):
        """Return whether the elements lie without gaps, in order.  Wraps: ggml_is_contiguous."""
        return bool(c.ggml_is_contiguous(self.ptr()))

    @property
    def is_transposed(self):
        """Return whether nb0 > nb1.  Wraps: ggml_is_transposed."""
        return bool(c.ggml_is_transposed(self.ptr()))

    def set_input(self):
        """Return self, marked as a graph input: allocated before every node, but overwritten once it has been read.

        Fill it again before each computation, or mark it as an output too.  Wraps: ggml_set_input.
        """
        c.ggml_set_input(self.ptr())
        return self

    def set_output(self):
        """Return self, marked as a graph output: its memory is kept to the end.  Wraps: ggml_set_output."""
        c.ggml_set_output(self.ptr())
        return self

    def set_data(self, data, size_t offset=0):
        """Copy a contiguous buffer (bytes, NumPy array) into the tensor's bytes at `offset`.

        Raises: ShapeError if it does not fit, ClosedError if the tensor has no data, DTypeError if its buffer is a
        read-only mapping.  Releases the GIL.
        Wraps: ggml_backend_tensor_set.
        """
        cdef list held = acquire([self.ctx])
        try:
            self.copy_in(data, offset, held)
        finally:
            release(held)

    cdef int copy_in(self, data, size_t offset, list held) except -1:
        """Do what set_data() does; held: the owners of the tensor's Context, acquired."""
        cdef Py_buffer view
        cdef c.ggml_tensor * t
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            t = self.range(offset, view.len)
            for owner in held:
                if (<Owner> owner).owns_readonly(self.buffer()):
                    raise DTypeError(f"tensor {self.name!r} is in a read-only mapping")
            with nogil:
                c.ggml_backend_tensor_set(t, view.buf, offset, view.len)
        finally:
            PyBuffer_Release(&view)
        return 0

    def get_data(self, out, size_t offset=0):
        """Copy the tensor's bytes from `offset` into the writable contiguous buffer `out`, and return it.

        Raises: ShapeError if there are not so many, ClosedError if the tensor has no data.  Releases the GIL.
        Wraps: ggml_backend_tensor_get.
        """
        cdef Py_buffer view
        cdef c.ggml_tensor * t
        PyObject_GetBuffer(out, &view, PyBUF_WRITABLE)
        try:
            held = acquire([self.ctx])
            try:
                t = self.range(offset, view.len)
                with nogil:
                    c.ggml_backend_tensor_get(t, view.buf, offset, view.len)
            finally:
                release(held)
        finally:
            PyBuffer_Release(&view)
        return out

    def to_numpy(self):
        """Return a copy as a NumPy array, shape in NumPy order (ne3, ne2, ne1, ne0) without leading ones.

        Quantised types and BF16 come back as their raw bytes, one row of blocks per last axis (uint8).
        Raises: ShapeError if the tensor is not contiguous.
        Wraps: ggml_backend_tensor_get.
        """
        cdef c.ggml_tensor * t = self.with_data()
        if not c.ggml_is_contiguous(t):
            raise ShapeError(f"to_numpy: tensor {self.name!r} is not contiguous; use ops.cont first")
        cdef int n_dims = c.GGML_MAX_DIMS
        while n_dims > 1 and t.ne[n_dims - 1] == 1:  # ggml_n_dims takes an empty dimension for absent
            n_dims -= 1
        shape = [t.ne[i] for i in range(n_dims)][::-1]
        code = _NUMPY_TYPES.get(self.type)
        if code is None:
            code = "u1"
            shape[-1] = c.ggml_row_size(t.type, t.ne[0])
        out = np.empty(shape, dtype=code)
        if out.nbytes:
            self.get_data(out)
        return out

    def __repr__(self):
        if self.ctx is None or self.ctx._ptr == NULL:
            return "<Tensor of a closed Context>"
        return f"<Tensor {self.name!r} {self.type.name} {list(self.ne)} {self.op}>"
