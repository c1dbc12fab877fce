"""Session: one conversation with one task, as token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import numpy as np

from pyggml_adapt.errors import BusyError, ClosedError, ContextFullError, ParameterError, TokenError
from pyggml_adapt.models import Model
from pyggml_adapt.runtime.batch import UBatch, as_tokens, split
from pyggml_adapt.runtime.engine import Engine
from pyggml_adapt.runtime.kv_cache import KVCache
from pyggml_adapt.runtime.sampling import SamplerParams, sample
from pyggml_adapt.weights.store import TaskWeights

_NOTHING = np.empty(0, dtype=np.int32)

S = TypeVar("S", bound="Session")


@dataclass(slots=True)
class Timings:
    """Numbers of tokens, and milliseconds that their evaluation took."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Session:
    """One sequence of tokens under one task's weights as loaded; its KV cache is never read under others.

    Close it, or use `with`, to give its cache's memory back.  Threads that share a session take turns.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        weights: TaskWeights,
        cache: KVCache,
        *,
        n_batch: int,
        n_ubatch: int,
        on_close: Callable[[Session], None],
    ):
        self.task = weights.task
        self.n_ctx, self.n_vocab = cache.n_ctx, model.hp.n_vocab
        self.n_batch, self.n_ubatch = n_batch, n_ubatch
        self._engine, self._model, self._weights, self._cache = engine, model, weights, cache
        self._on_close = on_close
        self._tokens: list[int] = []
        self._n_evaluated = 0  # of the tokens: their K and V are in the cache; a token generated last is not yet
        self._dirty = False  # an evaluation did not finish: cells after the evaluated tokens may be in use
        self._closed = False
        self._generation: Generation | None = None  # the one that may go on
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

    def eval(self, ids: Sequence[int] | np.ndarray, *, all_logits: bool = False) -> np.ndarray:
        """Append token ids and return the logits, F32 [n_vocab], of the last; [n_tokens, n_vocab] with all_logits.

        Evaluated in pieces of n_ubatch.  Releases the GIL.  If it fails, the session is as before.
        Raises: TokenError, ContextFullError (before anything is evaluated), ClosedError.
        """
        return self._advance(as_tokens(ids, self.n_vocab), all_logits)

    def _advance(self, new: np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Evaluate what is not yet, then the tokens `new`, and return the logits of the last or of all of `new`."""
        with self._lock:
            self._check_open()
            self.check_fits(len(new))
            self._clean()
            waiting = self._tokens[self._n_evaluated :]
            if not waiting and not new.size:
                raise TokenError("there is nothing to evaluate: the session was rewound or used since its last token")
            tokens = np.concatenate([np.array(waiting, dtype=np.int32), new]) if waiting else new
            logits = self._evaluate(tokens, all_logits)
            self._tokens.extend(new.tolist())
            self._n_evaluated = len(self._tokens)
            self._dirty = False
        return logits[len(waiting) :] if all_logits else logits[0]

    def _evaluate(self, tokens: np.ndarray, all_logits: bool) -> np.ndarray:
        logits = np.empty((len(tokens) if all_logits else 1, self.n_vocab), dtype=np.float32)
        done = 0
        self._dirty = True
        for piece, pos, out_ids in split(tokens, self._n_evaluated, self.n_batch, self.n_ubatch, all_logits=all_logits):
            batch = UBatch(self._cache, piece, pos, np.zeros(len(piece), dtype=np.int64), out_ids)
            self._engine.eval(self._model, self._weights, self._cache, batch, logits[done : done + len(out_ids)])
            done += len(out_ids)
        return logits

    def _clean(self) -> None:
        """Give back the cells of an evaluation that failed or was interrupted."""
        if self._dirty:
            self._cache.seq_rm(0, self._n_evaluated)
            self._dirty = False

    def check_fits(self, n_tokens: int) -> None:
        """Raise ContextFullError unless n_tokens more fit into the context."""
        if self.n_past + n_tokens > self.n_ctx:
            raise ContextFullError(
                f"the context of {self.n_ctx} tokens holds {self.n_past}: "
                f"{n_tokens} more do not fit; start the session with a larger n_ctx"
            )

    def rewind(self, n_past: int) -> None:
        """Forget all tokens after the first n_past.

        Raises: ParameterError if there are not so many.
        """
        self._check_open()
        if not 0 <= n_past <= self.n_past:
            raise ParameterError(f"rewind: n_past = {n_past} is not from 0 to {self.n_past}")
        with self._lock:
            self._n_evaluated = min(self._n_evaluated, n_past)
            self._cache.seq_rm(0, self._n_evaluated)
            del self._tokens[n_past:]

    def generate_ids(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int | None,
        params: SamplerParams,
        stop_ids: Collection[int] = (),
    ) -> Generation:
        """Return an iterator over the token ids that follow `ids`; it ends with the first of stop_ids.

        max_tokens: None for as many as fit.
        Raises: as eval, at once.
        """
        self._check_open()
        if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 0):
            raise ParameterError(f"max_tokens = {max_tokens!r} is neither None nor a whole number from 0 on")
        tokens = as_tokens(ids, self.n_vocab)
        self.check_fits(len(tokens))
        return Generation(self, tokens, max_tokens, params, stop_ids)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"this session with task {self.task!r} is closed")

    def close(self) -> None:
        """Free the KV cache; closing twice is allowed.

        Raises: BusyError while another thread evaluates with it.
        """
        if not self._closed:
            self._cache.close()
            self._closed = True
            self._on_close(self)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session {self.task!r}, {self.n_past} of {self.n_ctx} tokens>"


class Generation:
    """Iterate over generated token ids; one generation at a time goes on in a session.

    Afterwards `finish_reason`, `tokens` and `timings` tell what happened.
    finish_reason: "stop" (an end-of-generation token), "length" (max_tokens, or the context is full), or None before
    the end.  tokens: the ids so far, without the one that stopped it.
    """

    def __init__(
        self,
        session: Session,
        prompt: np.ndarray,
        max_tokens: int | None,
        params: SamplerParams,
        stop_ids: Collection[int],
    ):
        self.session, self.params = session, params
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.timings = Timings()
        self._steps = self._run(prompt, session.n_ctx if max_tokens is None else max_tokens, stop_ids)

    def __iter__(self) -> Iterator[int]:
        return self._steps

    def __next__(self) -> int:
        return next(self._steps)

    def _run(self, prompt: np.ndarray, max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        session, rng, timings = self.session, self.params.generator(), self.timings
        looks_back = self.params.repeat_penalty != 1.0
        session._generation = self
        start = time.perf_counter()
        logits = session.eval(prompt)
        timings.prompt_n, timings.prompt_ms = len(prompt), (time.perf_counter() - start) * 1e3
        while self.finish_reason is None:
            if len(self.tokens) >= max_tokens or session.n_past >= session.n_ctx:
                self.finish_reason = "length"
                return
            start = time.perf_counter()
            if session._generation is not self:
                raise BusyError("this generation cannot go on: another one has begun in its session")
            if self.tokens:
                logits = session._advance(_NOTHING)
            token = sample(logits, self.params, session.tokens if looks_back else (), rng)
            session._tokens.append(token)
            timings.predicted_n += 1
            timings.predicted_ms += (time.perf_counter() - start) * 1e3
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            yield token
