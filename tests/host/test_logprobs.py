"""Log-probabilities: of which distribution, in which order, and to which tokens they belong."""

import math

import numpy as np
import pytest
from reference import Reference
from tiny_models import EOS, random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine.logprobs import MAX_TOP, Scorer
from pyggml_adapt.errors import ParameterError, TokenError

GREEDY = pga.SamplerParams(temperature=0.0)
BENT = {"temperature": 2.0, "top_k": 5, "repeat_penalty": 1.5, "logit_bias": {7: 3.0, 9: -math.inf}, "seed": 3}


@pytest.fixture(scope="module")
def path(tiny_gguf):
    return tiny_gguf()


@pytest.fixture(scope="module")
def host(path):
    with pga.Host(path, n_threads=1, n_ubatch=32) as host:
        yield host


def log_softmax(rows):
    rows = np.asarray(rows, dtype=np.float64)
    shifted = rows - rows.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_are(logprobs, tokens, expected):
    """Assert that the log-probabilities of tokens are those of rows."""
    assert [each.token for each in logprobs] == list(tokens)
    for each, row in zip(logprobs, expected, strict=True):
        assert each.logprob == pytest.approx(row[each.token], abs=2e-6)
        assert [top.token for top in each.top] == np.argsort(-row, kind="stable")[: len(each.top)].tolist()
        np.testing.assert_allclose([top.logprob for top in each.top], np.sort(row)[::-1][: len(each.top)], atol=2e-6)


def test_of_the_model_and_not_of_what_is_drawn_from(path, host):
    """Biases, penalties and temperature change the tokens, and not these numbers, which are llama.cpp's logits'."""
    ids = random_ids(40)
    params = pga.SamplerParams(**BENT)
    with host.session(n_ctx=256) as session:
        generation = session.generate_ids(ids, max_tokens=20, params=params, logprobs=4)
        tokens = list(generation)
    assert len(tokens) == 20 and len({each.top[0].token == each.token for each in generation.logprobs}) == 2
    assert {len(each.top) for each in generation.logprobs} == {4} and generation.prompt_logprobs is None
    with Reference(path, n_threads=1, n_ubatch=32) as reference:
        rows = [reference.eval(ids), *(reference.eval([token]) for token in tokens[:-1])]
    assert_are(generation.logprobs, tokens, log_softmax(rows))


def test_while_it_goes_on(host):
    with host.session(n_ctx=256) as session:
        generation = session.generate("the", max_tokens=9, temperature=0.0, logprobs=0)
        n_pieces = 0
        for _ in generation:
            n_pieces += 1
            assert [each.token for each in generation.logprobs] == generation.tokens
        assert n_pieces > 1 and {each.top for each in generation.logprobs} == {()}
        assert max(each.logprob for each in generation.logprobs) <= 0.0


def test_nothing_is_kept_unless_asked_for(host, monkeypatch):
    monkeypatch.setattr(Scorer, "score", None)
    with host.session(n_ctx=256) as session:
        generation = session.generate("the", max_tokens=5, temperature=0.0)
        assert "".join(generation) and generation.logprobs is None and generation.prompt_logprobs is None


def test_bytes_of_tokens(host):
    with host.session(n_ctx=256) as session:
        generation = session.generate("the", max_tokens=9, temperature=0.0, logprobs=MAX_TOP)
        list(generation)
        pieces = {i: host.tokenizer().token_to_piece(i, special=True) for i in range(session.n_vocab)}
        tops = [top for scored in generation.logprobs for top in scored.top]
        for each in (*generation.logprobs, *tops):
            assert each.bytes == pieces[each.token] and each.text == pieces[each.token].decode(errors="replace")
        assert pieces[EOS] == b"</s>" and len(tops) == MAX_TOP * len(generation.tokens)
        session.rewind(0)
        generation = session.generate_ids(random_ids(9), max_tokens=1, params=GREEDY, logprobs=1)
        list(generation)
        assert generation.logprobs[0].bytes == b""  # a session of ids knows no texts


def test_tokens_cut_off_by_a_stop_string_have_theirs(host):
    with host.session(n_ctx=256) as session:
        text = "".join(session.generate("the", max_tokens=20, temperature=0.0, repeat_penalty=1.3))
    with host.session(n_ctx=256) as session:
        options = {"max_tokens": 20, "temperature": 0.0, "repeat_penalty": 1.3, "logprobs": 2}
        generation = session.generate("the", stop=[text[5:8]], **options)
        assert "".join(generation) == text[: text.find(text[5:8])]
        assert [each.token for each in generation.logprobs] == generation.tokens
        assert len(b"".join(each.bytes for each in generation.logprobs)) >= text.find(text[5:8]) + 3


def test_the_token_that_stops_has_none(host):
    with host.session(n_ctx=256) as session:
        generation = session.generate("the", max_tokens=9, temperature=0.0, logit_bias={EOS: 1e4}, logprobs=2)
        assert (list(generation), generation.tokens, generation.logprobs) == ([], [], [])
        assert generation.finish_reason == "stop"


@pytest.mark.parametrize("n_ubatch", [1, 7, 32, 512])
def test_of_a_prompt(path, n_ubatch):
    """They come in pieces, with the bits of one call."""
    ids = random_ids(90)
    with pga.Host(path, n_threads=1, n_ubatch=n_ubatch, n_batch=50) as host, host.session(n_ctx=256) as session:
        generation = session.generate_ids(ids, max_tokens=3, params=GREEDY, logprobs=2, score_prompt=True)
        tokens = list(generation)
        with host.session(n_ctx=256) as fresh:
            rows = fresh.eval(ids, all_logits=True)
            assert tokens == list(fresh.generate_ids([], max_tokens=3, params=GREEDY))
        first, *rest = generation.prompt_logprobs
        assert (first.token, first.logprob, first.top) == (ids[0], None, ())
        scorer = Scorer(2)
        assert rest == [scorer.score(row, token) for row, token in zip(rows, ids[1:], strict=False)]
        assert_are(rest, ids[1:], log_softmax(rows[:-1]))


def test_order_of_equals():
    logits = np.array([1, 3, 2, 3, 2, 2, -np.inf], dtype=np.float32)
    for n in (0, 1, 3, 4, 99):
        assert [top.token for top in Scorer(n).score(logits, 0).top] == [1, 3, 2, 4, 5, 0, 6][:n]
    assert Scorer(7).score(logits, 6).logprob == -np.inf


def test_sums_are_exact_enough():
    """A sum of 152,000 numbers in F32 would show in the fourth digit."""
    logits = np.full(152_000, -3.0, dtype=np.float32)
    assert Scorer(0).score(logits, 5).logprob == pytest.approx(-math.log(152_000), abs=1e-9)
    logits = np.random.default_rng(0).standard_normal(152_000, dtype=np.float32) * 4
    found = Scorer(20).score(logits, 77)
    assert_are([found], [77], log_softmax(logits[None]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_give_none(value):
    logits = np.array([0, value, 1], dtype=np.float32)
    with pytest.raises(TokenError, match=rf"^there are no log-probabilities: the largest logit is {value}$"):
        Scorer(1).score(logits, 0)
    with pytest.raises(TokenError, match="the largest logit is -inf"):
        Scorer(1).score(np.full(3, -np.inf, dtype=np.float32), 0)


@pytest.mark.parametrize("logprobs", [-1, MAX_TOP + 1, 1.5, "2", True])
def test_numbers_that_cannot_be(host, logprobs):
    with host.session(n_ctx=64) as session:
        for use in (session.generate, session.complete):
            with pytest.raises(ParameterError, match=r"^logprobs = "):
                use("the", logprobs=logprobs)
    with pytest.raises(ParameterError, match=r"^logprobs = "):
        host.completions("the", logprobs=logprobs)
