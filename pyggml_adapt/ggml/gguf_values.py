"""The parts of gguf.pyx that need no C: a tensor's entry, the metadata mapping, and conversions of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pyggml_adapt.errors import ParameterError
from pyggml_adapt.ggml.enums import Type

if TYPE_CHECKING:
    from pyggml_adapt.ggml.gguf import GGUFReader

DTYPES: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "u16": np.dtype("u2"),
    "i16": np.dtype("i2"),
    "u32": np.dtype("u4"),
    "i32": np.dtype("i4"),
    "u64": np.dtype("u8"),
    "i64": np.dtype("i8"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bool": np.dtype("?"),
}
ELEMENTS = {
    Type.F32: "f4", Type.F16: "f2", Type.F64: "f8", Type.I8: "i1", Type.I16: "i2", Type.I32: "i4", Type.I64: "i8",
}  # fmt: skip


class TensorInfo(NamedTuple):
    """A tensor's entry in a GGUF header.  offset: its first byte, counted from the start of the file."""

    name: str
    type: Type
    ne: tuple[int, int, int, int]
    offset: int
    nbytes: int

    @property
    def n_dims(self) -> int:
        """Return the number of dimensions, trailing ones left out; at least 1."""
        return max((i + 1 for i in range(4) if self.ne[i] > 1), default=1)


def array_of(info: TensorInfo, data: Any) -> np.ndarray:
    """Return a tensor's elements as an array over `data`, the whole file; those of blocks as bytes, row by row."""
    shape, dtype = info.ne[: info.n_dims][::-1], ELEMENTS.get(info.type)
    if dtype is None:
        shape, dtype = (*shape[:-1], info.type.row_size(info.ne[0])), "u1"
    whole = np.frombuffer(data, dtype=np.uint8)  # whose base stays exported, so that the file cannot be unmapped
    return np.ndarray(shape, dtype, whole, info.offset)


class Metadata(Mapping[str, Any]):
    """A GGUFReader's key-value pairs; values are converted when asked for, then kept by the reader."""

    def __init__(self, reader: GGUFReader, keys: Mapping[str, int]):
        self._reader = reader
        self._keys = keys

    def __getitem__(self, key: str) -> Any:
        return self._reader.value(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __repr__(self) -> str:
        return f"<metadata of {self._reader.path}: {len(self)} keys>"


type_of = type  # a parameter has its name below


def shown(value: object) -> str:
    """Return what a message says of a value: the start of its repr, which may be long, or refused."""
    try:
        return " ".join(f"{value!r:.60}".split())
    except Exception:
        return f"<{type(value).__name__}>"


def text(value: object, what: str, may_be_empty: bool = False, errors: str = "strict") -> bytes:
    """Return a str as bytes that gguf.h can take: it ends strings at NUL.  errors: as str.encode's."""
    if not isinstance(value, str):
        raise ParameterError(f"{what}: a str is needed, not {shown(value)}")
    try:
        data = str.encode(value, "utf-8", errors)  # a subclass may have an encode() of its own
    except UnicodeEncodeError:
        raise ParameterError(f"{what}: {shown(value)} has a lone surrogate, which UTF-8 cannot hold") from None
    if b"\0" in data or not (data or may_be_empty):
        raise ParameterError(f"{what}: {shown(value)} is empty or holds a NUL character, which gguf.h cannot write")
    return data


def strings(key: str, value: Any) -> bytes | list[bytes]:
    """Return the bytes of a str, or of each str of a sequence, in which surrogate escapes become what they stand for.

    So a list that GGUFReader.value() has returned is written as it was.
    """
    _refuse_iterator(key, value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        return text(value, f"{key!r}", True)
    return [text(each, f"{key!r}", True, "surrogateescape") for each in value]


def numbers(key: str, value: Any, type: str) -> np.ndarray:
    """Return a number, or a one-dimensional sequence of them, as an array of no or one dimension of the given type."""
    kind = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[DTYPES[type].kind]
    _refuse_iterator(key, value)
    try:
        array = np.asarray(value)
        if array.ndim > 1 or (array.size and array.dtype.kind not in kind):
            raise ValueError
        if kind != "b" and isinstance(value, (list, tuple)) and not {bool, np.bool_}.isdisjoint(map(type_of, value)):
            raise ValueError  # NumPy takes them for 0 and 1 among numbers
        if array.size and kind == "iu":
            limits = np.iinfo(DTYPES[type])
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise ValueError
        with np.errstate(over="ignore"):
            found = array.astype(DTYPES[type])
        if kind == "iuf" and (np.isinf(found) != np.isinf(array)).any():
            raise ValueError
        return found
    except (ValueError, TypeError, OverflowError):
        raise ParameterError(f"{key!r}: the value {shown(value)} does not fit the type {type}") from None


def _refuse_iterator(key: str, value: object) -> None:
    if isinstance(value, Iterator):
        raise ParameterError(f"{key!r}: {shown(value)} is no sequence: make a list of it")


def buffers(name: str, data: Any) -> Iterator[memoryview]:
    """Yield memoryviews of bytes from a buffer or an iterable of buffers, the data of tensor `name`."""
    try:
        blocks = iter((memoryview(data),))
    except (TypeError, ValueError):  # ValueError: an array of what has no buffer, as dates
        try:
            blocks = iter(data)
        except TypeError:
            raise ParameterError(f"{name!r}: {shown(data)} is neither a buffer nor an iterable of buffers") from None
    for block in blocks:
        try:
            view = memoryview(block)
        except (TypeError, ValueError):
            raise ParameterError(f"{name!r}: {shown(block)} is no buffer") from None
        try:
            yield view.cast("B")
        except (TypeError, ValueError):  # of strides, shapes with a zero or elements that cast() does not take
            yield memoryview(view.tobytes())
