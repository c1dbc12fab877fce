"""Truncated SVD: close to the best error on every spectrum, the true rank of what is exactly low-rank."""

import numpy as np
import pytest

from pyggml_adapt.tools import svd
from pyggml_adapt.tools.svd import Factors, energy, fit, truncated_svd


def matrix(spectrum, m=220, n=160, seed=0):
    """Return F32 [m, n] with the given singular values, and random singular vectors."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(spectrum))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(spectrum))))[0]
    return (u * np.asarray(spectrum) @ v.T).astype(np.float32)


SPECTRA = {
    "flat": np.ones(160),
    "power law": np.arange(1, 161) ** -0.7,
    "steep": 0.8 ** np.arange(160),
    "low rank and noise": np.concatenate((np.geomspace(1, 0.1, 16), np.full(144, 1e-3))),
}


@pytest.mark.parametrize("k", [1, 8, 30, 160])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_close_to_the_best(name, k):
    spectrum = SPECTRA[name]
    x = matrix(spectrum)
    u, s, v = truncated_svd(x, k)
    assert (u.shape, s.shape, v.shape) == ((220, k), (k,), (k, 160))
    error = np.linalg.norm(x - u * s @ v)
    best = np.linalg.norm(spectrum[k:])
    assert error <= 1.01 * best + 1e-5
    np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-4)
    assert (u[np.abs(u).argmax(axis=0), range(k)] > 0).all()


def test_wide_and_tall_matrices_and_equal_results():
    x = matrix(SPECTRA["power law"])
    for each in (x, x.T):
        first, second = truncated_svd(each, 5), truncated_svd(each.copy(), 5)
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(first[1], np.arange(1, 6) ** -0.7, rtol=1e-3)


def test_energy_is_added_up_in_f64():
    assert energy(np.full((3000, 1000), 1e-3, np.float32)) == pytest.approx(3.0, rel=1e-6)
    assert energy(np.full((1, 2), 1e30, np.float32)) == pytest.approx(2e60)


def product(found, alpha, i=0):
    return alpha / found.rank * found.b[i].astype(np.float64) @ found.a[i].astype(np.float64)


@pytest.mark.parametrize("alpha", [1.0, 7.0, 64.0])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_the_true_rank_of_an_exact_product_is_found(rank, alpha):
    x = matrix(np.linspace(2, 1, rank))
    found = fit([x], 100, alpha, 0.01)
    assert isinstance(found, Factors)
    assert found.rank == rank
    assert found.a[0].dtype == found.b[0].dtype == np.float16
    measured = np.linalg.norm(x - product(found, alpha)) / np.linalg.norm(x)
    assert found.error == pytest.approx(measured, rel=1e-3)
    assert found.error < 1e-3  # what rounding to F16 leaves


def test_a_given_rank_is_used_whatever_its_error():
    x = matrix(SPECTRA["flat"])
    found = fit([x], 16, 16.0, None)
    assert isinstance(found, Factors)
    assert found.rank == 16
    assert found.error == pytest.approx(np.sqrt(144 / 160), rel=1e-2)


def test_the_smallest_rank_for_an_error():
    spectrum = SPECTRA["power law"]
    best = np.sqrt(np.cumsum(spectrum[::-1] ** 2)[::-1] / (spectrum**2).sum())  # error of each rank from 0 on
    for max_error in (0.8, 0.5, 0.3):
        found = fit([matrix(spectrum)], 150, 16.0, max_error)
        assert isinstance(found, Factors)
        assert found.error <= max_error
        assert found.rank - np.flatnonzero(best <= max_error)[0] in (0, 1)


def test_an_error_that_no_rank_reaches_gives_that_error():
    assert fit([matrix(SPECTRA["power law"])], 10, 16.0, 0.1) == pytest.approx(0.44, abs=0.05)
    assert fit([matrix([3.0, 2.0, 1.0])], 100, 16.0, 1e-6) == pytest.approx(2e-4, rel=1)  # F16 cannot do better


def test_a_hopeless_matrix_is_given_up_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(svd, "truncated_svd", lambda x, k: calls.append(k) or truncated_svd(x, k))
    assert isinstance(fit([matrix(SPECTRA["flat"])], 80, 16.0, 0.1), float)
    assert calls == [16]


def test_several_matrices_share_one_rank_and_one_error():
    parts = [matrix(np.linspace(2, 1, rank), seed=rank) for rank in (2, 5)]
    found = fit(parts, 50, 16.0, 0.01)
    assert isinstance(found, Factors)
    assert found.rank == 5
    for i, x in enumerate(parts):
        assert np.linalg.norm(x - product(found, 16.0, i)) < 1e-3 * np.linalg.norm(x)


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_small_and_large_numbers(size):
    found = fit([size * matrix([3.0, 2.0])], 2, 2.0, None)
    assert isinstance(found, Factors)
    assert found.error < 0.02


def test_what_f16_cannot_hold():
    assert fit([np.full((8, 8), 1e12, np.float32)], 1, 1.0, None) == float("inf")
    assert fit([np.full((8, 8), 1e12, np.float32)], 1, 1.0, 0.1) == float("inf")
