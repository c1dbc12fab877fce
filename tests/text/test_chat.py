"""Chat templates: the text that transformers makes, and templates that are wrong, endless or hostile."""

import dataclasses
import datetime
import enum
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import chat_cases
import numpy as np
import pytest

from pyggml_adapt.errors import ClosedError, ParameterError, TokenizerError
from pyggml_adapt.text import ChatTemplate, Renderer, chat, render

GOLDEN = json.loads((Path(__file__).parent / "data" / "chat_golden.json").read_text())
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def renderer():
    renderer = Renderer()
    yield renderer
    renderer.close()


def made(renderer, source, messages=HELLO, **options):
    template = ChatTemplate({"default": source}, chat_cases.TOKENS, speaks_chatml=False)
    return template.render(renderer, messages, **options)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(*chat_cases.TODAY)


class InProcess:
    """A renderer without another process, for templates that are known."""

    def render(self, source, variables, name):
        plain = json.loads(json.dumps(variables, default=chat._plain))
        answer = render.answer({"source": source, "variables": plain, "max_chars": chat.MAX_CHARS})
        return hashlib.sha256(answer["text"].encode()).hexdigest()[:32] if "text" in answer else "raises"


@pytest.mark.parametrize("name", GOLDEN["texts"])
def test_renders_as_transformers(vocab_dir, monkeypatch, name):
    """The texts of all conversations are those of transformers (their digests), or both raise."""
    path = vocab_dir / "templates" / name
    if not path.exists():
        pytest.skip("the release was unpacked without its templates: remove .pytest_cache")
    monkeypatch.setattr(render, "datetime", Clock)
    template = ChatTemplate({"default": path.read_text(encoding="utf-8")}, chat_cases.TOKENS, speaks_chatml=False)
    for case, options in chat_cases.CASES.items():
        known = {key: options[key] for key in ("tools", "documents", "add_generation_prompt") if key in options}
        variables = {key: options[key] for key in options if key not in (*known, "messages")}
        text = template.render(InProcess(), options["messages"], variables=variables, **known)
        assert text == GOLDEN["texts"][name][case], case


def test_most_of_the_golden_texts_are_texts():
    texts = [text for by_case in GOLDEN["texts"].values() for text in by_case.values()]
    assert len(texts) == 70 * len(chat_cases.CASES)
    assert texts.count("raises") < 0.2 * len(texts)


def test_what_a_template_sees(renderer):
    source = (
        "{% for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m.role }}: {{ m.content }}\n"
        "    {% generation %}[{{ bos_token }}{{ eos_token }}]{% endgeneration %}\n\n{% endfor %}\n"
        "{{ tools | tojson }} {{ documents }} {{ add_generation_prompt }} {{ enable_thinking }} {{ pad_token }}."
    )
    messages = [*HELLO, {"role": "user", "content": "é <b>"}]
    tools = [{"name": "f", "é": [1, None]}]
    assert made(renderer, source, messages, tools=tools, variables={"enable_thinking": False}) == (
        'user: é <b>\n[<s></s>]\n[{"name": "f", "é": [1, null]}] None True False .'
    )


def test_variables_take_the_place_of_tokens_and_not_of_messages(renderer):
    variables = {"bos_token": "<b>", "messages": "no", "tools": "no"}
    assert made(renderer, "{{ bos_token }}{{ messages[0].content }}{{ tools }}", variables=variables) == "<b>HelloNone"


def test_today(renderer):
    assert made(renderer, "{{ strftime_now('%Y-%m') }}") == datetime.datetime.now().strftime("%Y-%m")


def test_reasoning_has_the_names_that_templates_read_and_none_is_absent(renderer):
    source = "{% for m in messages %}{{ m | tojson(sort_keys=True) }}{% endfor %}"
    message = {"role": "assistant", "content": None, "reasoning": "so"}
    assert json.loads(made(renderer, source, [message])) == {
        "role": "assistant", "reasoning": "so", "thinking": "so", "reasoning_content": "so"
    }  # fmt: skip


class Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Part:
    type: str
    text: str


def test_objects_become_plain(renderer):
    content = [Part("text", "x"), np.float32(0.5), np.bool_(False), object(), (1, 2)]
    messages = [{"role": Role.USER, "content": content}]
    text = made(renderer, "{{ messages[0].role }} {{ messages[0].content | tojson }}", messages)
    assert text == 'user [{"type": "text", "text": "x"}, 0.5, false, "<object>", [1, 2]]'


@pytest.mark.parametrize(("source", "message"), [
    ("{{ raise_exception('Roles must\nalternate.') }}", "refuses the conversation: Roles must alternate"),
    ("{% for m in messages %}", "is not valid Jinja, line 1: Unexpected end of template. Jinja was looking for .*"),
    ("\n\n{{ 1 + }}", "is not valid Jinja, line 3: unexpected 'end of print statement'"),
    ("{{ nothing.at_all }}", "uses what is not there: 'nothing' is undefined"),
    ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
    ("{{ 'x' | no_filter }}", "is not valid Jinja, line 1: No filter named 'no_filter'"),
    ("{% include 'x' %}", "fails: TypeError: no loader for this environment specified"),
    ("{{ ''.__class__.__mro__ }}", "does what the sandbox forbids: access to attribute '__class__' of 'str' object .*"),
    ("{{ cycler.__init__.__globals__.os.system('x') }}", "does what the sandbox forbids: access to attribute .*"),
    ("{{ messages.append(1) }}", "does what the sandbox forbids: access to attribute 'append' of 'list' .*"),
    ("{{ namespace(__class__=1) }}", "does what the sandbox forbids: an attribute of a namespace cannot .*'__class__'"),
    ("{% set n = namespace() %}{% set n._x = 1 %}", "does what the sandbox forbids: .* cannot be named '_x'"),
    ("{{ '{0.__class__.x}'.format(1) }}", "does what the sandbox forbids: access to attribute '__class__' of 'int' .*"),
    ("{{ range(10 ** 9) }}", "fails: OverflowError: Range too big. .*"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
    ("{{ 'x' * 2 ** 33 }}", "takes more than 1024 MiB of memory"),
    ("{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "takes .*"),
    ("{{ 'x' * 2 ** 25 }}", "makes a text of more than 16777216 characters"),
    ("{% for i in range(99999) %}{{ '%9999d' % i }}{% endfor %}", "makes a text of more than 16777216 characters"),
    ("{{ raise_exception('x' * 9999) }}", "refuses the conversation: x{300}\\.\\.\\."),
])  # fmt: skip
def test_templates_that_fail(renderer, source, message):
    with pytest.raises((TokenizerError, ParameterError), match=f"^tokenizer.chat_template {message}$") as raised:
        made(renderer, source)
    assert isinstance(raised.value, ParameterError) == ("raise_exception" in source)
    assert made(renderer, "still {{ messages[0].content }}") == "still Hello"


@pytest.mark.parametrize("source", [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 7 ** (7 ** 9) }}",
    "{{ range(99999) | select('in', range(-99999, 0) | list) | list }}",
    "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"
    "{% endfor %}{{ n.x == n.y }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
])  # fmt: skip
def test_templates_without_end(renderer, monkeypatch, source):
    """A loop in Jinja, and single expressions of CPython's that nothing interrupts, take no longer than they may."""
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=r"^tokenizer.chat_template takes more than .*"):
        made(renderer, source)
    assert time.monotonic() - start < 5
    monkeypatch.undo()
    assert made(renderer, "still") == "still"


@pytest.mark.parametrize(("messages", "message"), [
    ([], "messages is empty: a conversation has one message at least"),
    ("Hello", "messages must be a list of dictionaries, not a str"),
    ({"role": "user"}, "messages must be a list of dictionaries, not a dict"),
    (None, "messages must be a list of dictionaries, not a NoneType"),
    ([*HELLO, "x"], r"messages\[1\] is a str, not a dictionary"),
    ([{"content": "x"}], r"messages\[0\] has no role, as 'user', 'assistant' or 'system'"),
    ([{"role": "user", ("a",): 1}], "the conversation cannot be given to a template: keys must be str, .*"),
])  # fmt: skip
def test_conversations_that_are_none(renderer, messages, message):
    with pytest.raises(ParameterError, match=f"^{message}$"):
        made(renderer, "x", messages)


def test_a_conversation_that_holds_itself(renderer):
    message = {"role": "user", "content": []}
    message["content"].append(message)
    with pytest.raises(ParameterError, match=r"^the conversation cannot be given to a template: Circular reference"):
        made(renderer, "x", [message])


def test_tools_documents_and_variables_must_be_what_they_are(renderer):
    with pytest.raises(ParameterError, match=r"^tools\[0\] is a function, not a dictionary$"):
        made(renderer, "x", tools=[made])
    with pytest.raises(ParameterError, match=r"^documents must be a list of dictionaries, not a str$"):
        made(renderer, "x", documents="x")
    for variables in ([], {1: 2}):
        with pytest.raises(ParameterError, match=r"^the variables for a chat template must be a dictionary"):
            made(renderer, "x", variables=variables)


def test_named_templates(renderer):
    template = ChatTemplate({"default": "D", "tool_use": "T", "rag": "R"}, {}, speaks_chatml=False)
    assert template.render(renderer, HELLO) == "D"
    assert template.render(renderer, HELLO, tools=[]) == "T"
    assert template.render(renderer, HELLO, tools=[], template="default") == "D"
    assert template.render(renderer, HELLO, template="rag") == "R"
    assert template.render(renderer, HELLO, template="{{ 'J' }}") == "J"
    with pytest.raises(ParameterError, match=r"'x': the model has no chat template of this name, but 'default', "):
        template.render(renderer, HELLO, template="x")
    for wrong in ("", 1):
        with pytest.raises(ParameterError, match=r"is neither a template's name nor its Jinja source$"):
            template.render(renderer, HELLO, template=wrong)


def test_models_without_a_default_template(renderer):
    with pytest.raises(TokenizerError, match=r"^the model has no default chat template: choose one of 'rag' by its "):
        ChatTemplate({"rag": "R"}, {}, speaks_chatml=False).render(renderer, HELLO)
    with pytest.raises(TokenizerError, match=r"^the model has no chat template \(tokenizer.chat_template\), and its "):
        ChatTemplate({}, {}, speaks_chatml=False).render(renderer, HELLO)
    text = ChatTemplate({}, {}, speaks_chatml=True).render(renderer, chat_cases.TURNS)
    assert text == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in chat_cases.TURNS
    ) + "<|im_start|>assistant\n"  # fmt: skip


class Words:
    """A tokenizer whose special tokens are some words."""

    bos_id, eos_id, pad_id = 0, 1, None

    def __init__(self, *words):
        self.words = words

    def token_to_piece(self, token, *, special):
        return self.words[token].encode()

    def encode(self, text, *, add_special, parse_special):
        return [self.words.index(text)] if text in self.words else [7] * len(text)


def test_templates_of_metadata(renderer):
    words = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    named = {"tokenizer.chat_template": "D{{ bos_token }}{{ eos_token }}", "tokenizer.chat_template.rag": "R"}
    template = ChatTemplate.from_metadata({**named, "tokenizer.chat_templates": ["rag"], "x": 1}, Words(*words))
    assert template.sources.keys() == {"default", "rag"} and not template.speaks_chatml
    assert template.render(renderer, HELLO) == "D<s></s>"
    for metadata in ({}, {"tokenizer.chat_template": ""}):
        text = ChatTemplate.from_metadata(metadata, Words(*words)).render(renderer, HELLO)
        assert text.startswith("<|im_start|>user\nHello<|im_end|>\n")
        with pytest.raises(TokenizerError, match=r"^the model has no chat template"):
            ChatTemplate.from_metadata(metadata, Words(*words[:3])).render(renderer, HELLO)


@pytest.mark.parametrize(("source", "message"), [
    (5, "tokenizer.chat_template is not a text"),
    ("\udc80", "tokenizer.chat_template is not valid UTF-8"),
])  # fmt: skip
def test_templates_that_are_no_text(renderer, source, message):
    with pytest.raises(TokenizerError, match=f"^{message}$"):
        made(renderer, source)


def test_a_renderer_that_is_killed_is_replaced(renderer):
    assert made(renderer, "one") == "one"
    os.kill(renderer._process.pid, signal.SIGKILL)
    with pytest.raises(TokenizerError, match=r"^tokenizer.chat_template cannot be rendered: .* ended with SIGKILL$"):
        made(renderer, "two")
    assert made(renderer, "three") == "three"


def test_ctrl_c_ends_a_rendering(renderer):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        made(renderer, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    timer.join()
    assert made(renderer, "x") == "x"


def test_after_fork_each_process_has_its_own(renderer):
    assert made(renderer, "x") == "x"
    process = renderer._process
    renderer._owner = os.getppid()  # as in a child of os.fork()
    assert made(renderer, "y") == "y"
    assert renderer._process is not process
    process.kill()
    os.waitpid(process.pid, 0)


def test_threads_take_turns(renderer):
    texts = {}

    def work(i):
        for j in range(20):
            texts[i, j] = made(renderer, "{{ n }}", variables={"n": [i, j]})

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {(i, j): f"[{i}, {j}]" for i in range(4) for j in range(20)}


def test_closing():
    renderer = Renderer()
    assert made(renderer, "x") == "x"
    process = renderer._process
    renderer.close()
    renderer.close()
    assert process.returncode is not None
    with pytest.raises(ClosedError, match=r"^this renderer of chat templates is closed$"):
        made(renderer, "x")


def test_a_module_of_that_name_in_the_present_folder_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    renderer = Renderer()
    assert made(renderer, "x") == "x"
    renderer.close()
