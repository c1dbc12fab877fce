"""GGUF files, over ggml's gguf.h: GGUFReader and GGUFWriter.

gguf.h checks what it reads but aborts the process on wrong calls, and lets a header ask for much memory.  So what it
would abort on is refused before each call, and sizes, offsets and names are checked again after each read.
"""

import errno
import mmap
import os
import stat
from operator import index
from types import MappingProxyType

cimport cython
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
from pyggml_adapt.files import AtomicFile
from pyggml_adapt.ggml.enums import Type
from pyggml_adapt.ggml.gguf_values import DTYPES as _DTYPES
from pyggml_adapt.ggml.gguf_values import Metadata, TensorInfo, array_of, buffers, numbers, shown, strings, text

# sets the callback of ggml's log, before which ours is put
import pyggml_adapt.ggml.status  # no-cython-lint

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<fcntl.h>":
    enum: F_DUPFD_CLOEXEC
    int fcntl(int fd, int cmd, int arg)

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


@cython.final
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
    cdef object _map
    cdef dict _keys, _values
    cdef readonly str path
    cdef readonly int version
    cdef readonly object alignment, data_offset, file_nbytes, tensors

    def __cinit__(self, path):
        self._fd = -1
        self._keys, self._values = {}, {}
        self.path = str(os.fsdecode(path))  # which may be of a subclass
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
        cdef const char * chars
        kind, element = self.kv_type(key)
        if kind == "arr":
            return self._strings(i) if element == "str" else np.frombuffer(self._raw(i), _DTYPES[element])
        if kind != "str":
            return np.frombuffer(self._raw(i), _DTYPES[kind])[0].item()
        chars = g.gguf_get_val_str(self.ptr(), i)
        try:
            return chars[:strlen(chars)].decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad("value is not valid UTF-8", key=key) from None

    cdef bytes _raw(self, int64_t i):
        """Return the bytes of a numeric value or array."""
        cdef size_t n = 1
        cdef const void * data
        kind = g.gguf_get_kv_type(self.ptr(), i)
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
        for j in range(g.gguf_get_arr_n(self.ptr(), i)):
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
        self.fileno()
        cdef int fd = fcntl(self._fd, F_DUPFD_CLOEXEC, 0)  # one that close() does not close on another thread
        try:
            return mmap.mmap(fd, self.file_nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise FileAccessError.of(self.path, exc) from exc
        finally:
            if fd >= 0:
                close(fd)

    def array(self, str name):
        """Return a tensor's elements, ne turned round, as a read-only NumPy array; a KeyError names it if it is absent.

        It shows the mapped file without a copy, and outlives the reader.  Quantised types and BF16 come as their raw
        bytes, one row of blocks per last axis (uint8): see dequantize().
        """
        info = self.tensors[name]
        self.ptr()
        if self._map is None:
            self._map = self.map()
        return array_of(info, self._map)

    @property
    def closed(self):
        """Return whether close() was called."""
        return self._ptr == NULL

    def close(self):
        """Free the header and close the file; `tensors` stays, `metadata` does not.  Closing twice is allowed."""
        g.gguf_free(self._ptr)
        self._ptr, self._map = NULL, None
        self._values.clear()
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1

    def __enter__(self):
        self.ptr()
        return self

    def __exit__(self, *exc):
        self.close()


include "gguf_writer.pxi"
