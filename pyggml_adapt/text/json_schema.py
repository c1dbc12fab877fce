"""What is checked of a JSON Schema before llguidance compiles it, which would not notice or not bear it.

Source: JSON Schema, draft 2020-12; RFC 6901 (pointers)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from pyggml_adapt.errors import ParameterError

_MAX_WHOLE = 1 << 53  # llguidance holds numbers as F64
_MIN_FRACTION, _N_DIGITS = 1e-9, 15
_NUMBERS = ("const", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "additionalProperties", "allOf", "anyOf", "oneOf", "prefixItems")
_PLAIN = (
    *_NUMBERS, "type", "required", "minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength",
    "pattern", "format", "$ref", "$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly",
)  # fmt: skip
_MAX_PATTERNS = 16384  # characters: what a pattern takes grows faster than its length
_NESTED = ("allOf", "anyOf", "oneOf", "prefixItems")
_Known = Callable[[str], bool]


def check(schema: Any) -> None:
    """Raise ParameterError for what is not supported, or not exactly, or if all that would meet it has no end."""
    for keyword in _unknown(schema):
        raise ParameterError(f"json_schema: {keyword} is not a keyword that is supported")
    for number in _inexact(schema):
        raise ParameterError(
            f"json_schema: {number!r} cannot be held exactly: whole numbers go up to 2**53, others begin at "
            f"{_MIN_FRACTION} and have {_N_DIGITS} digits"
        )
    n_patterns = sum(map(len, _patterns(schema)))
    if n_patterns > _MAX_PATTERNS:
        raise ParameterError(f"json_schema: its patterns have {n_patterns} characters, more than {_MAX_PATTERNS}")
    if not _has_an_end(schema):
        raise ParameterError("json_schema: nothing meets it, since its required parts contain it again without end")


def _unknown(node: Any) -> Iterator[str]:
    """Yield the keywords of a schema, and of those within it, that would be ignored or refused."""
    if isinstance(node, list):
        for item in node:
            yield from _unknown(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in _SCHEMAS:
                yield from _unknown(value)
            elif key in _OF_SCHEMAS:
                yield from _unknown(list(value.values()) if isinstance(value, dict) else [])
            elif key not in _PLAIN:
                yield key


def _inexact(node: Any, is_value: bool = False) -> Iterator[float]:
    """Yield the numbers in values and limits that llguidance would take for others."""
    if isinstance(node, list):
        for item in node:
            yield from _inexact(item, is_value)
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _inexact(value, is_value or key in _NUMBERS)
    elif is_value and isinstance(node, int | float) and not _is_exact(node):
        yield node


def _is_exact(number: float) -> bool:
    if number == int(number):
        return abs(number) <= _MAX_WHOLE
    n_digits = len(repr(number).partition("e")[0].replace(".", "").lstrip("-0"))
    return abs(number) >= _MIN_FRACTION and n_digits <= _N_DIGITS


def _patterns(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for item in node:
            yield from _patterns(item)
    elif isinstance(node, dict):
        if isinstance(node.get("pattern"), str):
            yield node["pattern"]
        if isinstance(node.get("patternProperties"), dict):
            yield from node["patternProperties"]
        for value in node.values():
            yield from _patterns(value)


def _has_an_end(schema: Any) -> bool:
    """Return whether a finite value may meet the schema; where it is not known, it may.

    What $ref points to is taken for endless until it is seen to have an end; then what refers to it is looked at again.
    """
    users: dict[str, set[str]] = {"#": set()}
    ending: set[str] = set()
    waiting = ["#"]
    while waiting:
        pointer = waiting.pop()
        if pointer in ending:
            continue

        def ends(ref: str, user: str = pointer) -> bool:
            if ref not in users:
                users[ref] = set()
                waiting.append(ref)
            users[ref].add(user)
            return ref in ending

        if _ends(_target(schema, pointer), ends):
            ending.add(pointer)
            waiting.extend(users[pointer])
    return "#" in ending


def _target(schema: Any, pointer: str) -> Any:
    """Return what a pointer within the schema points to; True, which anything meets, if there is no such thing."""
    node = schema
    for part in pointer[1:].split("/")[1:] if pointer[:2] in ("#", "#/") else (None,):
        if isinstance(node, list) and part is not None and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part is not None:
            node = node.get(unquote(part).replace("~1", "/").replace("~0", "~"), True)
        else:
            return True
    return node


def _ends(node: Any, known: _Known) -> bool:
    """Return whether a finite value may meet a schema.  known: whether one meets what a pointer points to."""
    if not isinstance(node, dict) or "enum" in node or "const" in node:
        return True
    parts = {key: value for key in _NESTED if isinstance(value := node.get(key), list)}
    if isinstance(node.get("$ref"), str) and not known(node["$ref"]):
        return False
    if not all(_ends(part, known) for part in parts.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if parts.get(key) and not any(_ends(part, known) for part in parts[key]):
            return False
    types = node.get("type")
    types = types if isinstance(types, list) and types else [types]
    if any(kind not in ("object", "array") for kind in types):
        return True
    required = _required(node) if "object" in types else None
    items = _items(node, parts.get("prefixItems", [])) if "array" in types else None
    return any(all(_ends(part, known) for part in needed) for needed in (required, items) if needed is not None)


def _required(node: dict[str, Any]) -> list[Any]:
    """Return the schemas of the properties that an object must have."""
    properties, required = node.get("properties", {}), node.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list) or "patternProperties" in node:
        return []
    other = node.get("additionalProperties", True)
    return [properties.get(name, other) for name in required if isinstance(name, str)]


def _items(node: dict[str, Any], prefix: list[Any]) -> list[Any]:
    """Return the schemas of the items that an array must have, each once."""
    n = node.get("minItems", 0)
    if not isinstance(n, int):
        return []
    return prefix[: max(n, 0)] + ([node.get("items", True)] if n > len(prefix) else [])
