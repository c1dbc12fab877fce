"""A Griffe extension: give what a .pyi stub declares the docstrings of the .pyx file beside it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import griffe

_START = re.compile(r"^(?P<indent>\s*)(?:cdef class|class|def|async def)\s+(?P<name>\w+)", re.MULTILINE)
_INCLUDE = re.compile(r'^include "(?P<name>[^"]+)"$', re.MULTILINE)
_DOC = re.compile(r'\s*(?:"""(?P<text>.*?)""")', re.DOTALL)


def _source(path: Path) -> str:
    """Return the text of a Cython file, and of those that it includes."""
    text = path.read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda match: _source(path.parent / match["name"]), text)


def docstrings(source: str) -> dict[str, str]:
    """Return qualified name -> docstring of the classes, functions and methods of a Cython file; "" is the file's."""
    found: dict[str, str] = {}
    if doc := _DOC.match(source):
        found[""] = doc["text"]
    scope = ""
    for match in _START.finditer(source):
        name = match["name"]
        if not match["indent"].strip("\n"):
            scope = name
        else:
            name = f"{scope}.{name}"
        if doc := _DOC.match(source, _end_of_header(source, match.end())):
            found[name] = doc["text"]
    return found


def _end_of_header(source: str, at: int) -> int:
    """Return the position after the colon that ends the header of a class or function."""
    depth = 0
    while source[at] != ":" or depth:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(source[at], 0)
        at += 1
    return at + 1


class PyxDocstrings(griffe.Extension):
    """Set docstrings once all is loaded."""

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Read the .pyx file of a stub, if there is one."""
        path = mod.filepath
        if not isinstance(path, Path) or path.suffix != ".pyi" or not path.with_suffix(".pyx").exists():
            return
        for name, text in docstrings(_source(path.with_suffix(".pyx"))).items():
            try:
                target = mod[name] if name else mod
            except KeyError:
                continue  # private: the stub does not declare it
            if not target.is_alias and target.docstring is None:
                target.docstring = griffe.Docstring(inspect.cleandoc(text), parent=target)
