"""Session: one conversation with one task, as token ids."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, TypeVar

import numpy as np

from pyggml_adapt.errors import BusyError, ClosedError, ContextFullError, ParameterError, TokenError
from pyggml_adapt.models import Model
from pyggml_adapt.runtime.batch import Step, UBatch, as_tokens, split
from pyggml_adapt.runtime.engine import Engine
from pyggml_adapt.runtime.fork import Boundaries, ForkReport, choose, first_difference
from pyggml_adapt.runtime.kv_cache import KVCache
from pyggml_adapt.runtime.parameters import count
from pyggml_adapt.runtime.sampling import Breakers, Sampler, SamplerParams
from pyggml_adapt.weights.task import TaskWeights

_NOTHING_TO_EVALUATE = "there is nothing to evaluate: the session was rewound or used since its last token"

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
        open_session: Callable[..., Any],
        on_close: Callable[[Session], None],
        differences: Iterable[int | None] = (),
    ):
        """open_session: called as Host.session() to make a fork.  differences: the first layers that forks will differ
        in, see first_difference().
        """
        hp = model.hp
        n_boundaries = cache.nbytes // cache.n_cells // (hp.n_embd * 4)  # so that they take no more than the KV cache
        self._kept = Boundaries(choose(differences, hp.n_layer, n_boundaries), hp, cache.n_ctx)
        self.task = weights.task
        self.n_ctx, self.n_vocab = cache.n_ctx, model.hp.n_vocab
        self.n_batch, self.n_ubatch = n_batch, n_ubatch
        self._engine, self._model, self._weights, self._cache = engine, model, weights, cache
        self._open_session, self._on_close = open_session, on_close
        self.fork_report: ForkReport | None = None  # of the fork that made this session
        self._tokens: list[int] = []
        self._n_evaluated = 0  # of the tokens: their K and V are in the cache; a token generated last is not yet
        self._ends: list[int] = []  # of its first evaluations, as long as they were of several tokens, and are whole
        self._last: tuple[int, np.ndarray | None] = (0, None)  # the number of tokens up to the last, and its logits
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

        Without all_logits it is the array that eval() returned.
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

    def _advance(self, new: list[int], n_logits: int = 1) -> np.ndarray:
        """Evaluate what is not yet, then the tokens `new`, and return the logits of the last n_logits."""
        with self._lock:
            self._check_open()
            self.check_fits(len(new))
            self._settle()
            waiting = self._tokens[self._n_evaluated :]
            if not waiting and not new:
                raise TokenError(_NOTHING_TO_EVALUATE)
            return self._append(waiting + new if waiting else new, n_logits)

    def _append(
        self, tokens: list[int], n_logits: int = 1, first_layer: int = 0, source: Boundaries | None = None
    ) -> np.ndarray:
        """Evaluate the tokens that follow the evaluated ones, and return the logits of the last n_logits.

        The first of them may be known already.  first_layer, source: where to start from, if not from tokens.
        """
        n_past = len(self._tokens)
        whole = len(tokens) > 1 and self._n_whole == n_past
        logits = self._evaluate(tokens, n_logits, whole, first_layer, source)
        self._tokens.extend(tokens[n_past - self._n_evaluated :])
        self._n_evaluated = len(self._tokens)
        self._dirty = False
        self._last = self._n_evaluated, logits[0] if n_logits == 1 else logits[-1].copy()
        if whole:
            self._ends.append(self._n_evaluated)
        return logits

    def _evaluate(
        self, tokens: list[int], n_logits: int, whole: bool, first_layer: int, source: Boundaries | None
    ) -> np.ndarray:
        logits = np.empty((n_logits, self.n_vocab), dtype=np.float32)
        done, n_past = 0, self._n_evaluated
        self._dirty = True
        if len(tokens) == 1 and source is None and (cells := self._cache.next_cells(n_past)):
            step = Step(self._cache, tokens[0], n_past, cells)
            self._engine.eval(self._model, self._weights, self._cache, step, logits)
            return logits
        ids = np.array(tokens, dtype=np.int32)
        for piece, pos, out_ids in split(ids, n_past, self.n_batch, self.n_ubatch, n_logits):
            batch = UBatch(self._cache, piece, pos, _zeros(piece), out_ids)
            if source is not None:
                batch.first_layer, batch.embd = first_layer, source.read(first_layer, int(pos[0]), len(piece))
            if whole:
                batch.states = self._kept.outputs(
                    int(pos[0]), len(piece), first_layer=first_layer, with_head=len(out_ids) == n_logits == 1
                )
            self._engine.eval(self._model, self._weights, self._cache, batch, logits[done : done + len(out_ids)])
            done += len(out_ids)
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

    def generate_ids(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        max_tokens: int | None,
        params: SamplerParams,
        stop_ids: Collection[int] = (),
    ) -> Generation:
        """Return an iterator over the token ids that follow `ids`; it ends with the first of stop_ids.

        ids: may be empty where the session's last token is evaluated or was generated: generation goes on from there.
        max_tokens: None for as many as fit.
        Raises: as eval, at once.
        """
        self._check_open()
        if max_tokens is not None and (not isinstance(max_tokens, Integral) or max_tokens < 0):
            raise ParameterError(f"max_tokens = {max_tokens!r} is neither None nor a whole number from 0 on")
        empty = not ids.size if isinstance(ids, np.ndarray) else isinstance(ids, Sequence) and not ids
        tokens = [] if empty and self._can_go_on else as_tokens(ids, self.n_vocab)
        self.check_fits(len(tokens))
        params.check_vocabulary(self.n_vocab)
        breakers = self._breakers(params) if params.has_dry and params.dry_sequence_breakers else {}
        return Generation(self, tokens, max_tokens, Sampler(params, breakers), stop_ids)

    def _breakers(self, params: SamplerParams) -> Breakers:
        """Return where DRY's sequences end: it takes a tokenizer to know which tokens its texts are in."""
        raise ParameterError("dry_sequence_breakers are texts, and this session knows token ids only: give none")

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

    def fork(self: S, task: str | None = None, *, n_ctx: int | None = None, forks: Collection[str] = ()) -> S:
        """Return a new session with these tokens under another task, computed only from the first layer that differs.

        It is bit for bit a fresh session with that task that is given the same calls: each eval() of several tokens as
        it was, and everything from the first token on that came alone (generated, or by itself), or from a call that
        was partly rewound, in one call.  Where no weight differs, as for the same task (None), the fork is a copy.
        How much is reused depends on this session's `forks`; the new one's `fork_report` says how much was.
        n_ctx: by default this session's.  forks: as in Host.session().  This session waits, and stays as it is.
        Raises: ContextFullError, ClosedError, TokenError (a token that the task's vocabulary lacks); as Host.session().
        """
        self._check_open()
        task = self.task if task is None else task
        forked: S = self._open_session(task, n_ctx=self.n_ctx if n_ctx is None else n_ctx, forks=forks)
        try:
            with self._lock:
                self._check_open()
                forked.fork_report = forked._take(self)
        except BaseException:
            forked.close()
            raise
        return forked

    def _take(self, source: Session) -> ForkReport:
        """Become, empty as it is, what a fork of `source`, whose lock is held, must be."""
        source._settle()
        n_layer, known = self._model.hp.n_layer, source.tokens  # a generation may append to them meanwhile
        self.check_fits(len(known))
        differs = first_difference(source._model, source._weights, self._model, self._weights)
        if differs is None and self._fits(source, source._n_evaluated):
            copied, n_reused = self._copy(source, known), source._n_evaluated
            saved = n_reused / len(known) if known else 0.0
            return ForkReport(self.task, len(known), n_reused, None, n_layer, n_layer, saved, copied)
        tokens = as_tokens(known, self.n_vocab) if known else []
        if differs == n_layer and self._fits(source, source._n_whole - source._n_last(tokens)):
            first_layer = source._kept.highest(n_layer) if source._n_last(tokens) else n_layer
            n_reused, n_computed, copied = self._take_all_layers(source, tokens, first_layer)
            first_layer = first_layer or n_layer  # of the tokens that were reused
        else:
            is_there = self._fits(source, source._n_whole)
            first_layer = source._kept.highest(differs) if differs is not None and is_there else 0
            n_reused, n_computed, copied = self._take_layers(source, tokens, first_layer)
        if self.n_past < len(tokens):
            n_computed += (len(tokens) - self.n_past) * n_layer
            self._append(tokens[self.n_past :])
        saved = 1 - n_computed / (len(tokens) * n_layer) if known else 0.0
        first_layer = first_layer if n_reused else 0
        return ForkReport(self.task, len(known), n_reused, differs, first_layer, n_layer, saved, copied)

    def _fits(self, source: Session, n_tokens: int) -> bool:
        """Return whether K and V of the first n_tokens tokens of `source` are there, and would be the same here."""
        is_long, was_long = (self._model.is_long(each.n_cells) for each in (self._cache, source._cache))
        return is_long == was_long and self._cache.fits(source._cache, n_tokens)

    def _take_layers(self, source: Session, tokens: list[int], first_layer: int) -> tuple[int, int, int]:
        """Take the layers below first_layer, and compute the others from its input, call by call.

        Returns the number of tokens reused, of layers computed for a token, and of bytes of K and V copied.
        """
        n_reused, kept = source._n_whole if first_layer else 0, source._kept
        copied = self._cache.copy(source._cache, n_reused, first_layer)
        self._kept.inherit(kept, n_reused, first_layer)
        for end in source._ends:
            self._append(tokens[self.n_past : end], first_layer=first_layer, source=kept if first_layer else None)
        return n_reused, source._n_whole * (self._model.hp.n_layer - first_layer), copied

    def _n_last(self, tokens: list[int]) -> int:
        """Return of how many tokens at the end of the whole calls a fork must compute K and V to get their logits.

        Of none if the head's input was kept for the last of them, or if other tokens follow.
        """
        if not self._ends or self._n_whole < len(tokens) or self._kept.has_head(self._n_whole):
            return 0
        n_call = self._n_whole - (self._ends[-2] if len(self._ends) > 1 else 0)
        return (n_call - 1) % self.n_batch % self.n_ubatch + 1

    def _take_all_layers(self, source: Session, tokens: list[int], first_layer: int) -> tuple[int, int, int]:
        """Take every layer, and compute the logits of the last call, if no token came after it.

        From the head's input if it was kept, else for the last piece of the call from first_layer.  Returns as
        _take_layers().
        """
        n_whole, n_last, n_layer, kept = source._n_whole, source._n_last(tokens), self._model.hp.n_layer, source._kept
        n_reused = n_whole if first_layer else n_whole - n_last
        copied = self._cache.copy(source._cache, n_reused, n_layer)
        self._kept.inherit(kept, n_whole, n_layer)
        self._mark(source, tokens[: n_whole - n_last])
        n_computed = 0
        if n_last:
            last = tokens[n_whole - n_last : n_whole]
            self._append(last, first_layer=first_layer, source=kept if first_layer else None)
            n_computed = n_last * (n_layer - first_layer)
        elif 0 < n_whole == len(tokens):
            self._evaluate_head(tokens, kept)
        self._ends = source._ends.copy()
        return n_reused, n_computed, copied

    def _evaluate_head(self, tokens: list[int], kept: Boundaries) -> None:
        """Compute the logits of the last token from the head's input."""
        n, n_layer = len(tokens), self._model.hp.n_layer
        ids, pos = np.array(tokens[-1:], dtype=np.int32), np.array([n - 1], dtype=np.int32)
        embd, out_ids = kept.read(n_layer, n - 1, 1), np.zeros(1, dtype=np.int32)
        batch = UBatch(self._cache, ids, pos, _zeros(ids), out_ids, first_layer=n_layer, embd=embd, stores=False)
        logits = np.empty((1, self.n_vocab), dtype=np.float32)
        self._engine.eval(self._model, self._weights, self._cache, batch, logits)
        self._last = n, logits[0]

    def _copy(self, source: Session, tokens: list[int]) -> int:
        """Take everything over; return the bytes of K and V copied."""
        n_layer = self._model.hp.n_layer
        copied = self._cache.copy(source._cache, source._n_evaluated, n_layer)
        self._kept.inherit(source._kept, source._n_whole, n_layer)
        self._cache.take(source._cache)
        self._tokens, self._n_evaluated = tokens, source._n_evaluated
        self._ends = source._ends.copy()
        logits = source.logits
        self._last = self._n_evaluated, None if logits is None else logits.copy()
        return copied

    def _mark(self, source: Session, tokens: list[int]) -> None:
        """Take tokens whose K and V were copied for evaluated, in the cells that the calls for them would take."""
        for start, end in pairwise([0, *source._ends]):
            call = np.array(tokens[start:end], dtype=np.int32)
            for piece, pos, _ in split(call, start, self.n_batch, self.n_ubatch, 0):
                self._cache.store(self._cache.find_slot(len(piece)), pos, _zeros(piece))
        self._tokens, self._n_evaluated = tokens, len(tokens)

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

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Session {self.task!r}, {self.n_past} of {self.n_ctx} tokens>"


def _zeros(tokens: np.ndarray) -> np.ndarray:
    """Return the sequence, 0, of each token."""
    return np.zeros(len(tokens), dtype=np.int64)


class Generation:
    """Iterate over generated token ids; one generation at a time goes on in a session.

    Afterwards `finish_reason`, `tokens` and `timings` tell what happened.
    finish_reason: "stop" (an end-of-generation token), "length" (max_tokens, or the context is full), or None before
    the end.  tokens: the ids so far, without the one that stopped it.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        max_tokens: int | None,
        sampler: Sampler,
        stop_ids: Collection[int],
    ):
        self.session, self._sampler = session, sampler
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self.timings = Timings()
        self._steps = self._run(prompt, session.n_ctx if max_tokens is None else max_tokens, stop_ids)

    def __iter__(self) -> Iterator[int]:
        return self._steps

    def __next__(self) -> int:
        return next(self._steps)

    def _run(self, prompt: list[int], max_tokens: int, stop_ids: Collection[int]) -> Iterator[int]:
        session, timings = self.session, self.timings
        session._generation = self
        start = time.perf_counter()
        logits = session.eval(prompt) if prompt else session._go_on()
        timings.prompt_n, timings.prompt_ms = len(prompt), (time.perf_counter() - start) * 1e3
        while self.finish_reason is None:
            if len(self.tokens) >= max_tokens or session.n_past >= session.n_ctx:
                self.finish_reason = "length"
                return
            start = time.perf_counter()
            if session._generation is not self:
                raise BusyError("this generation cannot go on: another one has begun in its session")
            if self.tokens:
                logits = session._advance([])[0]
            token = self._sampler.sample(logits, session._tokens)
            session._tokens.append(token)
            timings.predicted_n += 1
            timings.predicted_ms += (time.perf_counter() - start) * 1e3
            if token in stop_ids:
                self.finish_reason = "stop"
                return
            self.tokens.append(token)
            yield token
