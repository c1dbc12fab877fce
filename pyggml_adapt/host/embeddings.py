"""Embeddings: one vector for a text, from the last hidden states of its tokens.

Source: llama.cpp src/llama-graph.cpp, `build_pooling`; common/common.cpp, `common_embd_normalize`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pyggml_adapt.errors import ContextFullError, ParameterError, TokenError
from pyggml_adapt.host.session import Session

POOLINGS = ("none", "mean", "cls", "last")  # by llama.cpp's numbers
RANK = 4  # of models that score pairs of texts: they have a head for it, which is not built here


def pooling_type(metadata: Mapping[str, object]) -> object:
    """Return the number of the pooling that the metadata of a model name, None if they name none."""
    return metadata.get(f"{metadata.get('general.architecture')}.pooling_type")


def check_pooling(pooling: str | None, of_model: object) -> str:
    """Return how to pool: as asked for, else as the model says (pooling_type()), else by the mean.

    Raises: ParameterError for one that is not known.
    """
    names = ", ".join(POOLINGS)
    if pooling is not None:
        if pooling not in POOLINGS:
            raise ParameterError(f"pooling = {pooling!r} is not one of {names}")
        return pooling
    if of_model is None:
        return "mean"
    if not isinstance(of_model, int) or not 0 <= of_model < len(POOLINGS):
        what = "rank, which is for scores of pairs of texts" if of_model == RANK else repr(of_model)
        raise ParameterError(f"the model's pooling_type is {what}: choose a pooling, one of {names}")
    return POOLINGS[of_model]


def check_texts(ids: Sequence[Sequence[int]], n_ctx: int) -> None:
    """Raise TokenError, or ContextFullError, naming the first text without tokens, or that does not fit."""
    for i, tokens in enumerate(ids):
        if not tokens:
            raise TokenError(f"text {i} has no tokens: it is empty, and the vocabulary adds none")
        if len(tokens) > n_ctx:
            raise ContextFullError(f"text {i} takes {len(tokens)} tokens, more than the context of {n_ctx}")


def embed(session: Session, ids: Sequence[int], pooling: str, *, normalize: bool) -> np.ndarray:
    """Return the embedding of tokens, F32 [n_embd]; for the pooling "none" one of each token, [n_tokens, n_embd].

    The session is emptied before.  normalize: whether each vector is divided by its Euclidean length.
    Raises: as Session.eval().
    """
    session.rewind(0)
    if pooling == "none":
        rows = session.eval_hidden(ids)
    else:
        pool = _Pool(session.n_embd)
        session.eval_each(ids, pool.take, hidden=True)
        rows = pool.of(pooling)[None]
    if normalize:
        rows *= _factors(rows)
    return rows if pooling == "none" else rows[0]


class _Pool:
    """Takes the hidden states of a text piece by piece."""

    def __init__(self, n_embd: int):
        self._n, self._sum = 0, np.zeros(n_embd)
        self._first: np.ndarray | None = None
        self._last = np.zeros(n_embd, dtype=np.float32)

    def take(self, rows: np.ndarray) -> None:
        """Take the states of the next tokens, F32 [n, n_embd]."""
        if self._first is None:
            self._first = rows[0].copy()
        self._n += len(rows)
        self._sum += rows.sum(axis=0, dtype=np.float64)
        self._last = rows[-1].copy()

    def of(self, pooling: str) -> np.ndarray:
        """Return the one vector, F32 [n_embd]."""
        if pooling == "mean":
            return (self._sum / self._n).astype(np.float32)
        return self._last if pooling == "last" or self._first is None else self._first


def _factors(rows: np.ndarray) -> np.ndarray:
    """Return what each row must be multiplied with to have the length 1, F32 [n, 1]; 0 for a row of zeros."""
    lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0).astype(np.float32)
