"""One session: evaluation, rewinding, generation, and what remains after an error or an interruption."""

import signal
import threading

import numpy as np
import pytest
from tiny_models import EOS, random_ids

import pyggml_adapt as pga
from pyggml_adapt.engine.sampling import SamplerParams
from pyggml_adapt.errors import BusyError, ClosedError, ContextFullError, ParameterError, TokenError

GREEDY = SamplerParams(temperature=0.0)


@pytest.fixture(scope="module")
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1, n_ubatch=32) as host:
        yield host


@pytest.fixture
def session(host):
    with host.session(n_ctx=256) as session:
        yield session


def alone(host, ids):
    """Return the logits of the last of ids in a session of its own, token by token after the first 20."""
    with host.session(n_ctx=256) as session:
        logits = session.eval(ids[:20])
        for token in ids[20:]:
            logits = session.eval([token])
        return logits


def test_eval_appends(host, session):
    ids = random_ids(30)
    session.eval(ids[:20])
    assert (session.n_past, session.tokens) == (20, ids[:20])
    for token in ids[20:]:
        logits = session.eval([token])
    assert logits.dtype == np.float32 and logits.shape == (session.n_vocab,)
    assert session.tokens == ids
    np.testing.assert_array_equal(logits, alone(host, ids))


def test_all_logits(session):
    logits = session.eval(random_ids(70), all_logits=True)
    assert logits.shape == (70, session.n_vocab)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("ids", [[3, 4, 5], (3, 4, 5), range(3, 6), np.array([3, 4, 5]), np.array([3, 4, 5], np.uint8)])
def test_kinds_of_ids(session, ids):
    assert session.eval(ids).shape == (session.n_vocab,)
    assert session.tokens == [3, 4, 5]


@pytest.mark.parametrize(("ids", "message"), [
    ([1, -1], r"token id -1 at position 1 is not from 0 to \d+"),
    ([1, 2, 10**6], r"token id 1000000 at position 2 is not from 0 to \d+"),
    ([2**63], r"token id 9223372036854775808 at position 0 is not from 0 to \d+"),
    ([2**70], "token ids must be a flat sequence of whole numbers, not "),
    ([1.5], r"token ids must be a flat sequence of whole numbers, not \[1.5\]"),
    ([True], r"token ids must be a flat sequence of whole numbers, not \[True\]"),
    ("abc", "token ids must be a flat sequence of whole numbers, not 'abc'"),
    ([[1, 2]], "token ids must be a flat sequence"),
    ([[1], [2, 3]], "token ids must be a flat sequence of whole numbers, not "),
    (None, "token ids must be a flat sequence of whole numbers, not None"),
    (7, "token ids must be a flat sequence"),
])  # fmt: skip
def test_ids_that_cannot_be(host, session, ids, message):
    session.eval([1])
    with pytest.raises(TokenError, match=f"^{message}"):
        session.eval(ids)
    with pytest.raises(TokenError, match=f"^{message}"):
        session.generate_ids(ids, max_tokens=1, params=GREEDY)
    assert session.tokens == [1]


def test_no_ids(session):
    for use in (session.eval, lambda ids: session.generate_ids(ids, max_tokens=1, params=GREEDY)):
        for ids in ([], (), np.array([], dtype=np.int32)):
            with pytest.raises(TokenError, match=r"^there are no tokens to evaluate$"):
                use(ids)


def test_generation_goes_on_without_ids(host, session):
    ids = random_ids(20)
    logits = session.eval(ids)
    assert np.shares_memory(session.logits, logits)
    with pytest.raises(TokenError, match=r"^there are no tokens to evaluate$"):
        session.eval([])
    tokens = list(session.generate_ids([], max_tokens=3, params=GREEDY))
    tokens += session.generate_ids([], max_tokens=3, params=GREEDY)  # from the token generated last
    with host.session(n_ctx=256) as other:
        assert list(other.generate_ids(ids, max_tokens=6, params=GREEDY)) == tokens


def test_logits_of_the_last_token(session):
    assert session.logits is None
    rows = session.eval(random_ids(20), all_logits=True)
    np.testing.assert_array_equal(session.logits, rows[-1])
    assert not np.shares_memory(session.logits, rows)  # which may be large
    session.rewind(20)
    np.testing.assert_array_equal(session.logits, rows[-1])
    session.rewind(19)
    assert session.logits is None
    with pytest.raises(TokenError, match=r"^there are no tokens to evaluate$"):
        session.generate_ids([], max_tokens=1, params=GREEDY)


def test_rewind_is_as_if_it_never_was(host, session):
    ids = random_ids(30)
    session.eval(random_ids(100, seed=9))
    session.rewind(0)
    session.eval(ids[:20])
    session.eval(random_ids(40, seed=8))
    session.rewind(20)
    assert session.tokens == ids[:20]
    for token in ids[20:]:
        logits = session.eval([token])
    np.testing.assert_array_equal(logits, alone(host, ids))


@pytest.mark.parametrize("n_past", [-1, 6, 1.5, None])
def test_rewind_too_far(session, n_past):
    session.eval(random_ids(5))
    with pytest.raises(ParameterError, match=f"^rewind: n_past = {n_past} is not from 0 to 5$"):
        session.rewind(n_past)
    assert session.n_past == 5 and session.logits is not None


def test_context_full_before_work_is_lost(host, session):
    ids = random_ids(250)
    session.eval(ids)
    with pytest.raises(ContextFullError, match=r"^the context of 256 tokens holds 250: 7 more do not fit"):
        session.eval(random_ids(7))
    with pytest.raises(ContextFullError, match="7 more do not fit"):
        session.generate_ids(random_ids(7), max_tokens=1, params=GREEDY)
    assert session.tokens == ids
    session.eval(random_ids(6))
    with pytest.raises(ContextFullError, match=r"256: 1 more do not fit; start the session with a larger n_ctx$"):
        session.eval([5])


def test_context_smaller_than_its_cells(host):
    with host.session(n_ctx=10) as session:
        with pytest.raises(ContextFullError, match=r"^the context of 10 tokens holds 0: 11 more"):
            session.eval(random_ids(11))
        generation = session.generate_ids(random_ids(4), max_tokens=100, params=GREEDY)
        assert len(list(generation)) == 6
        assert generation.finish_reason == "length" and session.n_past == 10


def test_generation_is_greedy_evaluation(host, session):
    ids = random_ids(20)
    generation = session.generate_ids(ids, max_tokens=12, params=GREEDY)
    assert session.n_past == 0  # nothing happens before it is asked for
    tokens = list(generation)
    assert (generation.tokens, generation.finish_reason) == (tokens, "length")
    assert session.tokens == ids + tokens
    for i in range(12):
        assert alone(host, ids + tokens[:i]).argmax() == tokens[i]
    timings = generation.timings
    assert (timings.prompt_n, timings.predicted_n) == (20, 12)
    assert timings.prompt_ms > 0 and timings.predicted_ms > 0


def test_the_token_generated_last_is_evaluated_when_it_is_needed(host, session):
    ids = random_ids(20)
    tokens = list(session.generate_ids(ids, max_tokens=3, params=GREEDY))
    more = random_ids(4, seed=5)[1:]
    rows = session.eval(more, all_logits=True)  # the third token first, then these
    assert rows.shape == (3, session.n_vocab)
    assert session.tokens == ids + tokens + more
    with host.session(n_ctx=256) as other:
        other.eval(ids)
        for token in tokens[:2]:
            other.eval([token])
        np.testing.assert_array_equal(rows, other.eval([tokens[2], *more], all_logits=True)[1:])


def test_rewind_over_the_token_generated_last(host, session):
    ids = random_ids(20)
    tokens = list(session.generate_ids(ids, max_tokens=3, params=GREEDY))
    session.rewind(22)
    assert session.tokens == ids + tokens[:2]
    assert session.eval([7]).argmax() == alone(host, [*ids, *tokens[:2], 7]).argmax()


@pytest.mark.parametrize("use", [lambda session: session.rewind(20), lambda session: session.eval([5])])
def test_a_generation_whose_session_moved_on(session, use):
    generation = session.generate_ids(random_ids(20), max_tokens=9, params=GREEDY)
    next(generation)
    use(session)
    with pytest.raises(TokenError, match=r"^there is nothing to evaluate: the session was rewound or used since"):
        next(generation)


@pytest.mark.parametrize("n", [0, 1])
def test_generate_none_or_one(session, n):
    generation = session.generate_ids(random_ids(5), max_tokens=n, params=GREEDY)
    assert len(list(generation)) == n
    assert (generation.finish_reason, session.n_past) == ("length", 5 + n)


@pytest.mark.parametrize("n", [-1, 1.5, "3"])
def test_numbers_of_tokens_that_cannot_be(session, n):
    with pytest.raises(ParameterError, match=rf"^max_tokens = {n!r} is neither None nor a whole number from 0 on$"):
        session.generate_ids([1], max_tokens=n, params=GREEDY)


def test_as_many_tokens_as_fit(session):
    generation = session.generate_ids(random_ids(250), max_tokens=None, params=GREEDY)
    assert (len(list(generation)), generation.finish_reason) == (6, "length")


def test_two_generations_in_one_session(session):
    one = session.generate_ids(random_ids(5), max_tokens=9, params=GREEDY)
    next(one)
    other = session.generate_ids([7], max_tokens=3, params=GREEDY)
    assert len(list(other)) == 3
    with pytest.raises(BusyError, match=r"^this generation cannot go on: another one has begun in its session$"):
        next(one)


def test_stop_tokens(host, session):
    ids = random_ids(20)
    with host.session(n_ctx=256) as other:
        tokens = list(other.generate_ids(ids, max_tokens=6, params=GREEDY))
    stop = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    generation = session.generate_ids(ids, max_tokens=6, params=GREEDY, stop_ids={tokens[stop]})
    assert list(generation) == generation.tokens == tokens[:stop]
    assert generation.finish_reason == "stop"
    assert session.tokens == ids + tokens[: stop + 1]  # the conversation goes on after the end-of-turn token
    assert EOS not in tokens


def test_seeds(session):
    def draw(seed):
        session.rewind(0)
        return list(
            session.generate_ids(random_ids(5), max_tokens=20, params=SamplerParams(seed=seed, temperature=2.0))
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_interrupted_generation(host, session):
    """Ctrl-C while tokens are generated: the session and the host go on as if the last token had not been asked for."""
    ids = random_ids(20)
    for delay in (0.0005, 0.003, 0.01, 0.03):
        session.rewind(0)
        generation = session.generate_ids(ids, max_tokens=200, params=GREEDY)
        timer = threading.Timer(delay, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in generation:
                pass
            timer.join()  # it was faster: the signal comes here
        tokens = session.tokens
        assert tokens == [] or tokens[:20] == ids
        rest = ids[len(tokens) :] + [7]
        logits = session.eval(rest)
        with host.session(n_ctx=256) as other:
            want = other.eval(session.tokens)
        error = ((logits - want) ** 2).sum() / (want**2).sum()
        assert error < 1e-5  # pieces of other sizes than in one go: other kernels, so not the same bits


def test_failed_evaluation_leaves_the_session_as_before(host, session, monkeypatch):
    ids = random_ids(100)
    session.eval(ids[:20])
    run, calls = type(host._engine).eval, []

    def fail_second(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no more")
        return run(self, *args)

    monkeypatch.setattr(type(host._engine), "eval", fail_second)
    with pytest.raises(MemoryError):
        session.eval(ids[20:])  # the first piece of 32 is in the cache already
    monkeypatch.undo()
    assert session.tokens == ids[:20]
    for token in ids[20:30]:
        logits = session.eval([token])
    np.testing.assert_array_equal(logits, alone(host, ids[:30]))


def test_use_after_close(host):
    session = host.session(n_ctx=256)
    generation = session.generate_ids([1], max_tokens=5, params=GREEDY)
    next(generation)
    session.close()
    session.close()
    for use in (
        lambda: session.eval([1]),
        lambda: session.rewind(0),
        lambda: next(generation),
        lambda: session.generate_ids([1], max_tokens=1, params=GREEDY),
    ):
        with pytest.raises(ClosedError, match=r"^this session with task 'base' is closed$"):
            use()


def test_repr(session):
    session.eval([1, 5])
    assert repr(session) == "<Session 'base', 2 of 256 tokens>"


def test_logits_of_the_last_tokens(host):
    """Those of all tokens, as far as they are wanted, whatever the pieces in which they are computed."""
    ids = random_ids(60)
    with host.session(n_ctx=256) as session, host.session(n_ctx=256) as other:
        rows = session.eval_last(ids, 41)
        assert rows.shape == (41, session.n_vocab)
        np.testing.assert_array_equal(session.logits, rows[-1])
        every = other.eval(ids, all_logits=True)
        assert ((rows - every[19:]) ** 2).sum() / (every**2).sum() < 1e-9  # the last layer is computed for fewer rows
        with pytest.raises(ParameterError, match=r"^n_logits = 4 is not from 1 to 3$"):
            session.eval_last([5, 6, 7], 4)
        assert session.n_past == 60
