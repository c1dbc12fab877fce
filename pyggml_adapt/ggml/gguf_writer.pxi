# GGUFWriter; gguf.pyx includes this.

@cython.final
cdef class GGUFWriter:
    """Own a GGUF header under construction, and write files that begin with it.

    alignment: of tensor data, in bytes; if it is not 32, the key general.alignment is there from the start.
    version: 2 or 3.
    Wraps: gguf_init_empty, gguf_init_from_buffer, gguf_free, gguf_set_*, gguf_add_tensor, gguf_get_meta_data.
    """

    cdef g.gguf_context * _ptr
    cdef dict _tensors  # name -> bytes
    cdef object _nbytes  # of all tensors, padded
    cdef readonly int version
    cdef readonly object alignment

    def __cinit__(self, *, alignment=g.GGUF_DEFAULT_ALIGNMENT, version=g.GGUF_VERSION):
        cdef int64_t n
        self._tensors, self._nbytes = {}, 0
        try:
            n, self.version = index(alignment), index(version)
        except (TypeError, OverflowError):
            raise ParameterError(f"alignment and version must be small integers, not {shown(alignment)} and "
                                 f"{shown(version)}") from None
        if not 0 < n <= ALIGNMENT_MAX or n & (n - 1):
            raise ParameterError(f"alignment must be a power of two up to {ALIGNMENT_MAX}, not {n}")
        if self.version not in (2, g.GGUF_VERSION):
            raise ParameterError(f"version must be 2 or 3, not {self.version}")
        self.alignment = n
        self._start()

    def __dealloc__(self):
        g.gguf_free(self._ptr)

    cdef _start(self):
        """Make a context of our alignment and version: gguf.h takes both only from a file that it reads."""
        cdef g.gguf_init_params params
        params.no_alloc, params.ctx = True, NULL
        self._ptr = g.gguf_init_empty()
        g.gguf_set_val_u32(self._ptr, b"general.alignment", self.alignment)
        start = bytearray(self.header())
        start[4:8] = self.version.to_bytes(4, "little")
        g.gguf_free(self._ptr)
        self._ptr = g.gguf_init_from_buffer(<char *> start, len(start), params)
        if self._ptr == NULL:
            raise AllocError("GGUFWriter: no memory for a header")
        if self.alignment == g.GGUF_DEFAULT_ALIGNMENT:
            g.gguf_remove_key(self._ptr, b"general.alignment")

    @staticmethod
    def copy_of(GGUFReader reader not None):
        """Return a writer with the version, alignment, keys and tensors of a file: to be changed, and written with
        reader.array as data.
        """
        writer = GGUFWriter(alignment=reader.alignment, version=reader.version)
        for key in reader.metadata:
            writer.copy_kv(reader, key)
        for info in reader.tensors.values():
            writer.add_tensor(info.name, info.type, info.ne)
        return writer

    @property
    def keys(self):
        """Return the keys that are set, in the header's order.  Wraps: gguf_get_n_kv, gguf_get_key."""
        return [(<bytes> g.gguf_get_key(self._ptr, i)).decode() for i in range(g.gguf_get_n_kv(self._ptr))]

    def remove(self, str key):
        """Remove a key; a KeyError names it if it is absent.

        Raises: ParameterError for general.alignment, which says where the tensors are.  Wraps: gguf_remove_key.
        """
        if self.alignment != g.GGUF_DEFAULT_ALIGNMENT:
            self._check_alignment(key, None)
        if g.gguf_remove_key(self._ptr, text(key, "key")) < 0:
            raise KeyError(key)

    def set(self, str key, value, str type):
        """Set `key`, new or not, as the last key of the header.

        value: int, float, bool or str; or a sequence of them or an array, which makes an array: of one dimension, and
        no iterator.
        type: gguf.h's name of the type of the value or of its elements: "u8", "i32", "f32", "bool", "str", ...
        Raises: ParameterError if the value does not fit the type.
        """
        cdef bytes name = text(key, "key"), data
        cdef size_t n
        if type not in _TYPE_IDS or type == "arr":
            raise ParameterError(f"{key!r}: {type!r} is not a type of metadata")
        if type == "str":
            self._check_alignment(key, None)
            self._set_strings(name, strings(key, value))
            return
        array = numbers(key, value, type)
        self._check_alignment(key, array.item() if type == "u32" and not array.ndim else None)
        data, n = array.tobytes(), array.size
        if array.ndim:
            g.gguf_set_arr_data(self._ptr, name, <g.gguf_type> <int> _TYPE_IDS[type], PyBytes_AS_STRING(data), n)
        else:
            _set_scalar(self._ptr, name, _TYPE_IDS[type], PyBytes_AS_STRING(data))

    cdef _set_strings(self, bytes key, texts):
        cdef const char ** pointers
        cdef size_t i, n
        if isinstance(texts, bytes):
            g.gguf_set_val_str(self._ptr, key, <bytes> texts)
            return
        n = len(texts)
        pointers = <const char **> PyMem_RawMalloc(max(n, 1) * sizeof(char *))
        if pointers == NULL:
            raise AllocError(f"GGUFWriter: no memory for {n} strings")
        for i in range(n):
            pointers[i] = PyBytes_AS_STRING(texts[i])
        g.gguf_set_arr_str(self._ptr, key, pointers, n)
        PyMem_RawFree(pointers)

    cdef _check_alignment(self, str key, value):
        if key == "general.alignment" and value != self.alignment:
            raise ParameterError(f"general.alignment must be {self.alignment} of type u32, as the writer was told")

    def copy_kv(self, GGUFReader reader not None, str key, str new_key=None):
        """Copy a key of `reader` with its exact type and bytes, as the last key; it may get a new name."""
        cdef int64_t i = reader._keys[key]
        cdef g.gguf_type kind = g.gguf_get_kv_type(reader.ptr(), i)
        cdef str name = key if new_key is None else new_key
        cdef bytes target = text(name, "key")
        cdef bytes data
        cdef list texts = []
        cdef size_t j
        self._check_alignment(name, reader.value(key) if kind == g.GGUF_TYPE_UINT32 else None)
        reader.ptr()
        if kind == g.GGUF_TYPE_STRING:
            g.gguf_set_val_str(self._ptr, target, g.gguf_get_val_str(reader._ptr, i))
        elif kind != g.GGUF_TYPE_ARRAY:
            data = reader._raw(i)
            _set_scalar(self._ptr, target, kind, PyBytes_AS_STRING(data))
        elif g.gguf_get_arr_type(reader._ptr, i) == g.GGUF_TYPE_STRING:
            for j in range(g.gguf_get_arr_n(reader._ptr, i)):
                texts.append(<bytes> g.gguf_get_arr_str(reader._ptr, i, j))
            self._set_strings(target, texts)
        else:
            g.gguf_set_arr_data(self._ptr, target, g.gguf_get_arr_type(reader._ptr, i),
                                g.gguf_get_arr_data(reader._ptr, i), g.gguf_get_arr_n(reader._ptr, i))

    def add_tensor(self, str name, type, ne):
        """Add a tensor after those that are there.

        ne: one to four extents in ggml's order.
        Raises: ParameterError if gguf.h would not read it back: name, shape or type.
        Wraps: gguf_add_tensor.
        """
        cdef c.ggml_tensor t
        cdef bytes raw = text(name, "tensor name")
        try:
            type = Type(type)
            ne = tuple([index(n) for n in ne])
        except ValueError:
            raise ParameterError(f"{name!r}: {shown(type)} is not a type of tensors") from None
        except TypeError:
            raise ParameterError(f"{name!r}: {shown(ne)} is not a shape: one to four integers") from None
        if len(raw) >= c.GGML_MAX_NAME:
            raise ParameterError(f"{name!r}: a tensor name has at most {c.GGML_MAX_NAME - 1} bytes, not {len(raw)}")
        if name in self._tensors:
            raise ParameterError(f"{name!r}: the tensor was added already")
        if not 1 <= len(ne) <= c.GGML_MAX_DIMS or min(ne) < 1 or ne[0] % type.blck_size:
            raise ParameterError(f"{name!r}: a tensor of type {type.name} cannot have the shape {shown(list(ne))}")
        ne = (*ne, 1, 1, 1)[:4]
        nbytes = ne[0] // type.blck_size * type.type_size * ne[1] * ne[2] * ne[3]
        # ggml multiplies ne[0] by the bytes of a whole block before it divides
        if self._nbytes + nbytes * type.blck_size + self.alignment >= 1 << 63:
            raise ParameterError(f"{name!r}: the tensors' sizes do not fit 63 bits")
        memset(&t, 0, sizeof(t))
        memcpy(t.name, <char *> raw, len(raw))
        t.type = <c.ggml_type> <int> type
        t.ne[0], t.ne[1], t.ne[2], t.ne[3] = ne
        t.nb[0] = type.type_size
        t.nb[1] = t.nb[0] * (t.ne[0] // <int64_t> type.blck_size)
        t.nb[2] = t.nb[1] * t.ne[1]
        t.nb[3] = t.nb[2] * t.ne[2]
        g.gguf_add_tensor(self._ptr, &t)
        self._tensors[name] = nbytes
        self._nbytes += nbytes + -nbytes % self.alignment

    @property
    def tensors(self):
        """Return the added tensors' sizes in bytes by name, in file order."""
        return MappingProxyType(self._tensors)

    def header(self):
        """Return the header's bytes, padded to the alignment: what comes before the tensors' data.

        Wraps: gguf_get_meta_size, gguf_get_meta_data.
        """
        cdef bytes data = PyBytes_FromStringAndSize(NULL, g.gguf_get_meta_size(self._ptr))
        g.gguf_get_meta_data(self._ptr, PyBytes_AS_STRING(data))
        return data

    def write(self, path, data, *, overwrite=False):
        """Write a whole file: under its name it appears complete and synced, or not at all.

        data: name -> the tensor's bytes, as a mapping or a function; a buffer, or an iterable of buffers.
        Raises: OverwriteError, FileAccessError; ParameterError if a tensor's bytes are too few or too many.
        """
        with AtomicFile(path, overwrite=overwrite) as file:
            self.write_to(file, data)
            file.commit()

    def write_to(self, file, data):
        """Write header and data to `file`, an AtomicFile or anything with write(); see `write`."""
        get = data.__getitem__ if hasattr(data, "__getitem__") else data
        file.write(self.header())
        for name, nbytes in self._tensors.items():
            blocks = get(name)
            n = 0
            for block in buffers(name, blocks):
                n += block.nbytes
                if n > nbytes:  # there may be no end of them
                    break
                file.write(block)
            if n != nbytes:
                raise ParameterError(f"{name!r}: the tensor has {nbytes} bytes, not {n}")
            file.write(bytes(-nbytes % self.alignment))


cdef _set_scalar(g.gguf_context * ctx, bytes key, int kind, const char * data):
    if kind == g.GGUF_TYPE_UINT8:
        g.gguf_set_val_u8(ctx, key, (<uint8_t *> data)[0])
    elif kind == g.GGUF_TYPE_INT8:
        g.gguf_set_val_i8(ctx, key, (<int8_t *> data)[0])
    elif kind == g.GGUF_TYPE_UINT16:
        g.gguf_set_val_u16(ctx, key, (<uint16_t *> data)[0])
    elif kind == g.GGUF_TYPE_INT16:
        g.gguf_set_val_i16(ctx, key, (<int16_t *> data)[0])
    elif kind == g.GGUF_TYPE_UINT32:
        g.gguf_set_val_u32(ctx, key, (<uint32_t *> data)[0])
    elif kind == g.GGUF_TYPE_INT32:
        g.gguf_set_val_i32(ctx, key, (<int32_t *> data)[0])
    elif kind == g.GGUF_TYPE_UINT64:
        g.gguf_set_val_u64(ctx, key, (<uint64_t *> data)[0])
    elif kind == g.GGUF_TYPE_INT64:
        g.gguf_set_val_i64(ctx, key, (<int64_t *> data)[0])
    elif kind == g.GGUF_TYPE_FLOAT32:
        g.gguf_set_val_f32(ctx, key, (<float *> data)[0])
    elif kind == g.GGUF_TYPE_FLOAT64:
        g.gguf_set_val_f64(ctx, key, (<double *> data)[0])
    else:
        g.gguf_set_val_bool(ctx, key, data[0] != 0)
