"""The comparison itself: one model, the same calls, llama.cpp's logits and ours bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from reference import Reference
from tiny_models import random_ids

import pyggml_adapt as pga


def evaluations(model: object, ids: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the logits of a session (ours or the reference's) fed with ids, at least 110, in different ways."""
    yield "prefill in one piece", model.eval(ids[:40], all_logits=True)
    model.rewind(30)
    yield "last logits only", model.eval(ids[30:41])
    yield "last of several ubatches", model.eval(ids[41:-60])
    yield "several ubatches", model.eval(ids[-60:-8], all_logits=True)
    for token in ids[-8:]:
        yield "token by token", model.eval([token])


def differences(reference: object, ours: object, ids: list[int]) -> list[str]:
    """Return what is not equal bit for bit, with the normalised mean squared error."""
    found = []
    for (what, want), (_, got) in zip(evaluations(reference, ids), evaluations(ours, ids), strict=True):
        if not np.array_equal(want, got):
            found.append(f"{what}: nmse {((want - got) ** 2).sum() / (want**2).sum():.2e}")
        assert np.isfinite(want).all()
        assert want.std() > 0.01  # a model that says nothing proves nothing
    return found


def assert_equal_to_llama_cpp(
    path: Path,
    ids: list[int] | None = None,
    *,
    n_ubatch: int = 48,
    n_threads: int = 1,
    flash_attn: bool = True,
    type_k: str = "F16",
    type_v: str = "F16",
) -> None:
    """Assert that logits are equal bit for bit, for more tokens than one padded step of n_kv holds."""
    ids = random_ids(300) if ids is None else ids
    options = {
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "flash_attn": flash_attn,
        "type_k": type_k,
        "type_v": type_v,
    }
    with Reference(path, n_ctx=512, **options) as reference, pga.Host(path, **options) as host:
        with host.session(n_ctx=512) as session:
            assert differences(reference, session, ids) == []
