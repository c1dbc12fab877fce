"""Chat templates rendered as transformers renders them, in a process of its own, which can be stopped.

pyggml_adapt.text.chat runs this file as a program: it answers requests on the socket that is its standard input.  A
computation inside CPython's C code cannot be interrupted from another thread, and so neither can a template; a process
can, and its memory can be limited.  It needs Jinja2 and nothing of this package, so that it starts fast.

Source: transformers 5, utils/chat_template_utils.py; Jinja2's documentation, "Sandbox" and "Extensions"
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import socket
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_NBYTES = 1 << 30  # of this process's address space
MAX_MESSAGE = 300  # characters of an error's message


class Refusal(TemplateError):
    """The template called raise_exception()."""


class TooLong(Exception):
    """The text is longer than it may be."""


class Generation(Extension):
    """The block {% generation %}, which marks what a model learns to write; here it is the text inside."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja2 declares it)

    def parse(self, parser: Parser) -> Node:
        """Return the block as a call with its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainNamespace(Namespace):
    """A namespace() whose attributes cannot be Python's own."""

    def __init__(*args: Any, **kwargs: Any):  # so that an attribute may be named self
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"an attribute of a namespace cannot be named {name!r}")


class _Dict:
    """What `dict` is in a template: the function without the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """Return dict.fromkeys()."""
        return dict.fromkeys(*args)


def _raise_exception(message: object) -> None:
    raise Refusal(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON without HTML's escapes, unlike Jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """Return a template ready to be rendered."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": PlainNamespace,
    }
    return environment.from_string(source)


def render(source: str, variables: dict[str, Any], max_chars: int) -> str:
    """Return the text that a template makes of variables.

    Raises: TooLong; anything that the template raises.
    """
    pieces, n = [], 0
    for piece in compiled(source).generate(variables):
        n += len(piece)
        if n > max_chars:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return {"text"}, or what went wrong: {"refused"} with the template's own words, or {"failed"} with ours."""
    max_chars = request["max_chars"]
    try:
        return {"text": render(request["source"], request["variables"], max_chars)}
    except Refusal as error:
        return {"refused": _brief(error)}
    except TooLong:
        return {"failed": f"makes a text of more than {max_chars} characters"}
    except TemplateSyntaxError as error:
        return {"failed": f"is not valid Jinja, line {error.lineno}: {_brief(error.message)}"}
    except SecurityError as error:
        return {"failed": f"does what the sandbox forbids: {_brief(error)}"}
    except UndefinedError as error:
        return {"failed": f"uses what is not there: {_brief(error)}"}
    except MemoryError:
        return {"failed": f"takes more than {MAX_NBYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"failed": "calls itself too deeply"}
    except Exception as error:  # whatever a template's own code may come to
        return {"failed": f"fails: {type(error).__name__}: {_brief(error)}"}


def _brief(error: object) -> str:
    """Return a message on one line, without its full stop."""
    text = " ".join(str(error)[: MAX_MESSAGE + 1].split())
    return text[:MAX_MESSAGE] + "..." if len(text) > MAX_MESSAGE else text.rstrip(".")


def main() -> None:
    """Answer requests, a line of JSON each, until the other side is gone.

    One that takes too long ends the process by SIGALRM.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_NBYTES, MAX_NBYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=0) as connection:
        for line in connection.makefile("rb"):
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["max_seconds"])
            reply = json.dumps(answer(request)).encode() + b"\n"
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.sendall(reply)


if __name__ == "__main__":
    main()
