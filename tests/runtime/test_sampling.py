"""Sampling against simple formulas and against llama.cpp's samplers."""

import ctypes
import itertools

import numpy as np
import pytest
from reference import lib, sampler_candidates

from pyggml_adapt.runtime.sampling import SamplerParams, candidates, penalize, sample, top_k

LOGITS = np.log(np.array([0.5, 0.1, 0.25, 0.15], dtype=np.float32))
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
GRID = list(itertools.product((0, 1, 5, 40, 500), (1.0, 0.95, 0.5, 0.0), (0.0, 0.05, 0.5, 1.0), (0.3, 0.8, 2.0)))


def params(**values):
    return SamplerParams(**{**OFF, **values})


def kept(**values):
    ids, probs = candidates(LOGITS, params(**values))
    return ids.tolist(), probs.round(6).tolist()


def test_all_candidates():
    assert kept() == ([0, 2, 3, 1], [0.5, 0.25, 0.15, 0.1])


def test_top_k():
    assert kept(top_k=2) == ([0, 2], [0.666667, 0.333333])
    assert kept(top_k=9) == kept()
    assert top_k(np.array([1, 3, 3, 0, 3], np.float32), 2).tolist() == [1, 2]  # of equals those with lower ids


def test_top_p():
    assert kept(top_p=0.7)[0] == [0, 2]
    assert kept(top_p=0.0)[0] == [0]
    assert kept(top_p=0.99)[0] == [0, 2, 3, 1]


def test_min_p():
    assert kept(min_p=0.4)[0] == [0, 2]
    assert kept(min_p=1.0)[0] == [0]


def test_temperature():
    assert kept(temperature=0.5)[1] == pytest.approx([p**2 / 0.345 for p in (0.5, 0.25, 0.15, 0.1)], abs=1e-6)
    assert kept(temperature=1e-4)[1][0] == 1.0


def test_order_is_filters_first_then_temperature():
    assert kept(top_p=0.7, temperature=4.0)[0] == kept(top_p=0.7)[0]


def test_candidates_equal_llama_cpp():
    """Its arithmetic is F32, ours F64: equal sets, and probabilities to F32's precision over 500 terms."""
    rng = np.random.default_rng(1)
    for k, p, min_p, temperature in GRID:
        logits = (3 * rng.standard_normal(500)).astype(np.float32)
        options = {"top_k": k, "top_p": p, "min_p": min_p, "temperature": temperature}
        ids, probs = candidates(logits, SamplerParams(**options))
        want_ids, want_probs = sampler_candidates(logits, **options)
        assert ids.tolist() == want_ids.tolist(), options
        np.testing.assert_allclose(probs, want_probs, rtol=2e-5, atol=1e-9)


def test_penalty():
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    got = penalize(logits, params(repeat_penalty=2.0), [0, 1, 1, 3])
    assert got.tolist() == [1.0, -4.0, 1.0, 0.0]
    assert logits.tolist() == [2.0, -2.0, 1.0, 0.0]
    assert penalize(logits, params(repeat_penalty=2.0, repeat_last_n=1), [0, 2]).tolist() == [2.0, -2.0, 0.5, 0.0]
    assert penalize(logits, params(repeat_penalty=2.0, repeat_last_n=0), [0, 2]).tolist() == logits.tolist()
    assert penalize(logits, params(repeat_penalty=2.0, repeat_last_n=-1), [0, *[2] * 99]).tolist()[0] == 1.0
    assert penalize(logits, params(repeat_penalty=2.0), []).tolist() == logits.tolist()


def test_penalty_equals_llama_cpp():
    rng = np.random.default_rng(2)
    for last_n in (0, 1, 16, 64):
        logits = rng.standard_normal(50).astype(np.float32)
        recent = rng.integers(0, 50, 40).tolist()
        data = (lib.llama_token_data * 50)(*((i, float(x), 0.0) for i, x in enumerate(logits)))
        array = lib.llama_token_data_array(data, 50, -1, False)
        sampler = lib.llama_sampler_init_penalties(50, last_n, 1.3, 0.0, 0.0)
        for token in recent:
            lib.llama_sampler_accept(sampler, token)
        lib.llama_sampler_apply(sampler, ctypes.byref(array))
        lib.llama_sampler_free(sampler)
        want = np.zeros(50, np.float32)
        for i in range(50):
            want[array.data[i].id] = array.data[i].logit
        got = penalize(logits, params(repeat_penalty=1.3, repeat_last_n=last_n), recent)
        np.testing.assert_array_equal(got, want)


def test_greedy():
    rng = params().generator()
    assert sample(LOGITS, params(temperature=0.0), (), rng) == 0
    assert sample(LOGITS, params(temperature=0.0, repeat_penalty=9.0), [0, 2], rng) == 3
    assert sample(np.zeros(5, np.float32), params(temperature=0.0), (), rng) == 0


def test_frequencies_are_the_probabilities():
    rng = params(seed=3).generator()
    n = 20000
    counts = np.bincount([sample(LOGITS, params(), (), rng) for _ in range(n)], minlength=4)
    want = np.exp(LOGITS.astype(float))
    assert (np.abs(counts / n - want) < 5 * np.sqrt(want * (1 - want) / n)).all()  # five standard deviations


def test_seeds():
    def draw(seed):
        rng = params(seed=seed).generator()
        return [sample(LOGITS, params(), (), rng) for _ in range(50)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(0) == draw(0)
    assert draw(None) != draw(None)


def test_impossible_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    rng = params(seed=1).generator()
    assert {sample(logits, params(), (), rng) for _ in range(200)} == {1, 3}
