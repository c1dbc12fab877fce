# What a Tensor is; context.pyx, whose Context owns it, includes this.

_FORMATS = {
    Type.F32: b"f", Type.F16: b"e", Type.F64: b"d", Type.I8: b"b", Type.I16: b"h", Type.I32: b"i", Type.I64: b"q",
}
_TYPES = {np.dtype(code.decode()): type for type, code in _FORMATS.items()}
_KINDS = {int(type): type for type in Type}  # which runs no Python code, as Type(...) does


@cython.freelist(256)
cdef class Tensor:
    """Borrow one ggml_tensor; its Context stays alive with it."""

    def __init__(self):
        raise TypeError("tensors come from Context.new_tensor or from an op")

    cdef c.ggml_tensor * ptr(self) except NULL:
        if self.ctx is None or self.ctx._ptr == NULL:  # None: made by Tensor.__new__
            raise ClosedError("the Context of this Tensor is closed")
        if self._ptr.view_src != NULL and not self.ctx.holds(self._ptr.view_src):
            check_open(self.ctx)  # ggml looks at what is viewed
        return self._ptr

    cdef c.ggml_tensor * with_data(self) except NULL:
        """Return the pointer if the tensor has data in an open buffer."""
        cdef c.ggml_tensor * t = self.ptr()
        check_open(self.ctx)
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
        point_view(t)
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
        return _KINDS[<int> self.ptr().type]

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
    def shape(self):
        """Return the numbers of elements as NumPy has them: ne turned round, without leading ones, (ne0,) at least."""
        cdef c.ggml_tensor * t = self.ptr()
        return tuple([t.ne[i] for i in range(n_dims(t))][::-1])

    @property
    def nelements(self):
        """Return the number of elements.  Wraps: ggml_nelements."""
        return c.ggml_nelements(self.ptr())

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
        cdef bytes encoded = name_bytes(value)
        if len(encoded) >= c.GGML_MAX_NAME:
            raise ShapeError(f"tensor name {value!r} has {len(encoded)} bytes; ggml takes {c.GGML_MAX_NAME - 1}")
        c.ggml_set_name(self.ptr(), encoded)

    @property
    def op(self):
        """Return the name of the op that makes this tensor, "NONE" for a leaf.  Wraps: ggml_op_desc."""
        return (<bytes> c.ggml_op_desc(self.ptr())).decode()

    @property
    def src(self):
        """Return the operands that it is computed from, () for a leaf.  Wraps: ggml_tensor.src."""
        cdef c.ggml_tensor * t = self.ptr()
        return tuple([self.ctx.home(t.src[i]).wrap(t.src[i]) for i in range(c.GGML_MAX_SRC) if t.src[i] != NULL])

    @property
    def view_src(self):
        """Return the tensor whose data it shows, None if it has its own.  Wraps: ggml_tensor.view_src."""
        cdef c.ggml_tensor * t = self.ptr()
        return None if t.view_src == NULL else self.ctx.home(t.view_src).wrap(t.view_src)

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

    cdef int check_settable(self) except -1:
        """Check that its flags and its op's parameters can be set: no computation reads them, nor does a training."""
        self.ptr()
        check_idle(self.ctx)
        if not self.ctx.holds(self._ptr):
            raise BackendError(f"tensor {self.name!r} is an OptContext's, and cannot be changed")
        return 0

    def set_input(self):
        """Return self, marked as a graph input: allocated before every node, but overwritten once it has been read.

        Fill it again before each computation, or mark it as an output too.
        Raises: ShapeError if it is not a leaf; as set_output().  Wraps: ggml_set_input.
        """
        if self.ptr().op != c.GGML_OP_NONE:
            raise ShapeError(f"set_input: tensor {self.name!r} is computed by {self.op}")
        self.check_settable()
        c.ggml_set_input(self._ptr)
        return self

    def set_output(self):
        """Return self, marked as a graph output: its memory is kept to the end.

        Raises: BusyError while its Context is computed with.  Wraps: ggml_set_output.
        """
        self.check_settable()
        c.ggml_set_output(self._ptr)
        return self

    def set_param(self):
        """Return self, marked as a parameter: CGraph.build_backward() finds its gradient.  Do so before expand().

        Raises: ShapeError if it is not a leaf; as set_output().  Wraps: ggml_set_param.
        """
        if self.ptr().op != c.GGML_OP_NONE:
            raise ShapeError(f"set_param: tensor {self.name!r} is computed by {self.op}")
        self.check_settable()
        c.ggml_set_param(self._ptr)
        return self

    def set_loss(self):
        """Return self, marked as what gradients are of: F32, one element.

        Raises: ShapeError if it is not; as set_output().  Wraps: ggml_set_loss.
        """
        if self.ptr().type != c.GGML_TYPE_F32 or c.ggml_nelements(self._ptr) != 1:
            raise ShapeError(f"set_loss: {self!r} is not a single F32 number")
        self.check_settable()
        c.ggml_set_loss(self._ptr)
        return self

    def set_data(self, data, size_t offset=0):
        """Copy a contiguous buffer (bytes, NumPy array) into the tensor's bytes at `offset`.

        Raises: ShapeError if it does not fit, ClosedError if the tensor has no data, DTypeError if its buffer is a
        read-only mapping, BusyError while a computation uses its memory.  Releases the GIL.
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
            self.check_writable(held)
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

    def memset(self, unsigned char value, size_t offset=0, size=None):
        """Set `size` bytes from `offset` on, by default all that are left, to `value`.  Raises: as set_data().

        Wraps: ggml_backend_tensor_memset.
        """
        cdef size_t n
        held = acquire([self.ctx])
        try:
            self.range(offset, 0)
            n = self.nbytes - offset if size is None else size
            self.range(offset, n)
            self.check_writable(held)
            if c.ggml_backend_buffer_is_host(self.buffer()):
                c.ggml_backend_tensor_memset(self._ptr, value, offset, n)
            else:  # other memory need not have it
                self.copy_in(bytes([value]) * n, offset, held)
        finally:
            release(held)

    def set_2d(self, data, size_t offset, size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data):
        """Copy n_copies pieces of `size` bytes, stride_data apart in a buffer, to `offset` on, stride_tensor apart.

        Raises: as set_data().  Releases the GIL.  Wraps: ggml_backend_tensor_set_2d.
        """
        copy_2d(self, data, offset, size, n_copies, stride_tensor, stride_data, True)

    def get_2d(self, out, size_t offset, size_t size, size_t n_copies, size_t stride_tensor, size_t stride_data):
        """Copy n_copies pieces of `size` bytes, stride_tensor apart from `offset` on, to stride_data apart in `out`.

        Returns out.  Raises: as get_data().  Releases the GIL.  Wraps: ggml_backend_tensor_get_2d.
        """
        copy_2d(self, out, offset, size, n_copies, stride_tensor, stride_data, False)
        return out

    def copy_from(self, Tensor src not None):
        """Copy the data of src, of the same type, shape and strides, here.  Releases the GIL.

        Raises: ShapeError if the layouts differ or have gaps; as set_data().  Wraps: ggml_backend_tensor_copy.
        """
        cdef c.ggml_tensor * s
        cdef c.ggml_tensor * t
        held = acquire([self.ctx, src.ctx])
        try:
            t, s = self.range(0, 0), src.range(0, 0)
            check_same_layout(src, self)
            self.check_writable(held)
            if c.ggml_backend_buffer_is_host(src.buffer()):  # as ggml does; but of views it asks for a buffer of theirs
                with nogil:
                    c.ggml_backend_tensor_set(t, s.data, 0, c.ggml_nbytes(s))
            elif c.ggml_backend_buffer_is_host(self.buffer()) or t.buffer == NULL or s.buffer == NULL:
                self.copy_in(src.get_data(bytearray(src.nbytes)), 0, held)
            else:
                with nogil:
                    c.ggml_backend_tensor_copy(s, t)
        finally:
            release(held)

    cdef int check_writable(self, list held, list queued=[]) except -1:
        """Check that the data is in no read-only mapping of these owners, and that no computation uses its memory.

        queued: the owners that computations use which end before the data is written.
        """
        cdef c.ggml_backend_buffer * buffer = self.buffer()
        cdef Owner owner
        cdef bint known = False
        for owner in held:
            if owner.owns_readonly(buffer):
                raise DTypeError(f"tensor {self.name!r} is in a read-only mapping")
            if owner.owns(buffer):
                known = True
                if owner._computing > sum([1 for each in queued if each is owner]):
                    raise BusyError(f"tensor {self.name!r} cannot be written: a computation uses its memory")
        if not known:
            raise BusyError(f"tensor {self.name!r} was placed in a buffer after this call had looked for its owner")
        return 0

    def to_numpy(self):
        """Return its data as a NumPy array in NumPy's order of dimensions, see `shape`.

        Where the CPU can address the data, the array shows it without a copy, strides included: it changes with the
        tensor, and is read-only where the data is.  As long as it lives, what owns the memory cannot be closed; writing
        into it while a graph computes with that memory is a data race.  From other devices it is a copy.
        Quantised types and BF16 come as their raw bytes, one row of blocks per last axis (uint8): see dequantize().
        Raises: ClosedError if the tensor has no data; ShapeError if it is not contiguous, on another device.
        Wraps: ggml_get_data, ggml_backend_tensor_get.
        """
        cdef c.ggml_tensor * t = self.ptr()
        code, shape = _FORMATS.get(self.type), self.shape
        if code is None:
            shape = (*shape[:-1], c.ggml_row_size(t.type, t.ne[0]))
        if not c.ggml_nelements(t):
            return np.empty(shape, dtype=(code or b"B").decode())  # there is no data to show
        self.with_data()
        if code is None and t.nb[0] != c.ggml_type_size(t.type):
            raise ShapeError(f"to_numpy: {_no_rows(self)}")
        if c.ggml_backend_buffer_is_host(self.buffer()):
            return np.asarray(memoryview(self))
        if not c.ggml_is_contiguous(t):
            raise ShapeError(f"to_numpy: tensor {self.name!r} is not contiguous; use ops.cont first")
        return self.get_data(np.empty(shape, dtype=(code or b"B").decode()))

    @staticmethod
    def from_numpy(Context ctx not None, array, str name=None):
        """Return a leaf of ctx whose data is the array's memory, without a copy; it is kept alive as long as needed.

        array: contiguous, of 1 to 4 dimensions, or of none: F32, F16, F64, I8, I16, I32 or I64.  If it is read-only,
        so is the tensor.
        Raises: DTypeError, ShapeError, AllocError when the context is full.
        Wraps: ggml_backend_cpu_buffer_from_ptr, ggml_backend_tensor_alloc.
        """
        from pyggml_adapt.ggml.backend import Buffer

        if not isinstance(array, np.ndarray):
            raise DTypeError(f"from_numpy: a NumPy array is needed, not a {type(array).__name__}")
        kind = _TYPES.get(array.dtype)
        if kind is None:
            raise DTypeError(f"from_numpy: ggml has no type for {array.dtype} arrays")
        if not array.flags.c_contiguous:
            raise ShapeError("from_numpy: the array is not contiguous; use numpy.ascontiguousarray() first")
        if not array.flags.aligned:
            raise ShapeError("from_numpy: the array is not aligned; use its copy() instead")
        if array.ndim > c.GGML_MAX_DIMS:
            raise ShapeError(f"from_numpy: {array.ndim} dimensions, not 0 to {c.GGML_MAX_DIMS}")
        cdef Tensor tensor = ctx.new_tensor(kind, array.shape[::-1] or (1,), name)
        Buffer.from_mapping(array).place(tensor, 0)
        return tensor

    @staticmethod
    def from_dlpack(Context ctx not None, x, str name=None):
        """Return a leaf of ctx whose data is the memory of a tensor of another library, on the CPU, without a copy.

        x: anything with __dlpack__, as a tensor of PyTorch.  Raises: as from_numpy(); BufferError, TypeError as
        numpy.from_dlpack().
        """
        return Tensor.from_numpy(ctx, np.from_dlpack(x), name)

    def __dlpack__(self, **options):
        """Return a DLPack capsule of to_numpy(): other libraries share the memory.  Raises: DTypeError for blocks."""
        self._check_shared()
        return self.to_numpy().__dlpack__(**options)

    def __dlpack_device__(self):
        """Return DLPack's (type, number) of the device: the CPU's."""
        self._check_shared()
        return 1, 0

    def _check_shared(self):
        if self.type not in _FORMATS:
            raise DTypeError(f"tensor {self.name!r} of type {self.type.name} has no elements that DLPack knows")
        self.with_data()
        if not c.ggml_backend_buffer_is_host(self.buffer()):
            raise BufferError(f"tensor {self.name!r} is in memory that the CPU cannot address")

    def __getbuffer__(self, Py_buffer * view, int flags):
        cdef c.ggml_tensor * t = self.with_data()
        cdef c.ggml_backend_buffer * memory = self.buffer()
        cdef Owner owner = None
        cdef bytes code = _FORMATS.get(self.type)
        for each in reach([self.ctx]):
            if (<Owner> each).owns(memory):
                owner = <Owner> each
                break
        if owner is None or not c.ggml_backend_buffer_is_host(memory):
            raise BufferError(f"tensor {self.name!r} is in memory that the CPU cannot address")
        if code is None and t.nb[0] != c.ggml_type_size(t.type):
            raise BufferError(_no_rows(self))
        view.readonly = owner.owns_readonly(memory)
        if flags & PyBUF_WRITABLE and view.readonly:
            raise BufferError(f"tensor {self.name!r} is in a read-only mapping")
        cdef Export * export = <Export *> PyMem_Malloc(sizeof(Export))
        if export == NULL:
            raise MemoryError
        describe(export, t, code is None)
        view.obj, view.buf, view.internal = self, t.data, export
        view.shape, view.strides, view.suboffsets = export.shape, export.strides, NULL
        view.itemsize = 1 if code is None else c.ggml_type_size(t.type)
        view.ndim = n_dims(t)
        view.len = view.itemsize
        for i in range(view.ndim):
            view.len *= export.shape[i]
        view.format = format_of(code)
        if not grant(view, flags):
            PyMem_Free(export)
            raise BufferError(f"tensor {self.name!r} is not contiguous")
        export.owner = <PyObject *> owner
        Py_INCREF(owner)
        owner._n_exports += 1

    def __releasebuffer__(self, Py_buffer * view):
        cdef Export * export = <Export *> view.internal
        cdef Owner owner = <Owner> export.owner
        owner._n_exports -= 1
        Py_DECREF(owner)
        PyMem_Free(export)

    def __add__(self, other):
        """Return a + b, or with a number added to each element; b is broadcast.  Wraps: ggml_add, ggml_scale_bias."""
        if isinstance(other, Tensor):
            return _ops().add(home_of(self, other), *_larger_first(self, other))
        return _ops().scale_bias(self.ctx, self, 1.0, other) if isinstance(other, Real) else NotImplemented

    def __radd__(self, other):
        """Return b + a for a number b."""
        return self.__add__(other)

    def __sub__(self, other):
        """Return a - b; b is broadcast, or a number.  Wraps: ggml_sub, ggml_scale_bias."""
        if isinstance(other, Tensor):
            return _ops().sub(home_of(self, other), self, other)
        return _ops().scale_bias(self.ctx, self, 1.0, -other) if isinstance(other, Real) else NotImplemented

    def __rsub__(self, other):
        """Return b - a for a number b.  Wraps: ggml_scale_bias."""
        return _ops().scale_bias(self.ctx, self, -1.0, other) if isinstance(other, Real) else NotImplemented

    def __mul__(self, other):
        """Return a * b element by element; b is broadcast, or a number.  Wraps: ggml_mul, ggml_scale."""
        if isinstance(other, Tensor):
            return _ops().mul(home_of(self, other), *_larger_first(self, other))
        return _ops().scale(self.ctx, self, other) if isinstance(other, Real) else NotImplemented

    def __rmul__(self, other):
        """Return b * a for a number b."""
        return self.__mul__(other)

    def __truediv__(self, other):
        """Return a / b element by element; b is broadcast, or a number.  Wraps: ggml_div, ggml_scale."""
        if isinstance(other, Tensor):
            return _ops().div(home_of(self, other), self, other)
        return _ops().scale(self.ctx, self, 1.0 / other) if isinstance(other, Real) else NotImplemented

    def __neg__(self):
        """Return -a.  Wraps: ggml_neg."""
        return _ops().neg(self.ctx, self)

    def __abs__(self):
        """Return the absolute values of a.  Wraps: ggml_abs."""
        return _ops().abs(self.ctx, self)

    def __matmul__(self, other):
        """Return w @ x = ops.mul_mat(w, x): in NumPy's terms x @ w.T, since ggml's w has its rows as outputs.

        w: [k, m].  x: [k, n], one column for each vector that w is applied to.  Result: [m, n].  In shapes: w (m, k),
        x (n, k), result (n, m).  Wraps: ggml_mul_mat.
        """
        if not isinstance(other, Tensor):
            return NotImplemented
        return _ops().mul_mat(home_of(self, other), self, other)

    def __repr__(self):
        try:
            self.ptr()
        except ClosedError:
            return "<Tensor of a closed Context>"
        operands = ", ".join(repr(each.name) for each in self.src)
        made = f" = {self.op}({operands})" if operands else "" if self.op == "NONE" else f" = {self.op}()"
        strides = "" if self.is_contiguous else f", strides {list(self.nb)}"
        return f"<Tensor {self.name!r} {self.type.name} {list(self.ne)}{made}{strides}{place_of(self)}>"
