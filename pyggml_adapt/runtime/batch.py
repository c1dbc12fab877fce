"""What is evaluated at once: token ids with their positions, sequences and wanted outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pyggml_adapt.errors import TokenError
from pyggml_adapt.runtime.kv_cache import KVCache

_NO_STATES: Mapping[int, np.ndarray] = {}


class UBatch:
    """Up to n_ubatch tokens, in the cells that they will occupy.

    tokens, pos: int32 [n_tokens].  seq_id: int64 [n_tokens].  cells: int64 [n_tokens].  out_ids: int32 [n_outputs].
    first_layer, embd: if not 0, the layer to start from (n_layer: the head), with its input, F32 [n_tokens, n_embd].
    states: layer -> array of the same kind that the input of that layer is written into; of the head's (n_layer) the
    rows of out_ids only.
    """

    __slots__ = ("_cache", "cells", "embd", "first_layer", "out_ids", "pos", "seq_id", "states", "tokens")

    def __init__(
        self,
        cache: KVCache,
        tokens: np.ndarray,
        pos: np.ndarray,
        seq_id: np.ndarray,
        out_ids: np.ndarray,
        *,
        first_layer: int = 0,
        embd: np.ndarray | None = None,
        states: Mapping[int, np.ndarray] = _NO_STATES,
    ):
        self._cache = cache
        self.tokens, self.pos, self.seq_id, self.out_ids = tokens, pos, seq_id, out_ids
        self.first_layer, self.embd, self.states = first_layer, embd, states
        self.cells = cache.find_slot(len(tokens))

    def mask(self, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: whether each token may see each cell."""
        return self._cache.mask(self.pos, self.seq_id, n_kv)


def as_tokens(ids: Sequence[int] | np.ndarray, n_vocab: int) -> np.ndarray:
    """Return token ids as int32 [n].

    Raises: TokenError if there are none or one is not from 0 to n_vocab - 1, naming it.
    """
    if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < n_vocab:
        return np.array(ids, dtype=np.int32)  # one more token: the case whose microseconds count
    try:
        tokens = np.asarray(ids)
        if tokens.size and tokens.dtype.kind not in "iu":
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise TokenError(f"token ids must be a flat sequence of whole numbers, not {ids!r:.60}") from None
    if tokens.ndim != 1 or tokens.size == 0:
        raise TokenError("there are no tokens to evaluate" if tokens.size == 0 else "token ids must be a flat sequence")
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        bad = np.flatnonzero((tokens < 0) | (tokens >= n_vocab))[0]
        raise TokenError(f"token id {tokens[bad]} at position {bad} is not from 0 to {n_vocab - 1}")
    return np.ascontiguousarray(tokens, dtype=np.int32)


def split(
    tokens: np.ndarray, n_past: int, n_batch: int, n_ubatch: int, *, all_logits: bool
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (tokens, pos, out_ids) in pieces: batches of n_batch, each in pieces of n_ubatch, as llama.cpp's.

    Only the last token has an output unless all_logits.
    """
    n_tokens = len(tokens)
    for batch in range(0, n_tokens, n_batch):
        batch_end = min(batch + n_batch, n_tokens)
        for start in range(batch, batch_end, n_ubatch):
            end = min(start + n_ubatch, batch_end)
            pos = np.arange(n_past + start, n_past + end, dtype=np.int32)
            if all_logits:
                out_ids = np.arange(end - start, dtype=np.int32)
            else:
                out_ids = np.array([end - start - 1] if end == n_tokens else [], dtype=np.int32)
            yield tokens[start:end], pos, out_ids
