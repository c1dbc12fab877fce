"""GBNF, llama.cpp's form of a grammar, to llguidance's Lark, with every text that the grammar has and no other.

Source: llama.cpp grammars/README.md, src/llama-grammar.cpp (escapes); llguidance docs/syntax.md
"""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from pyggml_adapt.errors import ParameterError

_STRING = r'"(?:\\.|[^"\\])*"'
_ROOT = re.compile(r"(?m)^[ \t]*root[ \t]*::=")
_PARTS = re.compile(rf"#[^\r\n]*|{_STRING}|\[(?:\\.|[^\]\\])*\]|\.", re.DOTALL)
_ESCAPES = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_CHARACTERS = re.compile(r"\\x..|\\.|.", re.DOTALL)
_ANY = "[\\x00-\U0010ffff]"
_LARK_NAMES = re.compile(rf"{_STRING}|/(?:\\.|[^/\\])*/|\b([A-Za-z][A-Za-z0-9_]*)\b(:?)")


def is_gbnf(text: str) -> bool:
    """Return whether a grammar has the rule that GBNF begins with."""
    return _ROOT.search(text) is not None


def to_lark(text: str) -> str:
    """Return the grammar in Lark.

    Of terminals that follow one another, Lark's first takes all that it can, where GBNF goes on with any number of
    characters.  So the whole grammar becomes one terminal, which is fast; one that needs rules gets no terminals, and
    is parsed by characters.
    Raises: ParameterError; RecursionError if it is nested deeply.
    """
    try:
        lark = gbnf_to_lark(_PARTS.sub(_plain, text))
    except (RecursionError, ParameterError):
        raise
    except Exception as error:  # it raises no class of its own for some faults
        raise ParameterError(f"grammar: {str(error).splitlines()[0]}") from error
    names = [(match[1], match[2]) for match in _LARK_NAMES.finditer(lark.partition("\n")[2]) if match[1]]
    if all(name.isupper() or (name, colon) == ("start", ":") for name, colon in names):
        return "start: ALL-\n" + re.sub("(?m)^start:", "ALL-:", lark)
    return _LARK_NAMES.sub(lambda part: f"x-{part[0].lower()}" if part[1] and part[1].isupper() else part[0], lark)


def _plain(match: re.Match[str]) -> str:
    """Return a comment, text, set or dot in a form of which gbnf_to_lark() keeps the meaning."""
    part = match[0]
    if part[0] == "#":
        return ""
    if part == ".":
        return _ANY  # a newline too
    part = _ESCAPES.sub(_plain_escape, part)
    if part[0] == "[":
        return part.replace("&", "\\x26").replace("~", "\\x7E")  # && and ~~ would mean something
    characters = _CHARACTERS.findall(part[1:-1])
    return "(" + " ".join(f'"{character}"' for character in characters) + ")" if len(characters) > 1 else part


def _plain_escape(match: re.Match[str]) -> str:
    """Return an escape that Lark has too, or the character."""
    digits = match[1] or match[2] or match[3]
    if digits is None:
        return "\\x2D" if match[4] == "-" else match[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ParameterError(f"grammar: {match[0]} is not a character")
    return f"\\x{code:02X}" if code < 0x80 else chr(code)
