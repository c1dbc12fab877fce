"""Sampling against simple formulas, in sessions, and what is refused."""

import math
from numbers import Integral

import numpy as np
import pytest

import pyggml_adapt as pga
from pyggml_adapt.engine.sampling import Sampler, SamplerParams
from pyggml_adapt.engine.sampling.dry import dry_penalties
from pyggml_adapt.engine.sampling.params import _LIMITS
from pyggml_adapt.engine.sampling.sampler import uniform
from pyggml_adapt.engine.sampling.steps import largest, penalize
from pyggml_adapt.errors import ParameterError, TokenError, TokenizerError

INF = math.inf
LOGITS = np.log(np.array([0.5, 0.1, 0.25, 0.15], dtype=np.float32))
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
FULL = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8}


def params(**values):
    return SamplerParams(**{**OFF, **values})


def kept(**values):
    ids, probs = Sampler(params(**values)).candidates(LOGITS, ())
    return ids.tolist(), [round(p, 6) for p in probs.tolist()]


def draw(logits, recent=(), **values):
    return Sampler(params(**values)).sample(logits, recent)


def test_all_candidates():
    assert sorted(zip(*kept(), strict=True)) == [(0, 0.5), (1, 0.1), (2, 0.25), (3, 0.15)]


def test_top_k():
    assert kept(top_k=2) == ([0, 2], [0.666667, 0.333333])
    assert kept(top_k=9) == ([0, 2, 3, 1], [0.5, 0.25, 0.15, 0.1])
    assert largest(np.array([1, 3, 3, 0, 3], np.float32), 2).tolist() == [1, 2]  # of equals those with lower ids


@pytest.mark.parametrize("kind", ["", "ties", "impossible"])
@pytest.mark.parametrize("n", [1, 100, 5000, 30000])
def test_largest(n, kind):
    logits = (3 * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "impossible":
        logits[n // 2 :] = -INF
    logits[:: max(n // 7, 1)] = 0.0
    logits[:: max(n // 5, 1)] = -0.0
    order = np.argsort(-logits, kind="stable")
    for k in (1, 2, 40, 1000, 8000, n):
        assert largest(logits, k).tolist() == order[:k].tolist()


def test_top_p():
    assert kept(top_p=0.7)[0] == [0, 2]
    assert kept(top_p=0.0)[0] == [0]
    assert kept(top_p=0.99)[0] == [0, 2, 3, 1]
    assert kept(top_p=0.0, min_keep=3)[0] == [0, 2, 3]


def test_min_p():
    assert kept(min_p=0.4)[0] == [0, 2]
    assert kept(min_p=1.0)[0] == [0]
    assert kept(min_p=1.0, min_keep=2)[0] == [0, 2]


def test_typical_p():
    """The entropy is 1.208, the surprises are 0.693, 1.386, 1.897 and 2.303: token 2 is the nearest, then 0."""
    assert kept(typical_p=0.2)[0] == [2]
    assert kept(typical_p=0.3)[0] == [2, 0]
    assert kept(typical_p=0.3, min_keep=3)[0] == [2, 0, 3]


def test_top_n_sigma():
    assert kept(top_n_sigma=1.2) == ([0, 1, 2, 3], [0.666667, 0.0, 0.333333, 0.0])
    assert kept(top_n_sigma=-1.0)[1] == [0.5, 0.1, 0.25, 0.15]


def test_xtc():
    assert kept(xtc_probability=1.0, xtc_threshold=0.2) == ([2, 3, 1], [0.5, 0.3, 0.2])
    assert len(kept(xtc_probability=1.0, xtc_threshold=0.3)[0]) == 4  # nothing but the only one above it
    assert len(kept(xtc_probability=1.0, xtc_threshold=0.2, min_keep=4)[0]) == 4


def test_xtc_is_a_random_decision():
    n = 2000
    sampler = Sampler(params(seed=1, xtc_probability=0.3, xtc_threshold=0.2))
    times = sum(len(sampler.candidates(LOGITS, ())[0]) == 3 for _ in range(n))
    assert abs(times / n - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    for decision, n_left in ((0.29, 3), (0.31, 4)):
        sampler = Sampler(params(xtc_probability=0.3, xtc_threshold=0.2), random=lambda number=decision: number)
        assert len(sampler.candidates(LOGITS, ())[0]) == n_left


def test_temperature():
    _, probs = Sampler(params(temperature=0.5)).candidates(LOGITS, ())
    assert probs.tolist() == pytest.approx([p**2 / 0.345 for p in (0.5, 0.1, 0.25, 0.15)], rel=1e-6)
    for temperature in (1e-4, 1e-29, 1e-300, 0.0):
        assert kept(temperature=temperature)[1] == [1.0, 0.0, 0.0, 0.0]


def test_order_is_filters_first_then_temperature():
    assert kept(top_p=0.7, temperature=4.0)[0] == kept(top_p=0.7)[0]


def test_logit_bias():
    assert kept(logit_bias={0: -INF, 2: math.log(2)})[1] == [0.0, 0.133333, 0.666667, 0.2]
    assert draw(LOGITS, temperature=0.0, logit_bias=[(1, 100)]) == 1
    assert SamplerParams(logit_bias={5: 1, np.int32(2): np.float32(3)}).logit_bias == ((2, 3.0), (5, 1.0))


def test_penalty():
    def penalized(recent, **values):
        return Sampler(params(**{"repeat_penalty": 2.0, **values}))._adjust(logits, recent).tolist()

    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    assert penalize(logits, [0, 1, 1, 3], 2.0, 0.0, 0.0).tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]
    assert penalized([0, 2], repeat_last_n=1) == [2.0, -2.0, 0.5, 0.0]
    assert penalized([0, 2], repeat_last_n=0) == logits.tolist()
    assert penalized([0, *[2] * 99], repeat_last_n=-1)[0] == 1.0
    assert penalized([]) == logits.tolist()
    assert penalized([0, 0, 1], repeat_penalty=1.0, frequency_penalty=0.5) == [1.0, -2.5, 1.0, 0.0]
    assert penalized([0, 0, 1], repeat_penalty=1.0, presence_penalty=0.5) == [1.5, -2.5, 1.0, 0.0]


def dry(last, breakers=None, **values):
    settings = {"multiplier": 1.0, "base": 2.0, "allowed_length": 2, **values}
    ids, penalties = dry_penalties(last, breakers or {}, **settings)
    return dict(zip(ids.tolist(), penalties.tolist(), strict=True))


def test_dry():
    a, b, c, y = 1, 2, 3, 9
    assert dry([a, b, c, c, b, c, y, a, b, c]) == {c: 2.0, y: 1.0}  # after "a b c" came c, after "b c" came y
    assert dry([a, b, c, c, b, c, y, a, b, c], allowed_length=1) == {c: 4.0, y: 2.0, b: 1.0}
    assert dry([a, b, c, c, b, c, y, a, b, c], multiplier=0.5) == {c: 1.0, y: 0.5}
    assert dry([a, b, c], allowed_length=3) == {}
    assert dry([a, b, y, a, b]) == {y: 1.0}
    assert dry([]) == dry([a]) == {}


def test_dry_breakers():
    a, b, x, y = 1, 2, 8, 9
    assert dry([a, a, b, y, a, a, b]) == {y: 2.0}
    assert dry([a, a, b, y, a, a, b], {a: [()]}) == {}  # only "b" comes after the last breaker
    assert dry([a, b, a, y, b, a], {y: [()]}) == {}  # y breaks: it is not made less probable
    assert dry([x, y, a, b, a, x, y, a, b], {x: [(y,)]}) == {a: 1.0}  # of x y a b only what comes after x y
    assert dry([x, y, a, b, a, x, y, a, b], {x: [(a,)]}) == {a: 4.0}
    assert dry([a, b, x, y, a, b, x], {x: [(y,)]}) == {y: 2.0}  # which would complete a breaker of two tokens


def test_long_dry():
    assert dry([7] * 3000, base=1.75) == {7: np.float32(1.75**158)}  # its exponent ends where F32 does
    assert dry([7] * 3000, multiplier=100.0) == {7: INF}
    assert dry([7] * 500, base=1.0) == {7: 1.0}
    assert draw(np.zeros(8, np.float32), [7] * 3000, dry_multiplier=100.0, dry_penalty_last_n=-1, temperature=0.0) == 0


def test_mirostat_takes_the_place_of_the_others():
    options = {
        "mirostat": 2,
        "top_k": 1,
        "top_p": 0.1,
        "repeat_penalty": 9.0,
        "dry_multiplier": 9.0,
        "top_n_sigma": 0.1,
    }
    ids, probs = Sampler(params(**options)).candidates(LOGITS, [0, 0, 0])
    assert (ids.tolist(), probs.tolist()) == ([0, 2, 3, 1], pytest.approx([0.5, 0.25, 0.15, 0.1]))
    assert draw(LOGITS, mirostat=2, logit_bias={1: 5.0}, temperature=0.0) == 1


def test_greedy():
    assert draw(LOGITS, temperature=0.0) == 0
    assert draw(LOGITS, [0, 2], temperature=0.0, repeat_penalty=9.0) == 3
    assert draw(np.zeros(5, np.float32), temperature=0.0) == 0
    assert draw(LOGITS, temperature=0.0, xtc_probability=1.0, xtc_threshold=0.2) == 2  # which takes 0 away
    assert draw(LOGITS, temperature=0.0, typical_p=0.2) == 2
    assert draw(LOGITS, temperature=0.0, top_k=2, top_p=0.5, min_p=0.9, top_n_sigma=0.5) == 0


def test_frequencies_are_the_probabilities():
    sampler = Sampler(params(seed=3))
    n = 20000
    counts = np.bincount([sampler.sample(LOGITS, ()) for _ in range(n)], minlength=4)
    want = np.exp(LOGITS.astype(float))
    assert (np.abs(counts / n - want) < 5 * np.sqrt(want * (1 - want) / n)).all()  # five standard deviations


def test_seeds():
    def tokens(seed):
        sampler = Sampler(params(seed=seed))
        return [sampler.sample(LOGITS, ()) for _ in range(50)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(0) == tokens(0)
    assert tokens(None) != tokens(None)


def test_random_numbers_are_the_same_everywhere():
    random = uniform(42)
    assert [random() for _ in range(3)] == [0.7739560485559633, 0.4388784397520523, 0.8585979199113825]
    sampler = Sampler(params(seed=42))
    assert [sampler.sample(LOGITS, ()) for _ in range(12)] == [2, 0, 3, 2, 0, 3, 2, 2, 0, 0, 0, 3]


def test_the_ends_of_the_range():
    probs = np.array([0.0, 0.5, 0.25, 0.0], np.float32)
    for number, index in ((0.0, 1), (0.66, 1), (0.67, 2), (1 - 2.0**-53, 2)):
        assert Sampler(params(), random=lambda number=number: number)._draw(probs) == index


def test_impossible_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    sampler = Sampler(params(seed=1))
    assert {sampler.sample(logits, ()) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"mirostat": 2}, FULL])
@pytest.mark.parametrize(("value", "name"), [(-INF, "-inf"), (math.nan, "nan"), (INF, "inf")])
def test_logits_that_leave_no_token(options, value, name):
    with pytest.raises(TokenError, match=f"^no token can be drawn: the largest logit is {name}$"):
        draw(np.array([-INF, value, -INF], np.float32), **options)


NUMBERS = [
    ("temperature", "a number from 0 to 10000"),
    ("top_p", "a number from 0 to 1"),
    ("frequency_penalty", "a number from -10000 to 10000"),
    ("presence_penalty", "a number from -10000 to 10000"),
    ("dry_multiplier", "a number from 0 to 10000"),
    ("dry_base", "a number from 1 to 10000"),
    ("dry_allowed_length", "a whole number from 0 to 1073741824"),
    ("dry_penalty_last_n", "a whole number from -1 to 1073741824"),
    ("top_n_sigma", "a number from -1 to 10000"),
    ("typical_p", "a number from 0 to 1"),
    ("xtc_probability", "a number from 0 to 1"),
    ("xtc_threshold", "a number from 0 to 1"),
    ("dynatemp_range", "a number from 0 to 10000"),
    ("dynatemp_exponent", "a number from 0 to 10000"),
    ("mirostat_tau", "a number from 0 to 10000"),
    ("mirostat_eta", "a number from 0 to 10000"),
    ("min_keep", "a whole number from 0 to 1073741824"),
]


@pytest.mark.parametrize(("name", "what"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, INF, -INF, -10001, 10**400, "1", None, True, 1j, [1.0], np.ones(1)])
def test_numbers_that_cannot_be(name, what, value):
    with pytest.raises(ParameterError) as error:
        SamplerParams(**{name: value})
    assert str(error.value) == f"{name} = {value!r} is not {what}"


@pytest.mark.parametrize(("name", "value", "message"), [
    ("mirostat", 1, "mirostat = 1 is neither 0 nor 2, the version that there is"),
    ("mirostat", "2", "mirostat = '2' is neither 0 nor 2, the version that there is"),
    ("mirostat", True, "mirostat = True is neither 0 nor 2, the version that there is"),
    ("seed", True, "seed = True is not a whole number from 0 to 2**64 - 1"),
    ("seed", 1 << 64, "seed = 18446744073709551616 is not a whole number from 0 to 2**64 - 1"),
    ("logit_bias", 5, "logit_bias = 5 is not a mapping of token ids to numbers"),
    ("logit_bias", [5], "logit_bias = [5] is not a mapping of token ids to numbers"),
    ("logit_bias", "5+1", "logit_bias = '5+1' is not a mapping of token ids to numbers"),
    ("logit_bias", {"a": 1}, "logit_bias: 'a' is not a token id"),
    ("logit_bias", {-1: 1}, "logit_bias: -1 is not a token id"),
    ("logit_bias", {True: 1}, "logit_bias: True is not a token id"),
    ("logit_bias", {3: math.nan}, "logit_bias: nan, of token 3, is neither a number from -1000000 to 1000000 nor -inf"),
    ("logit_bias", {3: INF}, "logit_bias: inf, of token 3, is neither a number from -1000000 to 1000000 nor -inf"),
    ("logit_bias", {3: "x"}, "logit_bias: 'x', of token 3, is neither a number from -1000000 to 1000000 nor -inf"),
    ("logit_bias", [(3, 1), (3, 2)], "logit_bias: a token is given twice"),
    ("dry_sequence_breakers", "abc", "dry_sequence_breakers = 'abc' is not a list of texts"),
    ("dry_sequence_breakers", None, "dry_sequence_breakers = None is not a list of texts"),
    ("dry_sequence_breakers", ["a", 1], "dry_sequence_breakers = ['a', 1] is not a list of texts"),
    ("dry_sequence_breakers", [""], "dry_sequence_breakers: '' is of 0 bytes, not of 1 to 40"),
    ("dry_sequence_breakers", ["é" * 21], f"dry_sequence_breakers: {'é' * 21!r} is of 42 bytes, not of 1 to 40"),
    ("dry_sequence_breakers", ["\ud800"], "dry_sequence_breakers: '\\ud800' has a lone surrogate"),
])  # fmt: skip
def test_parameters_that_cannot_be(name, value, message):
    with pytest.raises(ParameterError) as error:
        SamplerParams(**{name: value})
    assert str(error.value) == message


@pytest.mark.parametrize("n", [2, 3000])
@pytest.mark.parametrize(
    "others", [{}, FULL, {"dry_multiplier": 10000.0, "dry_base": 10000.0, "dry_allowed_length": 1}]
)
def test_extreme_parameters(others, n):
    """Whatever is not refused draws a token, without a warning."""
    logits = np.random.default_rng(0).standard_normal(n).astype(np.float32) * 100
    recent = [0, 1 % n, 2 % n] * 30
    for name, kind, least, most in _LIMITS:
        on = {"mirostat": 2} if name.startswith("mirostat_") else {"xtc_probability": 1.0} if "xtc" in name else {}
        for value in (least, most, *([] if kind is Integral else [1e-300, 1e-40, 1e-7])):
            if least <= value:
                sampler = Sampler(params(**{**others, **on, name: value}))
                assert all(0 <= sampler.sample(logits, recent) < n for _ in range(3)), (name, value)


@pytest.fixture(scope="module")
def host(tiny_gguf):
    with pga.Host(tiny_gguf(), n_threads=1) as host:
        yield host


def test_parameters_are_plain_values():
    settings = SamplerParams(logit_bias={1: 2}, dry_sequence_breakers=["x"])
    assert settings == SamplerParams(logit_bias=[(1, 2.0)], dry_sequence_breakers=("x",))
    assert hash(settings) == hash(SamplerParams(logit_bias=[(1, 2.0)], dry_sequence_breakers=("x",)))


def test_in_a_session(host):
    def tokens(**values):
        with host.session(n_ctx=256) as session:
            generation = session.generate("the the the", max_tokens=40, temperature=0.0, **values)
            list(generation)
            return generation.tokens

    plain = tokens()
    assert tokens(logit_bias={plain[0]: -INF})[0] != plain[0]
    assert max(np.bincount(tokens(frequency_penalty=50.0, repeat_last_n=-1))) <= 2
    assert len(set(tokens(presence_penalty=100.0, repeat_last_n=-1))) == 40
    the = host.tokenize("the the", add_special=False)
    assert not set(tokens(presence_penalty=100.0, repeat_last_n=-1)) & set(the)  # the prompt counts
    with host.session(n_ctx=256) as session:
        settings = SamplerParams(temperature=0.0, dry_multiplier=100.0, dry_allowed_length=0)
        ids = host.tokenize("the the the")
        assert (
            list(session.generate_ids(ids, max_tokens=40, params=settings))
            == tokens(dry_multiplier=100.0, dry_allowed_length=0)
            != plain
        )


def test_refused_before_anything_is_evaluated(host, tiny_gguf):
    with host.session(n_ctx=64) as session:
        with pytest.raises(ParameterError, match=r"^logit_bias: token 5000 is not in the vocabulary of \d+$"):
            session.generate("the", logit_bias={5000: 1.0})
        assert session.tokens == []
    with pga.Host(tiny_gguf(tokenizer=False), n_threads=1) as bare, bare.session(n_ctx=64) as session:
        with pytest.raises(TokenizerError, match="tokenizer"):
            session.generate_ids([5], max_tokens=1, params=SamplerParams(dry_multiplier=1.0))
        settings = SamplerParams(dry_multiplier=1.0, dry_sequence_breakers=())
        assert len(list(session.generate_ids([5], max_tokens=3, params=settings))) == 3
