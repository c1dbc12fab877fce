"""Evaluation: tokens in, logits or hidden states out, with a KV cache that keeps up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, TypeVar

import numpy as np

from pyggml_adapt.engine.batch import Step, UBatch, as_tokens, split
from pyggml_adapt.engine.fork import Boundaries, choose
from pyggml_adapt.engine.kv_cache import KVCache
from pyggml_adapt.engine.parameters import count
from pyggml_adapt.engine.runner import Engine
from pyggml_adapt.errors import ClosedError, ContextFullError, ParameterError, TokenError
from pyggml_adapt.models import Model
from pyggml_adapt.weights.task import TaskWeights

_NOTHING_TO_EVALUATE = "there is nothing to evaluate: the session was rewound or used since its last token"

E = TypeVar("E", bound="Evaluation")


class Evaluation:
    """One sequence of tokens under one task's weights as loaded, and its KV cache: evaluating, rewinding, reusing."""

    def __init__(
        self,
        engine: Engine,
        model: Model,
        weights: TaskWeights,
        cache: KVCache,
        *,
        n_batch: int,
        n_ubatch: int,
        on_close: Callable[[Any], None],
        differences: Iterable[int | None] = (),
    ):
        """differences: the first layers that forks will differ in, see first_difference()."""
        hp = model.hp
        n_boundaries = cache.nbytes // cache.n_cells // (hp.n_embd * 4)  # so that they take no more than the KV cache
        self._kept = Boundaries(choose(differences, hp.n_layer, n_boundaries), hp, cache.n_ctx)
        self.task = weights.task
        self.n_ctx, self.n_vocab, self.n_embd = cache.n_ctx, hp.n_vocab, hp.n_embd
        self.n_batch, self.n_ubatch = n_batch, n_ubatch
        self._engine, self._model, self._weights, self._cache = engine, model, weights, cache
        self._on_close = on_close
        self._tokens: list[int] = []
        self._n_evaluated = 0  # of the tokens: their K and V are in the cache; a token generated last is not yet
        self._ends: list[int] = []  # of its first evaluations, as long as they were of several tokens, and are whole
        self._last: tuple[int, np.ndarray | None] = (0, None)  # the number of tokens up to the last, and its logits
        self._dirty = False  # an evaluation did not finish: cells after the evaluated tokens may be in use
        self._closed = False
        self._lock = threading.Lock()

    @property
    def tokens(self) -> list[int]:
        """Return a copy of the token ids so far, generated ones included."""
        return self._tokens.copy()

    @property
    def n_past(self) -> int:
        """Return the number of tokens so far."""
        return len(self._tokens)

    @property
    def kv_nbytes(self) -> int:
        """Return the bytes of its KV cache."""
        return self._cache.nbytes

    @property
    def boundary_nbytes(self) -> int:
        """Return the bytes of the hidden states that it keeps for forks."""
        return self._kept.nbytes

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Return the layers whose inputs it keeps for forks, ascending; n_layer stands for the head."""
        return self._kept.layers

    @property
    def logits(self) -> np.ndarray | None:
        """Return the logits, F32 [n_vocab], of the last evaluated token; None before any, or if it was rewound.

        None too after eval_hidden(), which computes none.  Without all_logits it is the array that eval() returned.
        """
        n_tokens, logits = self._last
        return logits if n_tokens == self._n_evaluated else None

    @property
    def _n_whole(self) -> int:
        """Return the number of tokens in the evaluations that a fork repeats one by one; the rest it takes together."""
        return self._ends[-1] if self._ends else 0

    def eval(self, ids: Sequence[int] | np.ndarray, *, all_logits: bool = False) -> np.ndarray:
        """Append token ids and return the logits, F32 [n_vocab], of the last; [n_tokens, n_vocab] with all_logits.

        Evaluated in pieces of n_ubatch.  Releases the GIL.  If it fails, the session has the tokens that it had; those
        of which a sliding window no longer holds what the next one sees are evaluated again then.
        Raises: TokenError, ContextFullError (before anything is evaluated), ClosedError.
        """
        tokens = as_tokens(ids, self.n_vocab)
        return self._advance(tokens, len(tokens)) if all_logits else self._advance(tokens)[0]

    def eval_last(self, ids: Sequence[int] | np.ndarray, n_logits: int) -> np.ndarray:
        """Append token ids and return the logits, F32 [n_logits, n_vocab], of the last n_logits of them; as eval().

        Raises: ParameterError if there are fewer, or none is wanted; as eval().
        """
        tokens = as_tokens(ids, self.n_vocab)
        return self._advance(tokens, count("n_logits", n_logits, most=len(tokens)))

    def eval_hidden(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append token ids and return their last hidden states, normed, F32 [n_tokens, n_embd]; as eval().

        They are what the head makes logits of (llama.cpp's result_norm, its token embeddings).  No logits are computed.
        """
        tokens = as_tokens(ids, self.n_vocab)
        return self._advance(tokens, len(tokens), hidden=True)

    def eval_each(
        self, ids: Sequence[int] | np.ndarray, take: Callable[[np.ndarray], None], *, hidden: bool = False
    ) -> None:
        """Append token ids, and give `take` each piece's logits, F32 [up to n_ubatch, n_vocab], in their order.

        The rows together are those of eval(ids, all_logits=True), or with `hidden` of eval_hidden(ids), but there is
        memory for one piece only: an array is valid during the call that gets it.  If `take` raises, nothing is
        appended.
        Raises: as eval().
        """
        tokens = as_tokens(ids, self.n_vocab)
        self._advance(tokens, len(tokens), hidden=hidden, take=take)

    def _advance(
        self,
        new: list[int],
        n_rows: int = 1,
        *,
        hidden: bool = False,
        take: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Evaluate what is not yet, then the tokens `new`, and return the last n_rows rows.  Rest: _evaluate()."""
        with self._lock:
            self._check_open()
            self.check_fits(len(new))
            self._settle()
            waiting = self._tokens[self._n_evaluated :]
            if not waiting and not new:
                raise TokenError(_NOTHING_TO_EVALUATE)
            return self._append(waiting + new if waiting else new, n_rows, hidden=hidden, take=take)

    def _append(
        self,
        tokens: list[int],
        n_rows: int = 1,
        first_layer: int = 0,
        source: Boundaries | None = None,
        *,
        hidden: bool = False,
        take: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Evaluate the tokens that follow the evaluated ones, and return the logits of the last n_rows.

        The first of them may be known already.  first_layer, source: where to start from, if not from tokens.  The
        rest: _evaluate()'s.
        """
        n_past = len(self._tokens)
        whole = len(tokens) > 1 and self._n_whole == n_past
        if len(tokens) == 1 and source is None and not hidden and (cells := self._cache.next_cells(self._n_evaluated)):
            rows = self._step(tokens[0], cells)
            if take is not None:
                take(rows)
        else:
            rows = self._evaluate(tokens, n_rows, whole, first_layer, source, hidden, take)
        self._tokens.extend(tokens[n_past - self._n_evaluated :])
        self._n_evaluated = len(self._tokens)
        self._dirty = False
        if hidden:
            self._last = 0, None
        else:
            self._last = self._n_evaluated, rows[0] if n_rows == 1 else rows[-1].copy()
        if whole:
            self._ends.append(self._n_evaluated)
        return rows

    def _step(self, token: int, cells: Sequence[int]) -> np.ndarray:
        """Evaluate one token in the next cells, and return its logits, [1, n_vocab]."""
        logits = np.empty((1, self.n_vocab), dtype=np.float32)
        self._dirty = True
        step = Step(self._cache, token, self._n_evaluated, cells)
        self._engine.eval(self._model, self._weights, self._cache, step, logits)
        return logits

    def _evaluate(
        self,
        tokens: list[int],
        n_rows: int,
        whole: bool,
        first_layer: int,
        source: Boundaries | None,
        hidden: bool,
        take: Callable[[np.ndarray], None] | None,
    ) -> np.ndarray:
        """Evaluate tokens and return the logits of the last n_rows, or with `hidden` the last hidden states.

        With `take` they go there, piece by piece, and those of the last piece are returned.
        """
        n_most = n_rows if take is None else min(n_rows, self.n_batch, self.n_ubatch)
        rows = np.empty((n_most, self._model.hp.n_embd if hidden else self.n_vocab), dtype=np.float32)
        done, n_past = 0, self._n_evaluated
        self._dirty = True
        ids = np.array(tokens, dtype=np.int32)
        for piece, pos, out_ids in split(ids, n_past, self.n_batch, self.n_ubatch, n_rows):
            batch = UBatch(self._cache, piece, pos, zeros(piece), out_ids, with_head=not hidden)
            if source is not None:
                batch.first_layer, batch.embd = first_layer, source.read(first_layer, int(pos[0]), len(piece))
            if whole:
                batch.states = self._kept.outputs(
                    int(pos[0]), len(piece), first_layer=first_layer, with_head=len(out_ids) == n_rows == 1
                )
            out = rows[done : done + len(out_ids)]
            self._engine.eval(self._model, self._weights, self._cache, batch, out)
            if take is None:
                done += len(out_ids)
            elif len(out):
                take(out)
        return rows if take is None else out

    @property
    def _can_go_on(self) -> bool:
        return self.logits is not None or self._n_evaluated < len(self._tokens)

    def _go_on(self) -> np.ndarray:
        """Return the logits that the next token follows from."""
        self._check_open()
        if self._n_evaluated < len(self._tokens):
            return self._advance([])[0]
        logits = self.logits
        if logits is None:
            raise TokenError(_NOTHING_TO_EVALUATE)
        return logits

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextFullError unless n_tokens more fit into the context."""
        if len(self._tokens) + n_tokens > self.n_ctx:
            raise ContextFullError(
                f"the context of {self.n_ctx} tokens holds {self.n_past}: "
                f"{n_tokens} more do not fit; start the session with a larger n_ctx"
            )

    def rewind(self, n_past: int) -> None:
        """Forget all tokens after the first n_past.

        Where layers attend to a sliding window, what it showed then may be overwritten: those tokens that are left are
        evaluated again, with the next ones.
        Raises: ParameterError if there are not so many.
        """
        self._check_open()
        if not isinstance(n_past, Integral) or not 0 <= n_past <= self.n_past:
            raise ParameterError(f"rewind: n_past = {n_past} is not from 0 to {self.n_past}")
        with self._lock:
            while self._n_whole > n_past:
                self._ends.pop()
            if n_past < self._n_evaluated:
                self._last = 0, None
                self._keep(n_past)
            else:
                self._settle()
            del self._tokens[n_past:]

    def reuse(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Make room for `ids`, a new prompt for the whole session, and return those that are still to be evaluated.

        The tokens that both begin with stay, and all others are forgotten, as by rewind().  The last id is always to be
        evaluated: its logits are needed.
        Raises: TokenError, ContextFullError; then the session is as it was.
        """
        self._check_open()
        tokens = self._check_whole(ids)
        shared = next((i for i, (a, b) in enumerate(zip(self._tokens, tokens, strict=False)) if a != b), self.n_past)
        self.rewind(min(shared, len(tokens) - 1))
        return tokens[self.n_past :]

    def _check_whole(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return the tokens of a prompt for the whole session.  Raises: as reuse()."""
        tokens = as_tokens(ids, self.n_vocab)
        if len(tokens) > self.n_ctx:
            raise ContextFullError(
                f"the prompt takes {len(tokens)} tokens, more than the context of {self.n_ctx}: shorten it, or start "
                f"the session with a larger n_ctx"
            )
        return tokens

    def _settle(self) -> None:
        """Remove from the cache what an evaluation that did not finish has left there."""
        if self._dirty:
            self._keep(self._n_evaluated)

    def _keep(self, n_past: int) -> None:
        """Let the cache hold the first n_past tokens only; none if what the next one would attend to is not there."""
        self._n_evaluated = n_past if self._cache.holds(n_past) else 0
        self._cache.seq_rm(0, self._n_evaluated)
        self._dirty = False
        if self._n_evaluated < n_past or not self._cache.is_whole:
            self._ends.clear()  # a new session given the same calls would have its tokens in other cells

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this session with task {self.task!r} is closed")

    def close(self) -> None:
        """Free the KV cache; closing twice is allowed.

        Raises: BusyError while another thread evaluates with it.
        """
        if not self._closed:
            self._cache.close()
            self._kept = Boundaries((), self._model.hp, self.n_ctx)
            self._closed = True
            self._on_close(self)

    def __enter__(self: E) -> E:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session {self.task!r}, {self.n_past} of {self.n_ctx} tokens>"


def zeros(tokens: np.ndarray) -> np.ndarray:
    """Return the sequence, 0, of each token."""
    return np.zeros(len(tokens), dtype=np.int64)
