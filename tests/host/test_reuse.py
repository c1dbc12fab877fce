"""A new prompt for the whole session: what is kept, what is evaluated, and that the bits are a fresh session's."""

import numpy as np
import pytest
from tiny_models import random_ids

import pyggml_adapt as pga
from pyggml_adapt.errors import BusyError, ClosedError, ContextFullError, ParameterError, TokenError

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def host(tiny_gguf):
    """Return a host whose tokens are evaluated one by one, so that bits do not depend on what a session kept."""
    with pga.Host(tiny_gguf(), n_threads=1, n_batch=1, n_ubatch=1) as host:
        yield host


@pytest.mark.parametrize(("before", "new", "kept"), [
    (0, 20, 0),
    (20, 20, 19),  # the last one is evaluated again
    (20, 30, 20),
    (20, 12, 11),
    (20, 1, 0),
])  # fmt: skip
def test_what_is_kept(host, before, new, kept):
    ids = random_ids(30)
    with host.session(n_ctx=64) as session, host.session(n_ctx=64) as fresh:
        if before:
            session.eval(ids[:before])
        rest = session.reuse(ids[:new])
        assert (session.tokens, rest) == (ids[:kept], ids[kept:new])
        np.testing.assert_array_equal(session.eval(rest), fresh.eval(ids[:new]))


def test_another_prompt(host):
    ids = random_ids(30)
    other = [*ids[:9], 77, *ids[10:20]]
    with host.session(n_ctx=64) as session, host.session(n_ctx=64) as fresh:
        list(session.generate_ids(ids, max_tokens=5, params=pga.SamplerParams(**GREEDY)))
        assert session.reuse(np.array(other)) == other[9:] and session.tokens == other[:9]
        np.testing.assert_array_equal(session.eval(other[9:]), fresh.eval(other))


def test_complete_is_a_fresh_generation(host):
    """Whatever the session was used for before, text and logits are those of a new one."""
    prompts = ["the in", "the in a upon", "the", "a upon the in", "the in a upon he", "the in a upon he"]
    with host.session(n_ctx=256) as session:
        for prompt in prompts:
            found = "".join(session.complete(prompt, max_tokens=9, **GREEDY))
            assert found == host.generate(prompt, max_tokens=9, **GREEDY)
            with host.session(n_ctx=256) as fresh:
                fresh.eval(session.tokens[: session._n_evaluated])
                np.testing.assert_array_equal(fresh.logits, session.logits)
        last = session.complete(host.tokenize(prompts[-1]), max_tokens=9, **GREEDY)
        assert "".join(last) == found and last.timings.prompt_n == 1


def test_nothing_is_forgotten_before_it_begins(host):
    with host.session(n_ctx=32) as session:
        ids = random_ids(20)
        session.eval(ids)
        waiting = session.complete("the", max_tokens=3, **GREEDY)
        with pytest.raises(ContextFullError, match=r"^the prompt takes 33 tokens, more than the context of 32: "):
            session.complete(random_ids(33))
        with pytest.raises(ContextFullError, match=r"^the prompt takes 33 tokens"):
            session.reuse(random_ids(33))
        for wrong in ({"top_k": -1}, {"max_tokens": -1}, {"stop": [""]}, {"logit_bias": {10**6: 1.0}}):
            with pytest.raises((ParameterError, TokenError)):
                session.complete("a", **wrong)
        with pytest.raises(TokenError, match=r"^there are no tokens to evaluate$"):
            session.reuse([])
        assert session.tokens == ids and session.logits is not None
        assert "".join(waiting) == host.generate("the", max_tokens=3, **GREEDY)


def test_one_generation_at_a_time(host):
    with host.session(n_ctx=64) as session:
        first = session.complete("the", max_tokens=20, **GREEDY)
        next(first)
        next(session.complete("the in", max_tokens=20, **GREEDY))
        with pytest.raises(BusyError, match="another one has begun"):
            list(first)
    with pytest.raises(ClosedError):
        session.reuse([1])


def test_windows(tiny_gguf):
    """Back to a place that the window has left, everything is evaluated again."""
    ids = random_ids(200)
    with pga.Host(tiny_gguf("gemma2", n_layer=4), n_threads=1, n_batch=1, n_ubatch=1) as host:
        with host.session(n_ctx=256) as session, host.session(n_ctx=256) as fresh:
            session.eval(ids)
            rest = session.reuse(ids[:100])
            assert session.tokens + rest == ids[:100]
            np.testing.assert_array_equal(session.eval(rest), fresh.eval(ids[:100]))
