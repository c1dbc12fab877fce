"""The parts of gguf.pyx that need no C: a tensor's entry, the metadata mapping, and conversions of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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


def text(value: object, what: str, may_be_empty: bool = False) -> bytes:
    """Return a str as bytes that gguf.h can take: it ends strings at NUL."""
    if not isinstance(value, str):
        raise ParameterError(f"{what}: a str is needed, not {value!r}")
    data = value.encode("utf-8", "surrogateescape")
    if b"\0" in data or not (data or may_be_empty):
        raise ParameterError(f"{what}: {value!r} is empty or holds a NUL character, which gguf.h cannot write")
    return data


def numbers(key: str, value: Any, type: str) -> bytes:
    """Return the bytes of a number, or of a one-dimensional sequence of them, in the given type."""
    kind = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[DTYPES[type].kind]
    try:
        array = np.asarray(value)
        if array.ndim > 1 or (array.size and array.dtype.kind not in kind):
            raise ValueError
        if array.size and kind == "iu":
            limits = np.iinfo(DTYPES[type])
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise ValueError
        return array.astype(DTYPES[type]).tobytes()
    except (ValueError, TypeError, OverflowError):
        raise ParameterError(f"{key!r}: the value {value!r:.60} does not fit the type {type}") from None


def buffers(data: Any) -> Iterator[memoryview]:
    """Yield memoryviews of bytes from a buffer or an iterable of buffers."""
    blocks: Iterable[Any]
    try:
        blocks = (memoryview(data),)
    except TypeError:
        blocks = data
    for block in blocks:
        view = memoryview(block)
        yield (view if view.c_contiguous else memoryview(bytes(view))).cast("B")
