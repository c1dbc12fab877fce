"""Sampling against llama.cpp's samplers: the same candidates, with the same probabilities.

Its arithmetic is F32, and so is ours, in the same order; what may differ is the last bit of exp and log, which C
libraries round differently, and so the last bits of sums: hence a relative tolerance of 1e-6 for probabilities, and
none for tokens.
"""

import itertools
import math

import numpy as np
import pytest
from llama_samplers import Chain, vocabulary
from real_models import real_models

from pyggml_adapt.engine.sampling import Sampler, SamplerParams
from pyggml_adapt.engine.sampling.dry import find_breakers
from pyggml_adapt.ggml.gguf import GGUFReader
from pyggml_adapt.text import Tokenizer

INF = math.inf
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
FULL = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8}
GRID = list(itertools.product((0, 1, 5, 40, 500), (1.0, 0.95, 0.5, 0.0), (0.0, 0.05, 0.5, 1.0), (0.3, 0.8, 2.0)))


def assert_as_llama_cpp(logits, recent=(), chain=None, breakers=None, **values):
    """Check that the candidates are llama.cpp's, with the same probabilities to a few F32 roundings."""
    settings = SamplerParams(**{**OFF, **values})
    ours = Sampler(settings, breakers or {}).candidates(logits, recent)
    with chain or Chain(settings, len(logits)) as reference:
        reference.accept(recent)
        assert_same(
            ours, reference.apply(logits), are_distinct=len(np.unique(logits)) == len(logits), message=str(values)
        )


def assert_same(ours, theirs, *, are_distinct, message=""):
    """Check two pairs of ids and probabilities.

    Of tokens with equal logits at a cut llama.cpp's sort keeps any of them, and ours those with the lower ids: unless
    all are distinct, only those between the least and the most probable ones that are left must be the same.
    """
    (ids, probs), (want_ids, want) = ((i[np.argsort(-p, kind="stable")], -np.sort(-p)) for i, p in (ours, theirs))
    assert len(ids) == len(want_ids), message
    np.testing.assert_allclose(probs, want, rtol=1e-6, atol=1e-37, err_msg=message)
    if are_distinct:
        assert set(ids[probs > 0].tolist()) == set(want_ids[want > 0].tolist()), message
    inside = (probs > probs[-1] * 1.00001) & (probs < probs[0] * 0.99999)
    assert set(ids[inside].tolist()) == set(want_ids[inside].tolist()), message


def random_logits(kind, n, seed=0):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(n)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "impossible":
        logits[rng.random(n) < 0.3] = -INF
    elif kind == "dominant":
        logits[n // 3] = 40.0
    elif kind == "peaked":
        logits = (logits**3 / 9).astype(np.float32)
    elif kind == "equal":
        logits[:] = 1.5
    return logits


STEPS = [
    {},
    FULL,
    {**FULL, "typical_p": 0.9, "xtc_probability": 1.0},
    {"top_k": 40},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.3, "min_keep": 20},
    {"min_p": 0.1},
    {"min_p": 0.9, "min_keep": 7},
    {"top_k": 100, "min_p": 0.5, "min_keep": 9},
    {"top_k": 60, "typical_p": 0.6},
    {"top_k": 60, "typical_p": 0.2, "min_keep": 12, "top_p": 0.8},
    {"top_k": 60, "typical_p": 0.95, "min_p": 0.05},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 2.0, "top_k": 30, "temperature": 1.7},
    {"top_n_sigma": 0.0},
    {"top_k": 50, "xtc_probability": 1.0, "xtc_threshold": 0.03},
    {"top_k": 50, "xtc_probability": 1.0, "xtc_threshold": 0.01, "min_keep": 45},
    {"top_k": 50, "xtc_probability": 1.0, "xtc_threshold": 0.51},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 40, "dynatemp_range": 0.5},
    {"top_k": 40, "temperature": 0.2, "dynatemp_range": 0.7, "dynatemp_exponent": 2.5},
    {"top_n_sigma": 1.0, "top_k": 20, "dynatemp_range": 0.5, "dynatemp_exponent": 0.0},
    {"logit_bias": {3: 2.5, 17: -INF, 42: -1.25, 99: 9.0}, **FULL},
]


NOT_A_NUMBER = ("peaked", "impossible")  # with probabilities of 0, of which llama.cpp takes the logarithm


def test_grid_equals_llama_cpp():
    for i, (k, p, min_p, temperature) in enumerate(GRID):
        options = {"top_k": k, "top_p": p, "min_p": min_p, "temperature": temperature}
        assert_as_llama_cpp(random_logits("", 500, i), **options)


@pytest.mark.parametrize("kind", ["", "ties", "dominant", "peaked", "equal", "impossible"])
@pytest.mark.parametrize("n", [100, 2000, 32000])
def test_steps_equal_llama_cpp(kind, n):
    for seed, options in enumerate(STEPS):
        if not (kind in NOT_A_NUMBER and {"typical_p", "dynatemp_range"} & options.keys()):
            assert_as_llama_cpp(random_logits(kind, n, seed), **options)


@pytest.mark.parametrize("kind", ["", "peaked"])
def test_a_large_vocabulary(kind):
    for seed, options in enumerate(({}, FULL, {"top_p": 0.95}, {"top_n_sigma": 1.0}, {"typical_p": 0.5})):
        if kind not in NOT_A_NUMBER or "typical_p" not in options:
            assert_as_llama_cpp(random_logits(kind, 151936, seed), **options)


@pytest.mark.parametrize("n", [50, 5000])
def test_penalties_equal_llama_cpp(n):
    rng = np.random.default_rng(2)
    options = itertools.product((0, 1, 16, 64, 300), (1.0, 1.3, 0.7), (0.0, 0.4, -0.3), (0.0, 0.7))
    for last_n, repeat, frequency, presence in options:
        assert_as_llama_cpp(
            (3 * rng.standard_normal(n)).astype(np.float32),
            rng.integers(0, 50, 100).tolist(),
            repeat_last_n=last_n,
            repeat_penalty=repeat,
            frequency_penalty=frequency,
            presence_penalty=presence,
        )


@pytest.fixture(scope="module")
def tokenizers(tiny_gguf):
    """(tokenizer, llama.cpp's vocabulary) of a small model, and of trained ones that are here."""
    pairs = []
    for path in (tiny_gguf(), *real_models("tiny-base-q8_0.gguf", "stories260K-base-q8_0.gguf")):
        with GGUFReader(path) as reader:
            pairs.append((Tokenizer.from_metadata(reader.metadata), vocabulary(path)))
    return pairs


@pytest.mark.parametrize("texts", [
    (), ("\n", ":", '"', "*"), ("e",), ("the",), (" the", "upon a"), ("é",), ("ing the", "世e"), ("a" * 40,),
])  # fmt: skip
def test_dry_equals_llama_cpp(tokenizers, texts):
    rng = np.random.default_rng(3)
    for tokenizer, vocab in tokenizers:
        breakers = find_breakers(tokenizer, texts)
        n = tokenizer.n_vocab
        ids = tokenizer.encode("the é once upon a time: a thing\n* the other thing e", add_special=False)
        for seed in range(12):
            recent = ids * 3 if seed < 2 else rng.choice(rng.choice([*ids, *range(n)], 2 + seed), 150).tolist()
            recent += recent[20 : 20 + 2 * seed]
            for options in (
                {"dry_penalty_last_n": 64},
                {"dry_penalty_last_n": 1000, "dry_allowed_length": 0, "dry_base": 1.1},
                {"dry_penalty_last_n": 100, "dry_allowed_length": 4, "dry_base": 3.0},
                {"dry_penalty_last_n": 400, "dry_base": 1.0},
            ):
                settings = {"dry_multiplier": 0.8, "dry_sequence_breakers": texts, **options}
                chain = Chain(SamplerParams(**{**OFF, **settings}), n, vocab)
                assert_as_llama_cpp(random_logits("", n, seed), recent, chain, breakers, **settings)


def test_mirostat_equals_llama_cpp():
    """Step by step, with llama.cpp's own draws: what it keeps depends on all of them before."""
    for tau, eta, temperature, n in (
        (5.0, 0.1, 1.0, 300),
        (3.0, 0.5, 0.7, 300),
        (0.0, 1.0, 1.0, 300),
        (8.0, 1.0, 0.9, 32000),
    ):
        settings = SamplerParams(mirostat=2, mirostat_tau=tau, mirostat_eta=eta, temperature=temperature)
        decisions = []
        sampler = Sampler(settings, random=lambda decisions=decisions: decisions.pop())
        with Chain(settings, n) as reference:
            for seed in range(20):
                logits = random_logits("", n, seed) + np.arange(n, dtype=np.float32) * 1e-5  # all distinct
                ids, probs = sampler.candidates(logits, ())
                want_ids, want = reference.apply(logits)
                assert_same((ids, probs), (want_ids, want), are_distinct=True, message=str(settings))
                sums = np.concatenate([[0], np.cumsum(probs, dtype=float)])
                decisions.append((sums[reference.selected] + sums[reference.selected + 1]) / 2 / sums[-1])
                assert sampler.sample(logits, ()) == ids[reference.selected] == want_ids[reference.selected]
