"""pyggml-adapt chat: talk with the tasks of one foundation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyggml_adapt.cli.options import add_host_options, add_sampling_options, open_host, read_file, sampling
from pyggml_adapt.errors import Error, FileAccessError, ParameterError

if TYPE_CHECKING:
    from pyggml_adapt.host.host import Host
    from pyggml_adapt.host.text import TextSession

HELP = """\
/task NAME    go on with another task; it reads the conversation so far
/tasks        list the tasks
/memory       show what memory is used, as measured
/system TEXT  set the system message, or without TEXT remove it
/clear        forget the conversation
/help         show this
/exit         end, as Ctrl-D does
A line that ends with \\ goes on in the next one.  A message that begins with / is written with // in its place.
Ctrl-C stops a reply."""


def add_parser(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    """Add the sub-command."""
    parser = commands.add_parser(
        "chat",
        parents=[common],
        help="talk with the tasks, and switch between them",
        description="Read messages and print the replies. Commands begin with /; /help lists them. Without a terminal, "
        "each line of standard input is a message or a command, and the first failure ends it.",
    )
    add_host_options(parser)
    parser.add_argument("--task", metavar="NAME", help="the task to begin with (default: the first)")
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="the system message")
    parser.add_argument(
        "-n", "--predict", type=int, default=-1, metavar="N", help="most tokens of a reply, -1 for as many as fit (-1)"
    )
    parser.add_argument(
        "-c", "--ctx-size", type=int, default=0, metavar="N", help="context size in tokens (default: the model's)"
    )
    template = parser.add_mutually_exclusive_group()
    template.add_argument("--chat-template", metavar="NAME|JINJA", help="a template of the model's, or one in Jinja")
    template.add_argument("--chat-template-file", metavar="FILE", help="a file with a template in Jinja")
    parser.add_argument(
        "--chat-template-kwargs", metavar="JSON", help='variables for the template, as {"enable_thinking": false}'
    )
    parser.add_argument("--history", metavar="FILE", help="keep what is typed at a terminal in FILE (default: nowhere)")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    options = {**template_options(args), **sampling(args), "max_tokens": None if args.predict == -1 else args.predict}
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not args.json
    with open_host(args) as host, Talk(host, args.task, args.ctx_size or None, options, as_json=args.json) as talk:
        talk.system = args.system_prompt
        if is_terminal:
            print(f"{talk.task}, of {', '.join(host.tasks)}. /help lists the commands.")
        lines = typed(talk, args.history) if is_terminal else piped()
        for text in joined(lines):
            try:
                if not talk.take(text):
                    break
            except Error as error:
                if not is_terminal:
                    raise
                print(f"error: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # outside a reply
                if not is_terminal:
                    raise
    return 0


class Talk:
    """One conversation, whose text passes from task to task; the session is the present task's."""

    def __init__(self, host: Host, task: str | None, n_ctx: int | None, options: dict[str, Any], *, as_json: bool):
        """options: of TextSession.chat().  as_json: whether a reply is one JSON object on one line."""
        self.host = host
        self.system: str | None = None
        self.messages: list[dict[str, str]] = []
        self._n_ctx, self._options, self._as_json = n_ctx, options, as_json
        self._session: TextSession = self._open(host.active if task is None else task)

    @property
    def task(self) -> str:
        """Return the present task."""
        return self._session.task

    def _open(self, task: str) -> TextSession:
        self.host.activate(task)
        return self.host.session(task, n_ctx=self._n_ctx)

    def take(self, text: str) -> bool:
        """Do a command, or print the reply to a message; return whether to go on.

        Raises: Error; then the conversation is as before.
        """
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._command(*text[1:].partition(" ")[::2])
        self._reply(text[1:] if text.startswith("//") else text)
        return True

    def _command(self, name: str, argument: str) -> bool:
        argument = argument.strip()
        if name in ("exit", "quit"):
            return False
        if name == "task":
            self._switch(argument)
        elif name == "tasks":
            print("\n".join(f"{'*' if task == self.task else ' '} {task}" for task in self.host.tasks), flush=True)
        elif name == "memory":
            from pyggml_adapt.cli.run import show_memory

            show_memory(self.host.memory())
        elif name == "system":
            self.system = argument or None
        elif name == "clear":
            self.messages.clear()
        elif name == "help":
            print(HELP, flush=True)
        else:
            raise ParameterError(f"unknown command /{name}; /help lists the commands")
        return True

    def _switch(self, task: str) -> None:
        """Go on with another task: its session evaluates the conversation when the next message comes."""
        if task == self.task:
            return
        if task not in self.host.tasks:
            raise ParameterError(f"/task {task}: there is no such task; loaded are {', '.join(self.host.tasks)}")
        old, self._session = self._session, self._open(task)
        old.close()

    def _reply(self, text: str) -> None:
        """Print the reply to a message as it comes, and add both to the conversation; Ctrl-C ends it where it is."""
        asked = [*self.messages, {"role": "user", "content": text}]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        reply, reason = "", None
        try:
            generation = self._session.chat([*system, *asked], **self._options)
            for piece in generation:
                reply += piece
                if not self._as_json:
                    print(piece, end="", flush=True)
            reason = generation.finish_reason
        except KeyboardInterrupt:
            reason = "interrupted"
        if self._as_json:
            print(json.dumps({"task": self.task, "text": reply, "finish_reason": reason}), flush=True)
        else:
            print(flush=True)
            if reason != "stop":
                print(f"[the reply is cut off: {reason}]", file=sys.stderr)
        if reply or reason != "interrupted":
            self.messages = [*asked, {"role": "assistant", "content": reply}]

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of TextSession.chat() that choose a template and give it variables.

    Raises: ParameterError, FileAccessError.
    """
    options: dict[str, Any] = {}
    if args.chat_template is not None:
        options["template"] = args.chat_template
    if args.chat_template_file is not None:
        options["template"] = read_file(args.chat_template_file, "the template")
    if args.chat_template_kwargs is not None:
        try:
            options["template_kwargs"] = json.loads(args.chat_template_kwargs)
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"--chat-template-kwargs: this is not JSON: {error}") from error
        if not isinstance(options["template_kwargs"], dict):
            raise ParameterError('--chat-template-kwargs: expected a JSON object, as {"enable_thinking": false}')
    return options


def joined(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines, those that end with a backslash together with the next."""
    parts: list[str] = []
    for line in lines:
        if line.endswith("\\"):
            parts.append(line[:-1])
            continue
        yield "\n".join([*parts, line])
        parts.clear()
    if parts:
        yield "\n".join(parts)


def piped() -> Iterator[str]:
    """Yield the lines of standard input.  Raises: ParameterError if one is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ParameterError(f"standard input: line {number} is not UTF-8 at byte {error.start}") from error


def typed(talk: Talk, history: str | None) -> Iterator[str]:
    """Yield what is typed at the terminal, where Ctrl-C empties the line and Alt-Enter begins another one.

    Raises: FileAccessError for a history that cannot be kept.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    try:
        if history is not None:
            with open(history, "ab"):  # so that one that cannot be written is found at once
                pass
        session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else FileHistory(history), key_bindings=keys, multiline=True
        )
        while True:
            try:
                yield session.prompt(f"{talk.task}> ", prompt_continuation="... ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
    except OSError as error:
        raise FileAccessError.of(history or "the terminal", error) from error
