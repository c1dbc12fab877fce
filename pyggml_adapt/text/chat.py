"""ChatTemplate: a conversation to the text that a model was trained on; Renderer: the process that renders templates.

Source: transformers 5, `apply_chat_template`; llama.cpp common/chat.cpp, `common_chat_templates_init`
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyggml_adapt.errors import ClosedError, ParameterError, TokenizerError
from pyggml_adapt.text.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates
MAX_SECONDS = 10.0  # that rendering may take
MAX_CHARS = 1 << 24  # of a rendered text
START_SECONDS = 60.0  # that may pass beside, before a renderer that does not answer is given up

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; templates read the first two


class Renderer:
    """Render templates in a process of its own, started when one is first needed; threads take turns.

    A template is a program that came with a file.  In this process nothing could stop it, whatever its sandbox forbids;
    the other one ends when a template takes too long or too much memory, and the next one gets a new process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._owner = 0  # the process that started it: after os.fork() it is not the child's
        self._closed = False

    def render(self, source: str, variables: Mapping[str, Any], name: str = KEY) -> str:
        """Return the text that a template makes of variables, which become plain JSON; name: for errors.

        Raises: ParameterError if the template refuses them, or if they are no JSON; TokenizerError if it fails, takes
        more than MAX_SECONDS or makes more than MAX_CHARS.
        """
        request = {"source": source, "variables": variables, "max_chars": MAX_CHARS, "max_seconds": MAX_SECONDS}
        try:
            line = json.dumps(request, default=_plain).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ParameterError(f"the conversation cannot be given to a template: {error}") from error
        with self._lock:
            if self._closed:
                raise ClosedError("this renderer of chat templates is closed")
            try:
                answer = self._ask(line, name)
            except BaseException:
                self._stop()  # it may be in the midst of an answer
                raise
        if "refused" in answer:
            raise ParameterError(f"{name} refuses the conversation: {answer['refused']}")
        if "failed" in answer:
            raise TokenizerError(f"{name} {answer['failed']}")
        return answer["text"]

    def _ask(self, line: bytes, name: str) -> dict[str, str]:
        """Return the answer to a request."""
        process, connection = self._start()
        connection.settimeout(START_SECONDS + MAX_SECONDS)
        try:
            connection.sendall(line)
            answer = connection.makefile("rb").readline()
        except TimeoutError:
            raise TokenizerError(f"{name} cannot be rendered: the process that should do it does not answer") from None
        except ConnectionError:
            answer = b""
        if answer.endswith(b"\n"):
            return json.loads(answer)
        connection.close()
        status = process.wait()
        if status == -signal.SIGALRM:
            raise TokenizerError(f"{name} takes more than {MAX_SECONDS:g} seconds to render")
        why = signal.Signals(-status).name if status < 0 else f"status {status}; is Jinja2 installed?"
        raise TokenizerError(f"{name} cannot be rendered: the process that should do it ended with {why}")

    def _start(self) -> tuple[subprocess.Popen, socket.socket]:
        """Return the process and the connection to it, started if there is none."""
        if self._process is not None and self._socket is not None and self._owner == os.getpid():
            return self._process, self._socket
        self._stop()
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("render.py"))],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                ours.close()
                raise TokenizerError(f"no process to render chat templates can be started: {error}") from error
        self._process, self._socket, self._owner = process, ours, os.getpid()
        return process, ours

    def _stop(self) -> None:
        process, connection = self._process, self._socket
        self._process = self._socket = None
        if connection is not None:
            connection.close()
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
        elif process is not None:
            process.returncode = 0  # the parent's: this keeps Python from minding it

    def close(self) -> None:
        """End the process; closing twice is allowed."""
        with self._lock:
            self._closed = True
            self._stop()


class ChatTemplate:
    """The chat templates of one model by name, and what they need to know of its vocabulary."""

    def __init__(self, sources: Mapping[str, object], tokens: Mapping[str, str], *, speaks_chatml: bool):
        """sources: name -> template in Jinja.  tokens: "bos_token" and the like -> text.

        speaks_chatml: whether ChatML is the template of a model that has none.
        """
        self.sources, self.tokens, self.speaks_chatml = dict(sources), dict(tokens), speaks_chatml

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], tokenizer: Tokenizer) -> ChatTemplate:
        """Return what the metadata of a GGUF file say about chats; an unfit template is found when it is used."""
        sources = {key[len(KEY) + 1 :] or DEFAULT: metadata[key] for key in metadata if _is_template(key)}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        tokens = {
            name: tokenizer.token_to_piece(id, special=True).decode(errors="replace")
            for name, id in ids.items()
            if id is not None
        }
        if DEFAULT in sources and not sources[DEFAULT]:
            del sources[DEFAULT]
        known = (tokenizer.encode(text, add_special=False, parse_special=True) for text in CHATML_TOKENS)
        return cls(sources, tokens, speaks_chatml=not sources and all(len(ids) == 1 for ids in known))

    def render(
        self,
        renderer: Renderer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, as transformers' apply_chat_template() does.

        template: the name of one of the model's, or Jinja source; by default "tool_use" where there are tools, else
        "default".  variables: what the template reads beside, such as enable_thinking.
        Raises: TokenizerError if there is no such template; as Renderer.render().
        """
        key, source = self.pick(template, with_tools=tools is not None)
        for what, items in (("tools", tools), ("documents", documents)):
            if items is not None:
                _check_mappings(what, items)
        variables = {} if variables is None else variables
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise ParameterError("the variables for a chat template must be a dictionary by their names")
        known = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        given = {**self.tokens, **variables, **known, "messages": _messages(messages)}
        return renderer.render(source, given, key)

    def pick(self, template: str | None, *, with_tools: bool) -> tuple[str, str]:
        """Return the name, for errors, and the source of the template to use.

        Raises: TokenizerError naming the key if it is no text, or what to do if there is none; ParameterError.
        """
        if template is not None and (not isinstance(template, str) or not template):
            raise ParameterError(f"template = {template!r} is neither a template's name nor its Jinja source")
        if template is None:
            template = TOOL_USE if with_tools and TOOL_USE in self.sources else DEFAULT
            if template not in self.sources:
                return "ChatML", self._fallback()
        elif template not in self.sources:
            if "{" not in template:
                has = ", ".join(map(repr, self.sources)) or "none"
                raise ParameterError(f"template = {template!r}: the model has no chat template of this name, but {has}")
            return "the chat template given", template
        name, source = KEY if template == DEFAULT else f"{KEY}.{template}", self.sources[template]
        if not isinstance(source, str):
            raise TokenizerError(f"{name} is not a text")
        if any("\ud800" <= char <= "\udfff" for char in source):
            raise TokenizerError(f"{name} is not valid UTF-8")
        return name, source

    def _fallback(self) -> str:
        if self.speaks_chatml:
            return CHATML
        if self.sources:
            has = ", ".join(map(repr, self.sources))
            raise TokenizerError(f"the model has no default chat template: choose one of {has} by its name")
        raise TokenizerError(
            f"the model has no chat template ({KEY}), and its vocabulary lacks ChatML's tokens: it may not be made for "
            f"chats; if it is, give its template in Jinja, as template or with --chat-template-file"
        )


def _is_template(key: str) -> bool:
    return key == KEY or (key.startswith(KEY + ".") and len(key) > len(KEY) + 1)


def _check_mappings(what: str, items: Any) -> None:
    """Raise ParameterError unless this is a list of mappings."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise ParameterError(f"{what} must be a list of dictionaries, not a {type(items).__name__}")
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise ParameterError(f"{what}[{i}] is a {type(item).__name__}, not a dictionary")


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without fields that are None, and with reasoning under the names that templates read.

    Raises: ParameterError.
    """
    _check_mappings("messages", messages)
    if not messages:
        raise ParameterError("messages is empty: a conversation has one message at least")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ParameterError(f"messages[{i}] has no role, as 'user', 'assistant' or 'system'")
        given = {key: value for key, value in message.items() if value is not None}
        reasoning = next((given[name] for name in _REASONING if name in given), None)
        if reasoning is not None:
            given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
        found.append(given)
    return found


def _plain(value: object) -> Any:
    """Return what stands in JSON for an object that has no form there."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()  # type: ignore[attr-defined]
    return f"<{type(value).__name__}>"  # templates ask only whether it is there
