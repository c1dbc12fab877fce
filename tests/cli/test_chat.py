"""pyggml-adapt chat: with lines from a pipe, and at a terminal."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from real_models import ROOT
from tiny_models import EOS, Tiny, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.cli.main import main

TINY = ROOT / "examples" / "tiny"
LAST = '"{{ messages[-1].content }}" becomes "'  # the prompt that the tiny models were trained on


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return the options of a host with three tasks."""
    out = tmp_path_factory.mktemp("out")
    models = {task: TINY / f"tiny-{task}-q8_0.gguf" for task in ("reverse", "upper")}
    report = pga.split(models, out, foundation=TINY / "tiny-base-q8_0.gguf")
    adaptors = [part for task, path in report.adaptors.items() for part in ("-a", f"{task}={path}")]
    return ["-m", str(report.foundation), *adaptors, "-t", "1", "--temp", "0"]


@pytest.fixture
def say(monkeypatch, capsys, arguments):
    """Return a function that pipes text into a chat and returns its status, its output and its errors."""

    def run(text, *more):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = main(["chat", *arguments, *more])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_tasks_answer_each_in_its_own_way(say):
    text = "garden\n/task upper\ngarden\n\n/task reverse\ngarden\r\n/task reverse\n/task base\ngarden"
    assert say(text, "--chat-template", LAST) == (0, 'garden"\nGARDEN"\nnedrag"\ngarden"\n', "")


def test_exit_ends_it_before_the_rest(say):
    assert say("garden\n/exit\ngarden\n", "--chat-template", LAST, "--task", "upper")[:2] == (0, 'GARDEN"\n')


def test_tasks_and_memory_and_help(say):
    status, out, err = say("/task upper\n/tasks\n/memory\n/help\n")
    assert status == 0 and out.startswith("  base\n  reverse\n* upper\n/task NAME ")
    assert "/system TEXT" in out and "adaptor upper" in err and "KV caches: " in err


def test_the_conversation_as_the_template_sees_it(say):
    """Its text passes from task to task: the template writes it as JSON into the error that it raises."""
    shown = "{% if messages[-1].content == 'show' %}{{ raise_exception(messages | tojson) }}{% endif %}" + LAST
    status, _, err = say("garden\n/task upper\n/system Be\\\nkind.\n//house\nshow\n", "--chat-template", shown)
    assert status == 1
    messages = json.loads(err.partition("conversation: ")[2])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [messages[i]["content"] for i in (0, 1, 2, 3, 5)] == ["Be\nkind.", "garden", 'garden"', "/house", "show"]
    assert messages[4]["content"].isupper()
    for text in ("garden\n/clear\n/system\nshow", "show\n"):
        err = say(text, "--chat-template", shown, "--system-prompt", "x")[2]
        assert ('"system"' in err) == (text == "show\n") and "garden" not in err


def test_lines_that_go_on(say):
    template = "{{ raise_exception(messages[-1].content | tojson) }}"
    assert say("a \\\n\\\nb\n", "--chat-template", template)[2].endswith('conversation: "a \\n\\nb"\n')
    assert say("a\\", "--chat-template", template)[2].endswith('conversation: "a"\n')


def test_json_lines(say):
    status, out, err = say("garden\nhouse\n/task upper\ngarden\n", "--chat-template", LAST, "--json", "-n", "3")
    assert (status, err) == (0, "")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"task": "base", "text": "gar", "finish_reason": "length"},
        {"task": "base", "text": "hou", "finish_reason": "length"},
        {"task": "upper", "text": "GAR", "finish_reason": "length"},
    ]


def test_a_reply_that_is_cut_off_says_so(say):
    assert say("garden\n", "--chat-template", LAST, "-n", "3") == (0, "gar\n", "[the reply is cut off: length]\n")


def test_a_template_from_a_file_and_its_variables(say, tmp_path):
    (tmp_path / "t.jinja").write_text('"{{ word }}" becomes "')
    file = ["--chat-template-file", str(tmp_path / "t.jinja")]
    assert say("x", *file, "--chat-template-kwargs", '{"word": "garden"}') == (0, 'garden"\n', "")


@pytest.mark.parametrize(("text", "more", "message"), [
    ("/no\n", [], "unknown command /no; /help lists the commands"),
    ("/task no\n", [], "/task no: there is no such task; loaded are base, reverse, upper"),
    ("x\n", [], "the model has no chat template (tokenizer.chat_template), and its vocabulary lacks ChatML's tokens: "
     "it may not be made for chats; if it is, give its template in Jinja, as template or with --chat-template-file"),
    (b"/tasks\n\xff\n", [], "standard input: line 2 is not UTF-8 at byte 0"),
    ("x\n", ["--chat-template", "{{ 1 / 0 }}"], "the chat template given fails: ZeroDivisionError: division by zero"),
    ("x\n", ["--chat-template", "no"], "template = 'no': the model has no chat template of this name, but none"),
    ("x\n", ["--chat-template-file", "/no/file"], "/no/file: no such file or directory"),
    ("x\n", ["--chat-template-kwargs", "{"], "--chat-template-kwargs: this is not JSON: Expecting property name "
     "enclosed in double quotes: line 1 column 2 (char 1)"),
    ("x\n", ["--chat-template-kwargs", "[]"],
     '--chat-template-kwargs: expected a JSON object, as {"enable_thinking": false}'),
    ("x" * 999, ["--chat-template", LAST], "the conversation takes 1004 tokens, more than the context of 256: shorten "
     "it, or use a larger n_ctx"),
    ("x\n", ["--task", "no"], "unknown task 'no'; loaded tasks: base, reverse, upper"),
])  # fmt: skip
def test_failures_without_a_terminal(say, text, more, message):
    status, _, err = say(text, *more)
    assert (status, err) == (1, f"pyggml-adapt: error: {message}\n")


def test_a_template_file_that_is_no_text(say, tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"ab\xff")
    err = say("x\n", "--chat-template-file", str(tmp_path / "t.jinja"))[2]
    assert err.endswith("t.jinja: the template is not UTF-8 at byte 2\n")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Return the options for a model that does not end its replies."""
    tiny = Tiny(n_embd=64, n_ff=96, n_head=2, n_head_kv=1, n_ctx_train=60000)
    metadata = {**tiny.all_metadata(), "tokenizer.chat_template": "{{ messages[-1].content }}"}
    tensors = tensors_of(tiny)
    for name in ("token_embd.weight", "output.weight"):  # the logit of EOS is 0, never the greatest
        if name in tensors:
            kind, ne, data = tensors[name]
            rows = np.frombuffer(data, np.float32).reshape(ne[::-1]).copy()
            rows[EOS] = 0
            tensors[name] = kind, ne, rows.tobytes()
    path = write_gguf(tmp_path_factory.mktemp("endless") / "m.gguf", metadata, tensors)
    return ["-m", str(path), "-t", "1", "--temp", "0"]


def test_ctrl_c_stops_a_reply_and_not_the_program(endless):
    command = [sys.executable, "-m", "pyggml_adapt", "chat", *endless]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"the\n")
        process.stdin.flush()
        assert os.read(process.stdout.fileno(), 1)  # the reply has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"/tasks\n", timeout=60)
    assert process.returncode == 0
    assert out.endswith(b"\n* base\n") and err == b"[the reply is cut off: interrupted]\n"


class Terminal:
    """The command at a terminal of its own."""

    LAUNCH = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "os.execv(sys.executable, [sys.executable, '-m', 'pyggml_adapt', *sys.argv[1:]])"
    )

    def __init__(self, *arguments):
        self.fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, b"\x28\0\x78\0\0\0\0\0")
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCH, *arguments], stdin=inner, stdout=inner, stderr=inner,
            env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip
        os.close(inner)
        self.seen = b""

    def type(self, keys):
        os.write(self.fd, keys)

    def wait_for(self, text, seconds=20):
        """Return what was shown up to a text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(end - time.monotonic(), 0))[0], (text, self.seen)
            try:
                self.seen += os.read(self.fd, 65536)
            except OSError:  # it has ended
                raise AssertionError((text, self.seen)) from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def end(self):
        """Type Ctrl-D until the program ends, as it does at a prompt and not in a reply, and return its status."""
        for _ in range(30):
            try:
                self.type(b"\x04")
                return self.process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(("it does not end", self.seen))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal():
    made = []

    def make(*arguments):
        made.append(Terminal(*arguments))
        return made[-1]

    yield make
    for terminal in made:
        terminal.close()


def test_at_a_terminal(terminal, arguments, tmp_path):
    """Line editing, several lines, history over sessions, failures that do not end it, and Ctrl-D."""
    options = ["chat", *arguments, "--chat-template", LAST, "--history", str(tmp_path / "history")]
    chat = terminal(*options)
    chat.wait_for(b"base, of base, reverse, upper. /help lists the commands.")
    chat.wait_for(b"base>")
    chat.type(b"gardenx\x7f\r")  # backspace
    chat.wait_for(b'garden"\r\n')
    chat.wait_for(b"base>")
    chat.type(b"/task nothing\r")
    chat.wait_for(b"error: /task nothing: there is no such task; loaded are base, reverse, upper")
    chat.wait_for(b"base>")
    chat.type(b"/task upper\r")
    chat.wait_for(b"upper>")
    chat.type(b"lost\x03")  # Ctrl-C empties the line
    chat.wait_for(b"upper>")
    chat.type(b"\x1b[A\x1b[A\x1b[A\r")  # three lines up: garden
    chat.wait_for(b'GARDEN"\r\n')
    chat.wait_for(b"upper>")
    chat.type(b"one\x1b\rtwo\r")  # Alt-Enter
    chat.wait_for(b"upper>")
    assert chat.end() == 0
    assert b"+one\n+two\n" in (tmp_path / "history").read_bytes()
    again = terminal(*options)
    again.wait_for(b"base>")
    while b"two" not in again.seen:  # the history is read in the background
        again.type(b"\x1b[A")
        time.sleep(0.2)
        again.seen += os.read(again.fd, 65536)
    again.type(b"\x1b[A\x1b[A\r")  # the first line of that message, then garden
    again.wait_for(b'garden"\r\n')


def test_ctrl_c_at_a_terminal(terminal, endless):
    chat = terminal("chat", *endless)
    chat.wait_for(b"base>")
    chat.type(b"the\r")
    chat.wait_for(b"\x1b[?2004l")  # the line is taken
    assert select.select([chat.fd], [], [], 20)[0]  # the reply has begun
    chat.type(b"\x03")
    chat.wait_for(b"[the reply is cut off: interrupted]")
    chat.wait_for(b"base>")
    chat.type(b"/exit\r")
    assert chat.process.wait(timeout=60) == 0


def test_a_history_that_cannot_be_kept(terminal, endless, tmp_path):
    chat = terminal("chat", *endless, "--history", str(tmp_path))
    chat.wait_for(f"pyggml-adapt: error: {tmp_path}: is a directory".encode())
    assert chat.process.wait(timeout=60) == 1
