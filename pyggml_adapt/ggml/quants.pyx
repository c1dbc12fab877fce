"""Conversion between NumPy arrays and ggml's types."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy

from pyggml_adapt.ggml cimport libggml as c
from pyggml_adapt.ggml.context cimport MAX_ELEMENTS

from operator import index

import numpy as np

from pyggml_adapt.errors import DTypeError, ParameterError, ShapeError
from pyggml_adapt.ggml.enums import Type

# types whose elements are NumPy's own, and which ggml does not convert
_PLAIN = {Type.F32: np.float32, Type.F64: np.float64, Type.I8: np.int8, Type.I16: np.int16, Type.I32: np.int32,
          Type.I64: np.int64}
# types of activations inside matmul, to which ggml_quantize_chunk aborts: q is to be multiplied by d
_ACTIVATIONS = {
    Type.Q8_1: np.dtype([("d", np.float16), ("s", np.float16), ("q", np.int8, 32)]),
    Type.Q8_K: np.dtype([("d", np.float32), ("q", np.int8, 256), ("bsums", np.int16, 16)]),
}
# up to these nothing that ggml's searches add up, at most importance * number^3 and some, is beyond F32, so that one is
# the best; scales are F16 in most types, fitted to the numbers
cdef float LARGEST = 1e8, MOST_IMPORTANT = 1e10, SURELY_FINITE = 1e3

cdef enum:
    CHUNK = 1 << 24  # elements that are converted by one call: ggml counts blocks in an int
    COPIED = 1 << 18  # elements of a quantised type: first they are copied, so that no other thread can change them


def quantize(array, type, imatrix=None):
    """Return the bytes (uint8, 1-D) of `array` converted to `type`, rows in C order.

    array: real numbers, last axis = rows of ne0 elements.  imatrix: F32 [ne0], the importance of each column, or
    [n, ne0] for as many equal parts of the rows, as experts are; IQ2_XXS, IQ2_XS and IQ1_S need one.  Releases the GIL.
    Raises: ShapeError if ne0 is not a multiple of the type's block or the imatrix has another shape, DTypeError if
    ggml cannot convert to the type or the array has no real numbers, ParameterError if a number is none of an I type
    or, to be quantised, not finite, beyond 1e8 or beyond what the type can hold, or an importance is not 0 to 1e10.
    Wraps: ggml_quantize_chunk, ggml_quantize_requires_imatrix.
    """
    type = Type(type)
    source = np.asarray(array)
    if source.dtype.kind not in "biuf":
        raise DTypeError(f"quantize: an array of {source.dtype} has no real numbers")
    check_row("quantize", source.shape[source.ndim - 1] if source.ndim else 1, type)
    if type in _ACTIVATIONS:
        raise DTypeError(f"quantize: ggml does not convert to {type.name}")
    if type in _PLAIN:
        return exact(source, type)
    with np.errstate(over="ignore"):
        source = np.ascontiguousarray(source, dtype=np.float32)
    cdef int64_t ne0 = source.shape[source.ndim - 1] if source.ndim else 1
    weights = read_imatrix(imatrix, type, ne0, source.size // ne0)
    out = np.empty(source.size // ne0 * type.row_size(ne0), dtype=np.uint8)
    if source.size:
        convert(source.reshape(-1), out, type, ne0, weights, type.is_quantized)
        if type is Type.MXFP4:
            clear_wrapped(out.reshape(-1, type.type_size))
        if type.is_quantized and max(source.max(), -source.min()) > SURELY_FINITE:
            check_finite(out, type, ne0)
    return out


cdef int clear_wrapped(blocks) except -1:
    """Let blocks be 0 whose exponent ggml found to be negative, and took for one beyond that of any number here."""
    blocks[blocks[:, 0] > 200] = 0
    return 0


cdef int check_finite(out, type, ne0) except -1:
    """Check that no block got a scale that is not finite."""
    size = type.row_size(ne0)
    for i in range(0, out.size, size):
        if not np.isfinite(dequantize(out[i:i + size], type, ne0)).all():
            raise ParameterError(f"quantize: row {i // size} of the array has numbers that {type.name} cannot hold")
    return 0


cdef int convert(const float[::1] source, unsigned char[::1] out, int type, int64_t ne0, weights,
                 bint checked) except -1:
    """Fill `out`.  weights: None, or one row for each part of the rows.  checked: whether numbers have limits."""
    cdef int64_t n_rows = source.shape[0] // ne0, i = 0, n
    cdef int64_t per_part = n_rows if weights is None else n_rows // len(weights)
    cdef int64_t at_once = max((COPIED if checked else CHUNK) // ne0, 1)
    cdef size_t row = c.ggml_row_size(<c.ggml_type> type, ne0)
    cdef const float[:, ::1] each
    cdef float[::1] copied = np.empty(min(at_once, n_rows) * ne0 if checked else 1, dtype=np.float32)
    cdef const float * importance = NULL
    cdef const float * start
    cdef bint sound = True
    if weights is not None:
        each = weights
        importance = &each[0, 0]
    with nogil:
        while i < n_rows and sound:
            n = min(at_once, per_part - i % per_part)
            start = &source[i * ne0]
            if checked:
                memcpy(&copied[0], start, n * ne0 * sizeof(float))
                start = &copied[0]
                sound = are_within(start, n * ne0, -LARGEST, LARGEST)
            if sound:
                c.ggml_quantize_chunk(<c.ggml_type> type, start, &out[<size_t> i * row], 0, n, ne0,
                                      NULL if importance == NULL else importance + i // per_part * ne0)
            i += n
    return 0 if sound else refuse("the array", -LARGEST, LARGEST)


cdef bint are_within(const float * numbers, int64_t n, float lowest, float largest) noexcept nogil:
    """Return whether numbers are in a range in which ggml's searches for the best blocks neither overflow nor abort."""
    cdef int64_t i
    cdef bint sound = True
    for i in range(n):
        sound = sound & (numbers[i] >= lowest) & (numbers[i] <= largest)
    return sound


cdef int refuse(str what, float lowest, float largest) except -1:
    raise ParameterError(f"quantize: {what} has numbers that are not from {lowest:g} to {largest:g}")


cdef read_imatrix(imatrix, type, int64_t ne0, int64_t n_rows):
    """Return the imatrix as F32 [n, ne0], None if there is none."""
    if imatrix is None:
        if c.ggml_quantize_requires_imatrix(<c.ggml_type> <int> type):
            raise DTypeError(f"quantize: {type.name} needs an imatrix")
        return None
    weights = np.asarray(imatrix)
    if weights.dtype.kind not in "biuf":
        raise DTypeError(f"quantize: an imatrix of {weights.dtype} has no real numbers")
    if weights.ndim not in (1, 2) or weights.shape[weights.ndim - 1] != ne0:
        raise ShapeError(f"quantize: an imatrix of shape {weights.shape} for rows of {ne0}")
    if weights.ndim == 2 and (not len(weights) or n_rows % len(weights)):
        raise ShapeError(f"quantize: an imatrix of {len(weights)} parts for {n_rows} rows")
    with np.errstate(over="ignore"):
        own = np.array(np.atleast_2d(weights), dtype=np.float32, order="C")  # a copy, as in convert()
    check_weights(own)
    return own


cdef int check_weights(const float[:, ::1] weights) except -1:
    if are_within(&weights[0, 0], weights.shape[0] * weights.shape[1], 0, MOST_IMPORTANT):
        return 0
    return refuse("the imatrix", 0, MOST_IMPORTANT)


cdef int64_t check_row(str op, ne0, type) except -1:
    """Return ne0, checked to be the elements of a row of blocks, which a tensor can have."""
    cdef int64_t n
    try:
        n = index(ne0)
    except OverflowError:
        n = -1
    if n < 1 or n % <int64_t> type.blck_size:
        raise ShapeError(f"{op}: rows of {ne0} elements are not a multiple of {type.name}'s block size")
    if n > MAX_ELEMENTS:
        raise ShapeError(f"{op}: rows of {ne0} elements are longer than any tensor's")
    return n


cdef exact(array, type):
    """Return the bytes of a type of NumPy's: of F32 and F64 as NumPy rounds, of an I type only if nothing changes."""
    with np.errstate(invalid="ignore"):
        found = np.array(array, dtype=_PLAIN[type], order="C")
    if type not in (Type.F32, Type.F64) and not np.array_equal(found, array):
        raise ParameterError(f"quantize: the array has numbers that are none of {type.name}")
    return found.reshape(-1).view(np.uint8)


def dequantize(data, type, ne0):
    """Return `data`, the bytes of rows of ne0 elements of `type`, as an array [n_rows, ne0].

    It has F32 elements, but F64 and the I types have NumPy's of the same name.  data: any contiguous buffer.
    Releases the GIL.
    Raises: ShapeError if the bytes are not whole rows, or ne0 is no row of a tensor.
    Wraps: ggml_type_traits.to_float.
    """
    type = Type(type)
    source = np.frombuffer(data, dtype=np.uint8)
    cdef int64_t n = check_row("dequantize", ne0, type)
    cdef size_t row = type.row_size(n)
    if source.size % row:
        raise ShapeError(f"dequantize: {source.size} bytes are not whole rows of {row} bytes")
    n_rows = source.size // row
    if type in _PLAIN:
        return source.view(_PLAIN[type]).reshape(n_rows, n).copy()
    if type in _ACTIVATIONS:
        blocks = source.view(_ACTIVATIONS[type])
        return (blocks["q"] * blocks["d"].astype(np.float32)[:, None]).reshape(n_rows, n)
    out = np.empty((n_rows, n), dtype=np.float32)
    if out.size:
        if source.ctypes.data % 4:  # blocks hold 16-bit and 32-bit numbers
            source = source.copy()
        expand(source, out, type)
    return out


cdef int expand(const unsigned char[::1] source, float[:, ::1] out, int type) except -1:
    """Fill `out` by ggml's conversion to F32."""
    cdef const c.ggml_type_traits * traits = c.ggml_get_type_traits(<c.ggml_type> type)
    cdef size_t row = c.ggml_row_size(<c.ggml_type> type, out.shape[1])
    cdef int64_t i
    if traits.to_float == NULL:
        raise DTypeError(f"dequantize: ggml does not convert from {Type(type).name}")
    with nogil:
        for i in range(out.shape[0]):
            traits.to_float(&source[<size_t> i * row], &out[i, 0], out.shape[1])
    return 0


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
