"""GGUF bytes put together by hand, for files that no writer of ours would make."""

from __future__ import annotations

import struct
from collections.abc import Sequence

STRING, ARRAY, U16, U32, I32 = 8, 9, 2, 4, 5


def string(text: str | bytes) -> bytes:
    """Return a string as GGUF holds it."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    """Return a key-value pair; payload: the value's bytes."""
    return string(name) + struct.pack("<i", kind) + payload


def tensor(name: str | bytes, ne: Sequence[int], kind: int, offset: int) -> bytes:
    """Return a tensor's entry with exactly the extents given; offset: from the start of the data."""
    return string(name) + struct.pack(f"<I{len(ne)}q", len(ne), *ne) + struct.pack("<iQ", kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    pad: bytes = b"\0",
) -> bytes:
    """Return a file; n_kv, n_tensors: counts to declare instead of the true ones."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_kv is None else n_kv)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + pad * (-len(head) % alignment) + data


def f32_model(
    tensors: dict[str, tuple[Sequence[int], bytes]],
    keys: Sequence[bytes] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    pad: bytes = b"\0",
    trailing: bytes = b"",
) -> bytes:
    """Return a model of F32 tensors; tensors: name -> (ne, bytes); pad: one byte, for all padding."""
    entries, data = [], b""
    for name, (ne, content) in tensors.items():
        entries.append(tensor(name, ne, 0, len(data)))
        data += content + pad * (-len(content) % alignment)
    keys = [key("general.architecture", STRING, string("llama")), *keys]
    return gguf(keys, entries, data, version=version, alignment=alignment, pad=pad) + trailing
