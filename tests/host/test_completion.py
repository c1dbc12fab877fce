"""Completions of one prompt: each is that of a fresh session, and the prompt is evaluated once."""

import math

import numpy as np
import pytest
from tasks import task_models
from tiny_models import BOS, Tiny, tensors_of, write_gguf

import pyggml_adapt as pga
from pyggml_adapt.errors import AdaptorError, ContextFullError, ParameterError, TokenError

PROMPT = "the in a upon the"
DRAWN = {"temperature": 3.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def host(tiny_gguf, split_models):
    with pga.Host(*split_models(task_models(tiny_gguf)), n_threads=1, n_ubatch=8) as host:
        yield host


@pytest.fixture
def evaluated(host, monkeypatch):
    """Return a list that gets the number of tokens of each evaluation."""
    seen, engine_eval = [], host._engine.eval

    def note(model, weights, cache, batch, out):
        seen.append(batch.n_tokens)
        return engine_eval(model, weights, cache, batch, out)

    monkeypatch.setattr(host._engine, "eval", note)
    return seen


@pytest.mark.parametrize("task", ["base", "code"])
def test_each_is_that_of_a_fresh_session(host, task):
    for seed in (7, 2**64 - 2):
        found = host.completions(PROMPT, task=task, n=4, seed=seed, max_tokens=12, logprobs=2, **DRAWN)
        assert [each.index for each in found] == [0, 1, 2, 3]
        for each in found:
            with host.session(task, n_ctx=64) as session:
                own = (seed + each.index) % 2**64
                fresh = session.generate(PROMPT, seed=own, max_tokens=12, logprobs=2, **DRAWN)
                assert each.text == "".join(fresh)
                assert (list(each.tokens), list(each.logprobs)) == (fresh.tokens, fresh.logprobs)
                assert each.finish_reason == fresh.finish_reason
        assert len({each.tokens for each in found}) == 4
    assert not host._sessions


def test_the_prompt_is_evaluated_once(host, evaluated):
    n = len(host.tokenize(PROMPT, task="base"))
    found = host.completions(PROMPT, task="base", n=5, seed=1, max_tokens=4, logit_bias={2: -math.inf}, **DRAWN)
    assert sum(evaluated) == n + 5 * 3  # a token generated last is not evaluated
    assert all((each.timings.prompt_n, each.timings.predicted_n) == (n, 4) for each in found)
    assert len({each.timings.prompt_ms for each in found}) == 1


def test_two_caches_at_a_time(host, monkeypatch):
    most, session = [], host.session

    def count(*args, **options):
        opened = session(*args, **options)
        most.append(len(host._sessions))
        return opened

    monkeypatch.setattr(host, "session", count)
    host.completions(PROMPT, task="base", n=4, seed=1, max_tokens=2)
    assert most == [1, 2, 2, 2]


def test_greedy_ones_are_equal_and_generate_is_one(host):
    options = {"task": "sum", "max_tokens": 9, "temperature": 0.0}
    first, second = host.completions(PROMPT, n=2, **options)
    assert (first.text, first.tokens) == (second.text, second.tokens)
    assert first.text == host.generate(PROMPT, **options)
    assert first.logprobs is None
    ids = host.tokenize(PROMPT, task="sum")
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert host.completions(prompt, **options)[0].text == first.text


@pytest.mark.parametrize("options", [{"n": 2}, {"echo": True}, {"logprobs": 1}])
def test_generate_takes_none_of_their_parameters(host, options):
    with pytest.raises(ParameterError, match=f"^{next(iter(options))} is not a parameter here"):
        host.generate("the", task="base", **options)


def test_without_a_seed_they_differ(host):
    found = host.completions(PROMPT, task="base", n=3, max_tokens=12, **DRAWN)
    assert len({each.tokens for each in found}) == 3


def test_echo(host):
    ids = tuple(host.tokenize(PROMPT, task="base"))
    options = {"task": "base", "n": 2, "max_tokens": 6, "temperature": 0.0}
    plain, echoed = host.completions(PROMPT, **options)[1], host.completions(PROMPT, echo=True, **options)
    for each in echoed:
        assert (each.text, each.tokens) == (PROMPT + plain.text, ids + plain.tokens)
        assert all(type(token) is int for token in each.tokens)
    of_ids = host.completions(np.array(ids[1:]), echo=True, task="base", max_tokens=0)[0]
    assert (of_ids.text, of_ids.tokens, of_ids.finish_reason) == (PROMPT, ids[1:], "length")


def test_echo_with_logprobs_scores_the_prompt(host, evaluated):
    ids = host.tokenize(PROMPT, task="base")
    (found,) = host.completions(PROMPT, task="base", echo=True, logprobs=1, max_tokens=0)
    assert (found.text, found.tokens) == (PROMPT, tuple(ids)) and sum(evaluated) == len(ids)
    with host.session("base", n_ctx=64) as session:
        rows = session.eval(ids, all_logits=True).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    assert [each.token for each in found.logprobs] == ids
    assert found.logprobs[0].logprob is None
    expected = rows[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose([each.logprob for each in found.logprobs[1:]], expected, atol=2e-6)
    several = host.completions(PROMPT, task="base", n=3, echo=True, logprobs=1, max_tokens=5, seed=1, **DRAWN)
    for each in several:
        assert each.logprobs[: len(ids)] == found.logprobs
        assert [one.token for one in each.logprobs] == list(each.tokens)


def test_stop_strings_end_what_is_generated_only(host):
    options = {"task": "base", "max_tokens": 9, "temperature": 0.0}
    plain = host.completions(PROMPT, **options)[0].text
    found = host.completions(PROMPT, stop=[plain[3:5], "upon"], echo=True, **options)[0]
    assert (found.text, found.finish_reason) == (PROMPT + plain[: plain.find(plain[3:5])], "stop")


@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"n": 0}, ParameterError, "n = 0 is not from 1 "),
    ({"n": 1.5}, ParameterError, "n = 1.5 is not a whole number"),
    ({"seed": -1}, ParameterError, "seed = -1 is not a whole number"),
    ({"heat": 1}, ParameterError, "heat is not a parameter here"),
    ({"max_tokens": -1}, ParameterError, "max_tokens = -1 is not from 0"),
    ({"stop": "x"}, ParameterError, "stop = 'x' is not a list"),
    ({"logit_bias": {10**6: 1.0}}, ParameterError, "logit_bias: token 1000000"),
    ({"n_ctx": 3}, ContextFullError, "the context of 3 tokens holds 0"),
    ({"task": "none"}, AdaptorError, "none"),
    ({"prompt": None}, ParameterError, "prompt must be a text or a list of token ids, not NoneType"),
    ({"prompt": [1.5]}, TokenError, "token ids must be a flat sequence of whole numbers"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_evaluated(host, evaluated, options, kind, message):
    options = {"prompt": PROMPT, "task": "base", **options}
    with pytest.raises(kind, match=message):
        host.completions(n=options.pop("n", 2), **options)
    assert not evaluated and not host._sessions


def test_windows(tiny_gguf):
    """With a sliding window, and a prompt longer than it."""
    prompt = "the in a upon " * 20
    with pga.Host(tiny_gguf("gemma2", n_layer=4), n_threads=1, n_ubatch=16) as host:
        found = host.completions(prompt, n=3, seed=5, max_tokens=9, **DRAWN)
        for each in found:
            assert each.text == host.generate(prompt, seed=5 + each.index, max_tokens=9, **DRAWN)


def test_a_prompt_without_tokens(tmp_path):
    tiny = Tiny()
    path = write_gguf(
        tmp_path / "m.gguf", {**tiny.all_metadata(), "tokenizer.ggml.add_bos_token": False}, tensors_of(tiny)
    )
    sentence = r"^the prompt has no tokens: give some text, or token ids, to go on from$"
    with pga.Host(path, n_threads=1) as host, host.session(n_ctx=64) as session:
        assert host.tokenize("") == []
        for use in (host.generate, host.completions, session.generate, session.complete):
            for prompt in ("", []) if use != host.generate else ("",):
                with pytest.raises(TokenError, match=sentence):
                    use(prompt)
        session.eval([BOS, 5])
        assert list(session.generate("", max_tokens=2, temperature=0.0)) is not None
        with pytest.raises(TokenError, match=sentence):
            session.complete("")
        assert session.n_past > 2  # and nothing is lost
        with pytest.raises(TokenError, match=r"^text 1 has no tokens: it is empty, and the vocabulary adds none$"):
            host.embed(["a", ""])
    assert not host._sessions
