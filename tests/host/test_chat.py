"""Replies to conversations: which template counts, which tokens the model sees, and which of a session's are kept."""

import numpy as np
import pytest
from tasks import COMMON
from tiny_models import BOS, Tiny, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import BusyError, ContextFullError, ParameterError, TokenizerError

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
GREEDY = {"temperature": 0.0}


def talk(*texts):
    """Return a conversation in which user and assistant take turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write(path, templates, **variant):
    tiny = Tiny(**{**COMMON, **variant})
    return write_gguf(path, {**tiny.all_metadata(), **templates}, tensors_of(tiny))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Return a host whose tokens are evaluated one by one, so that bits do not depend on what a session kept."""
    path = write(tmp_path_factory.mktemp("chat") / "m.gguf", {"tokenizer.chat_template": PLAIN})
    with pga.Host(path, n_threads=1, n_batch=1, n_ubatch=1) as host:
        yield host


def test_reply_is_what_follows_the_rendered_text(host):
    messages = talk("the", "e", "in the")
    text = "user: the\nassistant: e\nuser: in the\na:"
    reply = host.chat(messages, max_tokens=12, **GREEDY)
    assert reply == host.generate(text, max_tokens=12, **GREEDY) != ""
    assert "".join(host.stream_chat(messages, max_tokens=12, **GREEDY)) == reply
    assert host.chat(messages, max_tokens=12, n_ctx=300, template="{{ 'the' }}", **GREEDY) == host.generate(
        "the", max_tokens=12, **GREEDY
    )
    assert not host._sessions


def test_bos_comes_once_and_special_tokens_are_taken_for_themselves(host):
    text = host._text(None)
    plain = text.prompt(talk("x"), template="{{ messages[0].content }}")
    assert text.prompt(talk("x"), template="{{ bos_token }}{{ messages[0].content }}") == plain
    assert plain == host.tokenize("x") and plain[0] == BOS
    assert text.prompt(talk("x"), template="{{ bos_token }}{{ messages[0].content }}{{ bos_token }}") == [*plain, BOS]


def test_a_session_keeps_what_conversations_share(host):
    """Whatever was said before, tokens and logits are those of a session that is given the conversation alone."""
    rng = np.random.default_rng(0)
    kept = []
    with host.session(n_ctx=512) as session:
        messages = talk("the")
        for _ in range(12):
            before = session.tokens
            reply = "".join(session.chat(messages, max_tokens=int(rng.integers(0, 9)), **GREEDY))
            ids = host._text(None).prompt(messages)
            kept.append(len(before) and sum(np.cumprod([a == b for a, b in zip(before, ids, strict=False)])))
            with host.session(n_ctx=512) as fresh:
                assert session.tokens[: len(ids)] == ids
                fresh.eval(session.tokens[: session._n_evaluated])
                np.testing.assert_array_equal(fresh.logits, session.logits)
            match rng.integers(4):
                case 0:
                    messages = talk("in a")
                case 1:
                    messages = messages[:1]
                case _:
                    messages = [*messages, {"role": "assistant", "content": reply}, *talk("the in")]
    assert max(kept) > 20


@pytest.mark.parametrize("variant", [{"arch": "gemma3", "n_layer": 6}, {}])
def test_replies_after_windows_have_moved_on(tmp_path, variant):
    """A session goes back further than its layers' windows reach, and still replies as a new one does."""
    path = write(tmp_path / "m.gguf", {"tokenizer.chat_template": PLAIN}, **variant)
    with pga.Host(path, n_threads=1, n_batch=1, n_ubatch=1) as host, host.session(n_ctx=512) as session:
        for messages in (talk("the in " * 20), talk("the in " * 4), talk("the in " * 4, "e", "a"), talk("the in " * 9)):
            reply = "".join(session.chat(messages, max_tokens=10, **GREEDY))
            assert reply == host.chat(messages, max_tokens=10, **GREEDY)


def test_the_same_conversation_again(host):
    with host.session(n_ctx=128) as session:
        first = "".join(session.chat(talk("the"), max_tokens=8, **GREEDY))
        assert "".join(session.chat(talk("the"), max_tokens=8, **GREEDY)) == first
        generation = session.chat(talk("the"), max_tokens=8, **GREEDY)
        assert "".join(generation) == first and generation.timings.prompt_n == 1


def test_a_reply_that_is_left_and_one_that_comes_late(host):
    """A reply takes of the session what is there once it begins; the one before it cannot go on then."""
    with host.session(n_ctx=128) as session:
        first = session.chat(talk("the"), max_tokens=8, **GREEDY)
        next(first)
        late = session.chat(talk("in"), max_tokens=8, **GREEDY)
        assert "".join(session.chat(talk("the"), max_tokens=8, **GREEDY)) == host.chat(
            talk("the"), max_tokens=8, **GREEDY
        )
        with pytest.raises(BusyError, match=r"another one has begun"):
            list(first)
        assert "".join(late) == host.chat(talk("in"), max_tokens=8, **GREEDY)


@pytest.mark.parametrize("options", [{"stop": "x"}, {"stop": [""]}, {"top_k": -1}])
def test_a_wrong_option_costs_a_session_nothing(host, options):
    with host.session(n_ctx=300) as session:
        "".join(session.chat(talk("the"), max_tokens=3, **GREEDY))
        before = session.tokens
        with pytest.raises(ParameterError):
            session.chat(talk("in"), **options)
        assert session.tokens == before


def test_conversations_that_do_not_fit(host):
    long = talk("the " * 90)
    with pytest.raises(ContextFullError, match=r"^the conversation takes \d+ tokens, more than the context of 64"):
        host.chat(long, n_ctx=64)
    with pytest.raises(ContextFullError, match=r"more than the context of 1024"):
        host.chat(talk("the " * 1500))
    with host.session(n_ctx=64) as session:
        reply = "".join(session.chat(talk("the"), max_tokens=3, **GREEDY))
        with pytest.raises(ContextFullError):
            session.chat(long)
        assert "".join(session.chat(talk("the"), max_tokens=3, **GREEDY)) == reply
        generation = session.chat(talk("the"), temperature=0.0)
        list(generation)
        assert generation.finish_reason in ("length", "stop")


@pytest.mark.parametrize(("options", "message"), [
    ({"heat": 1}, "heat is not a parameter here"),
    ({"max_tokens": -1}, "max_tokens = -1"),
    ({"n_ctx": 0}, "n_ctx = 0"),
    ({"template_kwargs": 3}, "the variables for a chat template must be a dictionary"),
    ({"template": "{{ '' }}{{ raise_exception('No.') }}"}, "the chat template given refuses the conversation: No"),
])  # fmt: skip
def test_what_is_wrong_is_said_at_once(host, options, message):
    with pytest.raises(ParameterError, match=f"^{message}"):
        host.stream_chat(talk("x"), **options)
    assert not host._sessions


def test_a_template_that_makes_nothing(tmp_path):
    path = write(tmp_path / "m.gguf", {"tokenizer.chat_template": "{{ '' }}", "tokenizer.ggml.add_bos_token": False})
    with pga.Host(path, n_threads=1) as host:
        with pytest.raises(ParameterError, match=r"^the chat template makes no text of these messages$"):
            host.chat(talk("x"))


def test_each_task_has_its_own_template(tmp_path, split_models):
    """Tasks share the tokenizer, and an adaptor's template counts before the foundation's; a reply is its task's."""
    models = {
        "base": write(tmp_path / "b.gguf", {"tokenizer.chat_template": "base {{ messages[0].content }}"}),
        "code": write(
            tmp_path / "c.gguf",
            {"tokenizer.chat_template": "code {{ messages[0].content }}", "tokenizer.chat_template.rag": "rag"},
            changed={"ffn": 1},
        ),
        "none": write(tmp_path / "n.gguf", {}, changed={"attn": 1}),
    }
    foundation, adaptors = split_models(models, "overlay")
    with pga.Host(foundation, adaptors, n_threads=1) as host:
        assert [host._text(task).render(talk("x")) for task in ("base", "code")] == ["base x", "code x"]
        assert host._text("code").render(talk("x"), template="rag") == "rag"
        assert host.tokenizer("base") is host.tokenizer("code") is host.tokenizer("none")
        expected = host.generate("code x", task="code", max_tokens=8, **GREEDY)
        assert host.chat(talk("x"), task="code", max_tokens=8, **GREEDY) == expected
        with pytest.raises(TokenizerError, match=r"^the model has no chat template \(tokenizer.chat_template\)"):
            host.chat(talk("x"), task="none")


def test_closing_ends_the_renderer(tmp_path):
    path = write(tmp_path / "m.gguf", {"tokenizer.chat_template": PLAIN})
    with pga.Host(path, n_threads=1) as host:
        host.chat(talk("x"), max_tokens=1)
        process = host._texts._renderer._process
        assert process.poll() is None
    assert process.returncode is not None
