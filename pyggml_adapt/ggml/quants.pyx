"""Conversion between NumPy arrays of F32 and ggml's types."""

from libc.stdint cimport int64_t

from pyggml_adapt.ggml cimport libggml as c

import numpy as np

from pyggml_adapt.errors import DTypeError, ParameterError, ShapeError
from pyggml_adapt.ggml.enums import Type


def quantize(array, type, imatrix=None):
    """Return the bytes (uint8, 1-D) of `array` converted to `type`, rows in C order.

    array: convertible to F32, last axis = rows of ne0 elements.  imatrix: F32 [ne0], the importance of each column,
    needed by a few types.  Releases the GIL.
    Raises: ShapeError if ne0 is not a multiple of the type's block, DTypeError if ggml cannot convert to the type,
    ParameterError if a number is not finite or, to be quantised, beyond 1e10.
    Wraps: ggml_quantize_chunk.
    """
    cdef int t = Type(type)
    source = np.ascontiguousarray(array, dtype=np.float32)
    if source.ndim == 0 or source.size == 0:
        raise ShapeError(f"quantize: an array of shape {source.shape} has no rows")
    cdef int64_t n_per_row = source.shape[source.ndim - 1]
    cdef int64_t n_rows = source.size // n_per_row
    if n_per_row % c.ggml_blck_size(<c.ggml_type> t):
        raise ShapeError(f"quantize: rows of {n_per_row} elements are not a multiple of {Type(t).name}'s block size")
    if t == c.GGML_TYPE_F32:
        return source.view(np.uint8).reshape(-1).copy()
    if not (c.ggml_is_quantized(<c.ggml_type> t) or t in (c.GGML_TYPE_F16, c.GGML_TYPE_BF16)) or Type(t).name in _NEVER:
        raise DTypeError(f"quantize: ggml does not convert to {Type(t).name}")
    if c.ggml_is_quantized(<c.ggml_type> t):
        check_range("the array", source, -_LARGEST)
    cdef const float[::1] weights = None
    cdef const float * importance = NULL
    if imatrix is not None:
        weights = np.ascontiguousarray(imatrix, dtype=np.float32)
        if weights.shape[0] != n_per_row:
            raise ShapeError(f"quantize: an imatrix of {weights.shape[0]} columns for rows of {n_per_row}")
        check_range("the imatrix", np.asarray(weights), 0)
        importance = &weights[0]
    elif c.ggml_quantize_requires_imatrix(<c.ggml_type> t):
        raise DTypeError(f"quantize: {Type(t).name} needs an imatrix")
    cdef const float[::1] src = source.reshape(-1)
    out = np.empty(n_rows * c.ggml_row_size(<c.ggml_type> t, n_per_row), dtype=np.uint8)
    cdef unsigned char[::1] dst = out
    with nogil:
        c.ggml_quantize_chunk(<c.ggml_type> t, &src[0], &dst[0], 0, n_rows, n_per_row, importance)
    return out


cdef int check_range(str what, array, float lowest) except -1:
    """Check that numbers are in a range in which ggml's searches for the best blocks neither overflow nor abort."""
    if not (array.min() >= lowest and array.max() <= _LARGEST):
        raise ParameterError(f"quantize: {what} has numbers that are not from {lowest:g} to {_LARGEST:g}")
    return 0


_LARGEST = 1e10
_NEVER = frozenset({"Q8_1", "Q8_K"})  # types of activations inside matmul; ggml_quantize_chunk aborts on them


def dequantize(data, type, int64_t ne0):
    """Return `data`, the bytes of rows of ne0 elements of `type`, as an F32 array [n_rows, ne0].

    data: any contiguous buffer.  Releases the GIL.
    Raises: ShapeError if the bytes are not whole rows, DTypeError if ggml cannot convert from the type.
    Wraps: ggml_type_traits.to_float.
    """
    cdef int t = Type(type)
    source = np.frombuffer(data, dtype=np.uint8)
    if ne0 < 1 or ne0 % c.ggml_blck_size(<c.ggml_type> t):
        raise ShapeError(f"dequantize: rows of {ne0} elements are not a multiple of {Type(t).name}'s block size")
    cdef size_t row = c.ggml_row_size(<c.ggml_type> t, ne0)
    if source.size == 0 or source.size % row:
        raise ShapeError(f"dequantize: {source.size} bytes are not whole rows of {row} bytes")
    cdef int64_t n_rows = source.size // row
    if t == c.GGML_TYPE_F32:
        return source.view(np.float32).reshape(n_rows, ne0).copy()
    cdef const c.ggml_type_traits * traits = c.ggml_get_type_traits(<c.ggml_type> t)
    if traits.to_float == NULL:
        raise DTypeError(f"dequantize: ggml does not convert from {Type(t).name}")
    out = np.empty((n_rows, ne0), dtype=np.float32)
    cdef const unsigned char[::1] src = source
    cdef float[:, ::1] dst = out
    with nogil:
        traits.to_float(&src[0], &dst[0, 0], n_rows * ne0)
    return out


def validate(data, type):
    """Return whether `data`, whole blocks of `type`, holds no NaN and no infinite number.

    data: any contiguous buffer.  Integers are always valid.  Releases the GIL.  For a number that is not, ggml itself
    writes a line to stderr that says where the first is.
    Raises: ShapeError if the bytes are not whole blocks, DTypeError for Q8_1, which ggml does not look into.
    Wraps: ggml_validate_row_data.
    """
    cdef int t = Type(type)
    cdef bint is_valid
    if t == Type.Q8_1:
        raise DTypeError("validate: ggml does not look into Q8_1")
    cdef const unsigned char[::1] source = np.frombuffer(data, dtype=np.uint8)
    cdef size_t nbytes = source.shape[0], block = c.ggml_type_size(<c.ggml_type> t)
    if nbytes == 0 or nbytes % block:
        raise ShapeError(f"validate: {nbytes} bytes are not whole blocks of {block} bytes")
    with nogil:
        is_valid = c.ggml_validate_row_data(<c.ggml_type> t, &source[0], nbytes)
    return is_valid
