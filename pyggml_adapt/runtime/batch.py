"""What is evaluated at once: token ids with their positions, sequences and wanted outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pyggml_adapt.errors import TokenError
from pyggml_adapt.runtime.kv_cache import KVCache


class UBatch:
    """Up to n_ubatch tokens, in the cells that they will occupy.

    tokens, pos: int32 [n_tokens].  seq_id: int64 [n_tokens].  cells: int64 [n_tokens].  out_ids: int32 [n_outputs].
    """

    __slots__ = ("tokens", "pos", "seq_id", "cells", "out_ids", "_cache")

    def __init__(self, cache: KVCache, tokens: np.ndarray, pos: np.ndarray, seq_id: np.ndarray, out_ids: np.ndarray):
        self._cache = cache
        self.tokens, self.pos, self.seq_id, self.out_ids = tokens, pos, seq_id, out_ids
        self.cells = cache.find_slot(len(tokens))

    def mask(self, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: whether each token may see each cell."""
        return self._cache.mask(self.pos, self.seq_id, n_kv)


def as_tokens(ids: Sequence[int], n_vocab: int) -> np.ndarray:
    """Return token ids as int32 [n].

    Raises: TokenError if there are none or one is not from 0 to n_vocab - 1, naming it.
    """
    try:
        tokens = np.asarray(ids)
        if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise TokenError(f"token ids must be a flat sequence of whole numbers, not {ids!r:.60}") from None
    if tokens.ndim != 1 or tokens.size == 0:
        raise TokenError("there are no tokens to evaluate" if tokens.size == 0 else "token ids must be a flat sequence")
    bad = np.flatnonzero((tokens < 0) | (tokens >= n_vocab))
    if bad.size:
        raise TokenError(f"token id {tokens[bad[0]]} at position {bad[0]} is not from 0 to {n_vocab - 1}")
    return np.ascontiguousarray(tokens, dtype=np.int32)


def split(tokens: np.ndarray, n_past: int, n_ubatch: int, *, all_logits: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (tokens, pos, out_ids) in pieces of n_ubatch; only the last token has an output unless all_logits."""
    for start in range(0, len(tokens), n_ubatch):
        piece = tokens[start:start + n_ubatch]
        n = len(piece)
        pos = np.arange(n_past + start, n_past + start + n, dtype=np.int32)
        if all_logits:
            out_ids = np.arange(n, dtype=np.int32)
        elif start + n == len(tokens):
            out_ids = np.array([n - 1], dtype=np.int32)
        else:
            out_ids = np.empty(0, dtype=np.int32)
        yield piece, pos, out_ids
