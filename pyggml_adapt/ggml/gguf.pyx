"""GGUF files, over ggml's gguf.h: GGUFReader and GGUFWriter.

gguf.h checks what it reads but aborts the process on wrong calls, and lets a header ask for much memory.  So what it
would abort on is refused before each call, and sizes, offsets and names are checked again after each read.
"""

import errno
import mmap
import os
import stat
from types import MappingProxyType

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen, strncpy

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml cimport libgguf as g

import numpy as np

from pyggml_adapt.errors import (
    AllocError, ClosedError, FileAccessError, FileFormatError, ParameterError,
)
from pyggml_adapt.ggml.atomic import AtomicFile
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf_values import DTYPES as _DTYPES
from pyggml_adapt.ggml.gguf_values import Metadata, TensorInfo, buffers, numbers, text

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

ALIGNMENT_MAX = 1 << 24  # bytes; ggml pads headers to the alignment byte by byte
HEADER_NBYTES_MAX = 128 << 20  # ggml may hold 8 bytes in memory for each byte of a header
COUNT_MAX = 1 << 18  # of tensors, and of metadata keys; ggml holds 400 bytes for each

_TYPE_NAMES = {
    g.GGUF_TYPE_UINT8: "u8", g.GGUF_TYPE_INT8: "i8", g.GGUF_TYPE_UINT16: "u16", g.GGUF_TYPE_INT16: "i16",
    g.GGUF_TYPE_UINT32: "u32", g.GGUF_TYPE_INT32: "i32", g.GGUF_TYPE_UINT64: "u64", g.GGUF_TYPE_INT64: "i64",
    g.GGUF_TYPE_FLOAT32: "f32", g.GGUF_TYPE_FLOAT64: "f64", g.GGUF_TYPE_BOOL: "bool", g.GGUF_TYPE_STRING: "str",
    g.GGUF_TYPE_ARRAY: "arr",
}
_TYPE_IDS = {name: number for number, name in _TYPE_NAMES.items()}

include "gguf_parse.pxi"


cdef class GGUFReader:
    """Own a parsed GGUF header and the open file; tensor data is not read.

    path: a GGUF file of version 2 or 3, little-endian.  metadata: key -> int, float, bool, str, list of str or
    read-only NumPy array.  tensors: name -> TensorInfo.  Both are in file order.
    Strings end at their first NUL, as they do for everyone who reads through gguf.h.
    Raises: FileAccessError if the file cannot be read; FileFormatError, with offset or key, if it is not sound.
    Wraps: gguf_init_from_callback, gguf_free, gguf_get_*.  The GIL is released while ggml parses.
    """

    cdef g.gguf_context * _ptr
    cdef int _fd
    cdef dict _keys, _values
    cdef readonly str path
    cdef readonly int version
    cdef readonly object alignment, data_offset, file_nbytes, tensors

    def __cinit__(self, path):
        self._fd = -1
        self._keys, self._values = {}, {}
        self.path = os.fsdecode(path)
        self._open()
        self._load()
        self._read_keys()
        self.tensors = MappingProxyType(self._read_tensors())

    def __dealloc__(self):
        g.gguf_free(self._ptr)  # accepts NULL
        if self._fd >= 0:
            close(self._fd)

    cdef g.gguf_context * ptr(self) except NULL:
        if self._ptr == NULL:
            raise ClosedError(f"{self.path}: the reader is closed")
        return self._ptr

    cdef _open(self):
        try:
            # O_NONBLOCK: a pipe must not block the open
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            info = os.fstat(self._fd)
        except (OSError, ValueError) as exc:
            raise FileAccessError.of(self.path, exc) from exc
        if stat.S_ISDIR(info.st_mode):
            raise FileAccessError.of(self.path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
        if not stat.S_ISREG(info.st_mode):
            raise FileAccessError(f"{self.path}: not a regular file")
        self.file_nbytes = info.st_size

    cdef _load(self):
        cdef Window * w
        cdef list why = []
        cdef uint64_t nbytes = min(self.file_nbytes, HEADER_NBYTES_MAX)
        self._check_start()
        w = <Window *> PyMem_RawMalloc(sizeof(Window))
        if w == NULL:
            raise AllocError(f"{self.path}: no memory to read the header")
        w.fd, w.start, w.n, w.pos = self._fd, 0, 0, 0
        try:
            self._ptr = _parse(w, nbytes, why)
            if self._ptr == NULL:
                raise self._bad(f"{why[0] or 'no sound GGUF'}; the header is cut short or damaged here", offset=w.pos)
        finally:
            PyMem_RawFree(w)
        self.version = g.gguf_get_version(self._ptr)
        self.alignment = g.gguf_get_alignment(self._ptr)
        self.data_offset = g.gguf_get_data_offset(self._ptr)
        if self.alignment > ALIGNMENT_MAX:
            raise self._bad(f"an alignment of {self.alignment} bytes is not supported", key="general.alignment")

    cdef _check_start(self):
        """Check the 24 bytes before the metadata, whose faults gguf.h reports in terms of its own."""
        try:
            start = os.pread(self._fd, 24, 0)
        except OSError as exc:
            raise FileAccessError.of(self.path, exc) from exc
        if not start:
            raise self._bad("the file is empty", offset=0)
        if start[:4] != b"GGUF":
            raise self._bad("not a GGUF file: it does not start with 'GGUF'", offset=0)
        if len(start) < 24:
            raise self._bad(f"the file ends within its header, after {len(start)} bytes", offset=len(start))
        version = int.from_bytes(start[4:8], "little")
        if version & 0xFFFF == 0 and version:
            raise self._bad("big-endian GGUF is not supported", offset=4)
        if version not in (2, g.GGUF_VERSION):
            raise self._bad(f"GGUF version {version} is not supported, only 2 and 3 are", offset=4)
        for at, what, least in ((8, "tensors", 32), (16, "metadata keys", 14)):
            count = int.from_bytes(start[at:at + 8], "little")
            if count > min(COUNT_MAX, self.file_nbytes // least):
                raise self._bad(f"{count} {what} are declared, more than the file can hold or {COUNT_MAX}", offset=at)

    cdef _read_keys(self):
        cdef int64_t i
        for i in range(g.gguf_get_n_kv(self._ptr)):
            key = self._name(g.gguf_get_key(self._ptr, i), f"metadata key {i}")
            if key in self._keys:
                raise self._bad("metadata key is there twice", key=key)
            self._keys[key] = i

    cdef dict _read_tensors(self):
        cdef int64_t i
        cdef const int64_t * ne
        tensors = {}
        for i in range(g.gguf_get_n_tensors(self._ptr)):
            name = self._name(g.gguf_get_tensor_name(self._ptr, i), f"name of tensor {i}")
            if name in tensors:
                raise self._bad("tensor is there twice", key=name)
            ne = g.gguf_get_tensor_ne(self._ptr, i)
            tensors[name] = self._check_tensor(name, Type(<int> g.gguf_get_tensor_type(self._ptr, i)),
                                               (ne[0], ne[1], ne[2], ne[3]), g.gguf_get_tensor_offset(self._ptr, i))
        return tensors

    cdef _check_tensor(self, str name, type, tuple ne, size_t offset):
        if min(ne) < 1:
            raise self._bad(f"tensor has the empty shape {list(ne)}", key=name)
        nbytes = ne[0] // type.blck_size * type.type_size * ne[1] * ne[2] * ne[3]
        start = self.data_offset + offset
        if start + nbytes > self.file_nbytes:
            raise self._bad(f"tensor's {nbytes} bytes end at byte {start + nbytes}, after the end of the file at "
                            f"{self.file_nbytes}; the file is cut short or damaged", key=name, offset=start)
        return TensorInfo(name, type, ne, start, nbytes)

    cdef str _name(self, const char * chars, what):
        try:
            name = chars[:strlen(chars)].decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not valid UTF-8") from None
        if not name:
            raise self._bad(f"{what} is empty")
        return name

    def _bad(self, message, offset=None, key=None):
        if key is not None:
            message = f"{key!r}: {message}"
        return FileFormatError(message, path=self.path, offset=offset, key=key)

    @property
    def metadata(self):
        """Return the key-value pairs as a mapping in file order; values are converted on first access."""
        self.ptr()
        return Metadata(self, self._keys)

    def value(self, str key):
        """Return the value of `key`; a KeyError names it if it is absent.

        Numeric arrays are read-only copies.  In arrays of str, bytes that are not UTF-8 become surrogate escapes.
        Raises: FileFormatError if a string is not valid UTF-8.
        Wraps: gguf_get_val_*, gguf_get_arr_*.
        """
        if key not in self._values:
            self._values[key] = self._value(self._keys[key], key)
        return self._values[key]

    cdef _value(self, int64_t i, str key):
        cdef g.gguf_context * ctx = self.ptr()
        cdef const char * chars
        kind, element = self.kv_type(key)
        if kind == "arr":
            return self._strings(i) if element == "str" else np.frombuffer(self._raw(i), _DTYPES[element])
        if kind != "str":
            return np.frombuffer(self._raw(i), _DTYPES[kind])[0].item()
        chars = g.gguf_get_val_str(ctx, i)
        try:
            return chars[:strlen(chars)].decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad("value is not valid UTF-8", key=key) from None

    cdef bytes _raw(self, int64_t i):
        """Return the bytes of a numeric value or array."""
        cdef size_t n = 1
        cdef const void * data
        kind = g.gguf_get_kv_type(self._ptr, i)
        if kind == g.GGUF_TYPE_ARRAY:
            kind = g.gguf_get_arr_type(self._ptr, i)
            n = g.gguf_get_arr_n(self._ptr, i)
            data = g.gguf_get_arr_data(self._ptr, i)
        else:
            data = g.gguf_get_val_data(self._ptr, i)
        return PyBytes_FromStringAndSize(<const char *> data, n * _DTYPES[_TYPE_NAMES[kind]].itemsize) if n else b""

    cdef list _strings(self, int64_t i):
        cdef const char * chars
        cdef size_t j
        cdef list texts = []
        for j in range(g.gguf_get_arr_n(self._ptr, i)):
            chars = g.gguf_get_arr_str(self._ptr, i, j)
            texts.append(PyUnicode_DecodeUTF8(chars, strlen(chars), "surrogateescape"))
        return texts

    def kv_type(self, str key):
        """Return (type, element type) of a key: ("u32", None), ("arr", "str"), ...  Wraps: gguf_get_kv_type."""
        cdef int64_t i = self._keys[key]
        kind = _TYPE_NAMES[g.gguf_get_kv_type(self.ptr(), i)]
        return (kind, _TYPE_NAMES[g.gguf_get_arr_type(self._ptr, i)] if kind == "arr" else None)

    def fileno(self):
        """Return the file's descriptor, which the reader owns."""
        if self._fd < 0:
            raise ClosedError(f"{self.path}: the reader is closed")
        return self._fd

    def map(self):
        """Return a new read-only mmap of the whole file, which outlives the reader."""
        fd = self.fileno()
        try:
            return mmap.mmap(fd, self.file_nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise FileAccessError.of(self.path, exc) from exc

    @property
    def closed(self):
        """Return whether close() was called."""
        return self._ptr == NULL

    def close(self):
        """Free the header and close the file; `tensors` stays, `metadata` does not.  Closing twice is allowed."""
        g.gguf_free(self._ptr)
        self._ptr = NULL
        self._values.clear()
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, *exc):
        self.close()


cdef class GGUFWriter:
    """Own a GGUF header under construction, and write files that begin with it.

    alignment: of tensor data, in bytes; if it is not 32, the key general.alignment is there from the start.
    version: 2 or 3.
    Wraps: gguf_init_from_buffer, gguf_free, gguf_set_*, gguf_add_tensor, gguf_get_meta_data.
    """

    cdef g.gguf_context * _ptr
    cdef dict _tensors  # name -> bytes
    cdef object _nbytes  # of all tensors, padded
    cdef readonly int version
    cdef readonly object alignment

    def __cinit__(self, *, alignment=g.GGUF_DEFAULT_ALIGNMENT, version=g.GGUF_VERSION):
        self._tensors, self._nbytes = {}, 0
        if not 0 < alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
            raise ParameterError(f"alignment must be a power of two up to {ALIGNMENT_MAX}, not {alignment}")
        if version not in (2, g.GGUF_VERSION):
            raise ParameterError(f"version must be 2 or 3, not {version}")
        self.alignment, self.version = alignment, version
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

    def set(self, str key, value, str type):
        """Set `key`, new or not, as the last key of the header.

        value: int, float, bool or str; or a sequence of them or an array, which makes an array.
        type: gguf.h's name of the type of the value or of its elements: "u8", "i32", "f32", "bool", "str", ...
        Raises: ParameterError if the value does not fit the type.
        """
        cdef bytes name = text(key, "key")
        if type not in _TYPE_IDS or type == "arr":
            raise ParameterError(f"{key!r}: {type!r} is not a type of metadata")
        is_array = isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim > 0
        self._check_alignment(key, None if is_array or type != "u32" else value)
        if type == "str":
            self._set_strings(name, [text(v, key, True) for v in value] if is_array else text(value, key, True))
            return
        data = numbers(key, value, type)
        if is_array:
            g.gguf_set_arr_data(self._ptr, name, <g.gguf_type> <int> _TYPE_IDS[type], PyBytes_AS_STRING(data),
                                len(data) // _DTYPES[type].itemsize)
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

    def copy_kv(self, GGUFReader reader, str key, str new_key=None):
        """Copy a key of `reader` with its exact type and bytes, as the last key; it may get a new name."""
        cdef int64_t i = reader._keys[key]
        cdef g.gguf_type kind = g.gguf_get_kv_type(reader.ptr(), i)
        cdef str name = key if new_key is None else new_key
        cdef bytes target = text(name, "key")
        cdef bytes data
        cdef size_t j
        self._check_alignment(name, reader.value(key) if kind == g.GGUF_TYPE_UINT32 else None)
        if kind == g.GGUF_TYPE_STRING:
            g.gguf_set_val_str(self._ptr, target, g.gguf_get_val_str(reader._ptr, i))
        elif kind != g.GGUF_TYPE_ARRAY:
            data = reader._raw(i)
            _set_scalar(self._ptr, target, kind, PyBytes_AS_STRING(data))
        elif g.gguf_get_arr_type(reader._ptr, i) == g.GGUF_TYPE_STRING:
            self._set_strings(target, [<bytes> g.gguf_get_arr_str(reader._ptr, i, j)
                                       for j in range(g.gguf_get_arr_n(reader._ptr, i))])
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
            type, ne = Type(type), tuple(ne)
        except ValueError:
            raise ParameterError(f"{name!r}: {type!r} is not a type of tensors") from None
        if len(raw) >= c.GGML_MAX_NAME:
            raise ParameterError(f"{name!r}: a tensor name has at most {c.GGML_MAX_NAME - 1} bytes, not {len(raw)}")
        if name in self._tensors:
            raise ParameterError(f"{name!r}: the tensor was added already")
        if not 1 <= len(ne) <= c.GGML_MAX_DIMS or min(ne) < 1 or ne[0] % type.blck_size:
            raise ParameterError(f"{name!r}: a tensor of type {type.name} cannot have the shape {list(ne)}")
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
            for block in buffers(blocks):
                n += block.nbytes
                if n <= nbytes:
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
