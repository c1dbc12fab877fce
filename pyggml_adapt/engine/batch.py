"""What is evaluated at once: token ids with their positions, sequences and wanted outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.errors import TokenError
from pyggml_adapt.graph.inputs import Inputs

_NO_STATES: Mapping[int, np.ndarray] = {}


class UBatch:
    """Up to n_ubatch tokens, in the cells that they will occupy.

    tokens, pos: int32 [n_tokens].  seq_id: int64 [n_tokens].  out_ids: int32 [n_outputs].  cells: for each part of the
    cache, int64 [n_tokens].
    first_layer, embd: if not 0, the layer to start from (n_layer: the head), with its input, F32 [n_tokens, n_embd].
    states: layer -> array of the same kind that the input of that layer is written into; of the head's (n_layer) the
    rows of out_ids only.
    stores: whether there is K and V to store: not for the head alone.  with_head: False if what is wanted are not
    logits but the normed hidden states that the head makes them of.
    """

    __slots__ = ("_cache", "cells", "embd", "first_layer", "out_ids", "pos", "seq_id", "states", "tokens", "with_head")

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
        stores: bool = True,
        with_head: bool = True,
    ):
        self._cache = cache
        self.tokens, self.pos, self.seq_id, self.out_ids = tokens, pos, seq_id, out_ids
        self.first_layer, self.embd, self.states, self.with_head = first_layer, embd, states, with_head
        self.cells: Sequence[np.ndarray] = cache.find_slot(len(tokens)) if stores else ()

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    @property
    def n_outputs(self) -> int:
        """Return how many tokens' logits, or hidden states, are wanted."""
        return len(self.out_ids)

    @property
    def part(self) -> tuple[int, tuple[int, ...], bool]:
        """Return the layer to start from, those whose inputs are wanted, and whether logits are."""
        return self.first_layer, tuple(self.states), self.with_head

    def store(self) -> None:
        """Mark the cells as its own."""
        if self.cells:
            self._cache.store(self.cells, self.pos, self.seq_id)

    def release(self) -> None:
        """Mark the cells as empty again."""
        if self.cells:
            self._cache.release(self.cells)

    def fill(self, inputs: Inputs) -> None:
        """Write what is evaluated into a graph's inputs."""
        inputs.fill(self)

    def mask(self, part: int, n_kv: int) -> np.ndarray:
        """Return bool [n_tokens, n_kv]: whether each token may see each cell of a part of the cache."""
        return self._cache.parts[part].mask(self.pos, self.seq_id, n_kv)

    def distance(self, part: int, n_kv: int) -> np.ndarray:
        """Return int32 [n_tokens, n_kv]: how many positions each cell of a part of the cache is before each token."""
        return self.pos[:, None] - self._cache.parts[part].pos[:n_kv]


class Step:
    """One token that follows all others of its cache, see KVCache.next_cells(); as a UBatch, but made of few numbers.

    Every token that is generated is one, and after its computation the caches of the CPU are cold: what it touches
    here is what counts.
    """

    __slots__ = ("_cache", "cells", "pos", "token")

    n_tokens = n_outputs = 1
    first_layer = 0
    states = _NO_STATES
    with_head = True
    part: tuple[int, tuple[int, ...], bool] = (0, (), True)

    def __init__(self, cache: KVCache, token: int, pos: int, cells: Sequence[int]):
        self._cache, self.token, self.pos, self.cells = cache, token, pos, cells

    def store(self) -> None:
        """Mark the cells as its own."""
        self._cache.store_next(self.cells, self.pos)

    def release(self) -> None:
        """Mark the cells as empty again."""
        self._cache.release([np.array([cell]) for cell in self.cells])

    def fill(self, inputs: Inputs) -> None:
        """Write what is evaluated into a graph's inputs."""
        inputs.fill_step(self)

    def seen(self, part: int, n_kv: int) -> np.ndarray | None:
        """Return bool [n_kv]: the cells of a part that it sees; None if these are those of the last positions."""
        cells = self._cache.parts[part]
        return None if cells.sees_last(self.pos) else cells.seen(self.pos, n_kv)


def as_tokens(ids: Sequence[int] | np.ndarray, n_vocab: int) -> list[int]:
    """Return token ids as a list.

    Raises: TokenError if there are none or one is not from 0 to n_vocab - 1, naming it.
    """
    if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < n_vocab:
        return ids.copy()  # one more token: the case whose microseconds count
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
    return tokens.tolist()


def split(
    tokens: np.ndarray, n_past: int, n_batch: int, n_ubatch: int, n_logits: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (tokens, pos, out_ids) in pieces: batches of n_batch, each in pieces of n_ubatch, as llama.cpp's.

    The last n_logits tokens have outputs.
    """
    n_tokens, first = len(tokens), len(tokens) - n_logits
    for batch in range(0, n_tokens, n_batch):
        batch_end = min(batch + n_batch, n_tokens)
        for start in range(batch, batch_end, n_ubatch):
            end = min(start + n_ubatch, batch_end)
            pos = np.arange(n_past + start, n_past + end, dtype=np.int32)
            yield tokens[start:end], pos, np.arange(max(first - start, 0), end - start, dtype=np.int32)
